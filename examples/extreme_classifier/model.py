"""Words become a query, a label is a row of a table; both have length 1."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from .options import Options

# Reciprocal of the temperature 0.05.
SCALE = 20.0


class Head(NamedTuple):
    """What the losses take: scores are `SCALE` times cosines, plus a bias."""

    queries: Array
    labels: Array
    bias: Array


class Classifier(nnx.Module):
    """Maps words (B, W) to unit queries (B, D), and has unit labels (L, D)."""

    def __init__(self, labels: int, bias: float, options: Options, *, rngs: nnx.Rngs):
        width = options.width
        normal = nnx.initializers.normal(1.0)
        self.words = nnx.Param(normal(rngs.params(), (options.buckets, width)))
        self.labels = nnx.Param(normal(rngs.params(), (labels, width)))
        self.bias = nnx.Param(jnp.full(labels, bias))
        self.mix = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, words: Array) -> Array:
        known = (words >= 0)[..., None]
        bag = jnp.where(known, self.words[...][jnp.where(words < 0, 0, words)], 0)
        mean = bag.sum(-2) / jnp.maximum(known.sum(-2), 1)
        return unit(mean + self.mix(nnx.gelu(mean)))

    def head(self, words: Array) -> Head:
        return Head(self(words), unit(self.labels[...]), self.bias[...])


def unit(x: Array) -> Array:
    return x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + 1e-12)


def build(labels: int, bias: float, options: Options) -> Classifier:
    """The seed decides every weight."""

    @nnx.jit  # one program instead of one for every initialiser
    def create() -> Classifier:
        return Classifier(labels, bias, options, rngs=nnx.Rngs(options.seed))

    return create()


@nnx.jit
def queries(model: Classifier, words: Array) -> Array:
    return model(words)
