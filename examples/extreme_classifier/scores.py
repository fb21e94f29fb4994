"""How good the rankings of held-out definitions are."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import Array

import softlib
from softlib import metrics

from .glosses import Glosses
from .model import Classifier

PLACES = (1, 3, 5)


class Scores(NamedTuple):
    """Each at the `PLACES`, between 0 and 1."""

    precision: tuple[Any, ...]
    scored: tuple[Any, ...]  # propensity-scored
    recall: tuple[Any, ...]


def measure(model: Classifier, glosses: Glosses) -> Scores:
    rows = slice(0, glosses.held_out)
    p = metrics.label_propensities(jnp.asarray(glosses.counts), len(glosses.training))
    words, positives = (jnp.asarray(a[rows]) for a in glosses[:2])
    found = _measure(model, words, positives, p)
    return Scores(*(tuple(float(x) for x in values) for values in found))


@nnx.jit
def _measure(
    model: Classifier, words: Array, positives: Array, propensities: Array
) -> Scores:
    ranking = softlib.logits.top_k(model(words), k=max(PLACES)).classes
    scored = metrics.propensity_scored_precision_at_k
    return Scores(
        tuple(metrics.precision_at_k(ranking, positives, k=k).mean() for k in PLACES),
        tuple(scored(ranking, positives, propensities, k=k) for k in PLACES),
        tuple(metrics.recall_at_k(ranking, positives, k=k).mean() for k in PLACES),
    )


def always_the_most_frequent(glosses: Glosses) -> Scores:
    """The same ranking for everybody."""
    positives = jnp.asarray(glosses.positives[: glosses.held_out])
    best = jnp.argsort(-jnp.asarray(glosses.counts))[: max(PLACES)].astype(jnp.int32)
    ranking = jnp.broadcast_to(best, (len(positives), len(best)))
    p = metrics.label_propensities(jnp.asarray(glosses.counts), len(glosses.training))
    scored = metrics.propensity_scored_precision_at_k
    mean = lambda measure: tuple(
        float(measure(ranking, positives, k=k).mean()) for k in PLACES
    )
    return Scores(
        mean(metrics.precision_at_k),
        tuple(float(scored(ranking, positives, p, k=k)) for k in PLACES),
        mean(metrics.recall_at_k),
    )
