"""How well scores of uncertainty tell wrong answers: areas under the ROC curve."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from study import intervals
from study.intervals import Interval

from softlib import scoring

from .sampling import Asked

GREEDY = "G-NLL"


class Score(NamedTuple):
    """A score of uncertainty, one number per question.

    Attributes:
        name: For tables.
        sequences: How many answers it needs, the greedy one included.
        tokens: Tokens of these per question, the mean.
        values: The larger, the less certain.
    """

    name: str
    sequences: int
    tokens: float
    values: np.ndarray


class Groups(NamedTuple):
    """Ids of samples (B, S) that say the same: by their words, by their features."""

    exact: np.ndarray
    similar: np.ndarray | None


def area(wrong: np.ndarray, score: np.ndarray) -> float:
    """Chance that a wrong answer scores above a right one, ties half; NaN without."""
    count = wrong.sum()
    if count in (0, len(wrong)):
        return float("nan")
    # A score that rounding has parted is a tie.
    ranks = scipy.stats.rankdata(np.float32(score))
    excess = ranks[wrong].sum() - count * (count + 1) / 2
    return float(excess / (count * (len(wrong) - count)))


def of_samples(asked: Asked, groups: Groups, count: int) -> list[Score]:
    """The scores that need samples, by the first so many."""
    greedy, samples = asked
    lengths = samples.lengths
    tokens = float(greedy.lengths.mean() + lengths[:, :count].sum(1).mean())
    # A mask, not a slice: all counts share their programs.
    some = jnp.broadcast_to(jnp.arange(lengths.shape[1]) < count, lengths.shape)
    # One of several equal samples, where their probabilities are summed.
    once = some & (_first_equal(samples.tokens) == np.arange(lengths.shape[1]))
    nll = jnp.asarray(samples.nll)

    def mean(values: np.ndarray) -> np.ndarray:
        found = scoring.predictive_entropy(jnp.asarray(values), where=some)
        return np.asarray(found)

    def semantic(ids: np.ndarray, weights: str, where: jax.Array) -> np.ndarray:
        found = scoring.semantic_entropy(
            nll, jnp.asarray(ids), weights=weights, where=where
        )
        return np.asarray(found)

    values = {
        "predictive entropy": mean(samples.nll),
        "predictive entropy, per token": mean(samples.nll / lengths),
        "mean entropy of the samples": mean(samples.entropy),
        "semantic entropy, equal words": semantic(groups.exact, "count", some),
        "semantic entropy, by probability": semantic(groups.exact, "probability", once),
    }
    if groups.similar is not None:
        values["semantic entropy, MiniLM"] = semantic(groups.similar, "count", some)
    return [Score(name, count + 1, tokens, value) for name, value in values.items()]


def of_one(asked: Asked) -> list[Score]:
    """The scores that need the greedy answer alone, or one sample."""
    greedy, samples = asked
    tokens = float(greedy.lengths.mean())
    more = tokens + float(samples.lengths[:, 0].mean())
    return [
        Score(GREEDY, 1, tokens, greedy.nll),
        Score(f"{GREEDY}, per token", 1, tokens, greedy.nll / greedy.lengths),
        Score("entropy along the greedy answer", 1, tokens, greedy.entropy),
        Score("length of the greedy answer", 1, tokens, greedy.lengths),
        Score("NLL of one sample", 2, more, samples.nll[:, 0]),
    ]


def _first_equal(tokens: np.ndarray) -> np.ndarray:
    """Of samples (B, S, L), the index of the first that is equal to each."""
    equal = (tokens[:, :, None] == tokens[:, None]).all(-1)
    return equal.argmax(-1)


def area_of(wrong: np.ndarray, score: np.ndarray) -> Interval:
    return _interval(wrong, (score,), lambda wrong, score: area(wrong, score))


def gain_of(wrong: np.ndarray, score: np.ndarray, other: np.ndarray) -> Interval:
    """The area of a score less that of another one, on the same questions."""
    return _interval(
        wrong, (score, other), lambda wrong, a, b: area(wrong, a) - area(wrong, b)
    )


def _interval(
    wrong: np.ndarray,
    scores: Sequence[np.ndarray],
    statistic: Callable[..., float],
) -> Interval:
    """Over the questions; without one where all answers are right, or all wrong."""
    if wrong.all() or not wrong.any():
        nan = float("nan")
        return Interval(nan, nan, nan, 0.95, len(wrong))
    return intervals.bootstrap(wrong, *scores, statistic=statistic)
