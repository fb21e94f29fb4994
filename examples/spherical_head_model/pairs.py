"""The next two words of a text as one class: every pair that occurs is one."""

import dataclasses
import lzma
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
from language_model.failures import Failure, reason

HEADER = re.compile(r"^== \d{4} \| .+? \| .+?\n", re.MULTILINE)
WORD = re.compile(r"[a-z]+(?:'[a-z]+)?|[.,;:?!]|[0-9]+")


@dataclasses.dataclass(frozen=True)
class Split:
    """Examples: the words before a place, and the class of the two after it."""

    context: np.ndarray  # (examples, words seen), int32
    labels: np.ndarray  # (examples,), int32

    def at(self, steps: range, batch: int, seed: int) -> tuple[jax.Array, jax.Array]:
        """A batch for each step, a function of the seed and the step alone."""
        count = len(self.labels)
        draw = lambda i: np.random.default_rng([seed, i]).integers(0, count, batch)
        chosen = np.stack([draw(i) for i in steps])
        return jnp.asarray(self.context[chosen]), jnp.asarray(self.labels[chosen])


@dataclasses.dataclass(frozen=True)
class Pairs:
    """The task.

    Attributes:
        words: In the order of their ids.
        classes: (classes, 2) ids of words, the most frequent pair first.
        counts: How often each occurs in the training text.
        train: Examples whose pair is a class.
        held_out: The same of speeches that were not trained on.
        covered: Share of the held-out pairs that are classes.
    """

    words: list[str]
    classes: np.ndarray
    counts: np.ndarray
    train: Split
    held_out: Split
    covered: float

    def name(self, label: int) -> str:
        return " ".join(self.words[i] for i in self.classes[label])


def load(path: pathlib.Path, *, context: int, every: int, classes: int) -> Pairs:
    speeches = [WORD.findall(text.lower()) for text in _speeches(path)]
    known = sorted({word for speech in speeches for word in speech})
    numbers = {word: i for i, word in enumerate(known)}
    made = [
        _examples(np.array([numbers[w] for w in speech], np.int32), context)
        for speech in speeches
        if len(speech) > context + 2
    ]
    training = [x for i, x in enumerate(made) if i % every != every - 1]
    rest = [x for i, x in enumerate(made) if i % every == every - 1]
    if not training or not rest:
        raise Failure(f"--corpus {path}: {len(made)} speeches are too few to divide.")
    of_training, pairs = map(np.concatenate, zip(*training, strict=True))
    of_rest, pairs_of_rest = map(np.concatenate, zip(*rest, strict=True))

    found, counts = np.unique(pairs @ [len(known), 1], return_counts=True)
    order = np.argsort(-counts, kind="stable")[:classes]
    rank = np.full(len(found), -1)
    rank[order] = np.arange(len(order))

    def split(context: np.ndarray, pairs: np.ndarray) -> Split:
        keys = pairs @ [len(known), 1]
        place = np.minimum(np.searchsorted(found, keys), len(found) - 1)
        labels = np.where(found[place] == keys, rank[place], -1)
        kept = labels >= 0
        return Split(context[kept], labels[kept].astype(np.int32))

    held_out = split(of_rest, pairs_of_rest)
    chosen = found[order]
    return Pairs(
        known,
        np.stack([chosen // len(known), chosen % len(known)], 1),
        counts[order],
        split(of_training, pairs),
        held_out,
        len(held_out.labels) / len(pairs_of_rest),
    )


def _examples(speech: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
    windows = np.lib.stride_tricks.sliding_window_view(speech, context + 2)
    return windows[:, :context], windows[:, context:].astype(np.int64)


def _speeches(path: pathlib.Path) -> list[str]:
    try:
        text = lzma.decompress(path.read_bytes()).decode("utf-8")
    except OSError as error:
        raise Failure(f"cannot read --corpus {path}: {reason(error)}.") from error
    except (lzma.LZMAError, UnicodeDecodeError) as error:
        raise Failure(f"--corpus {path} is not a whole xz text.") from error
    return [speech for speech in HEADER.split(text) if speech.strip()]
