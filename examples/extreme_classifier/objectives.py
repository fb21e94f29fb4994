"""The losses that are compared, each a line; and their batches."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from softlib import losses

from .glosses import Glosses
from .model import SCALE, Classifier
from .options import Options

type PerRow = Callable[[Classifier, Array, Array, Array], Array]


def of(name: str, options: Options) -> Callable[..., Array]:
    """The mean loss of a batch of words (B, W) with positives (B, K) and a key."""
    per_row = _per_row(name, options)

    def loss(model: Classifier, words: Array, positives: Array, key: Array) -> Array:
        return per_row(model, words, positives, key).mean()

    return loss


def _per_row(name: str, options: Options) -> PerRow:
    if name == "softmax":
        return lambda model, words, ids, key: losses.multi_label_cross_entropy(
            model(words), ids, label_where=ids >= 0
        )
    if name == "decoupled":
        return lambda model, words, ids, key: losses.decoupled_softmax_loss(
            model(words), ids
        )
    if name == "top-k":
        return lambda model, words, ids, key: losses.soft_top_k_loss(
            model(words).materialize(), ids, k=float(options.k)
        )
    if name == "one-versus-all":
        return lambda model, words, ids, key: losses.one_versus_all_loss(
            model(words), ids
        )
    return lambda model, words, ids, key: losses.sampled_softmax_loss(
        model.query(words),
        model.table,
        ids,
        key=key,
        num_sampled=options.sampled,
        bias=model.bias[...],
        scale=SCALE,
    )


def bias_of(name: str, labels: int) -> float:
    """Where the scores start: yes or no among many begins with no."""
    return -math.log(labels) if name == "one-versus-all" else 0.0


@dataclasses.dataclass(frozen=True)
class Batches:
    """Definitions in random order, a function of the seed and the step alone."""

    glosses: Glosses
    size: int
    seed: int

    def at(self, step: int) -> tuple[np.ndarray, np.ndarray, Array]:
        training = self.glosses.training
        epoch, first = divmod(step * self.size, len(training) - self.size + 1)
        order = np.random.default_rng([self.seed, epoch]).permutation(training)
        rows = order[first : first + self.size]
        key = jax.random.fold_in(jax.random.key(self.seed), step)
        return self.glosses.words[rows], self.glosses.positives[rows], key


def gradients_of_the_surest(scores: np.ndarray, positives: np.ndarray) -> dict:
    """Slopes by the score of each row's first positive, for the picture."""
    ids = jnp.asarray(positives)
    found = {}
    for name, loss in (
        ("softmax", losses.multi_label_cross_entropy),
        ("decoupled", losses.decoupled_softmax_loss),
    ):
        total = lambda s, loss=loss: loss(s, ids).sum()
        slopes = np.asarray(jax.grad(total)(jnp.asarray(scores)))
        found[name] = np.take_along_axis(slopes, positives[:, :1], axis=1)[:, 0]
    return found
