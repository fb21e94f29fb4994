"""Words become a query, a label is a row of a table; both have length 1."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from softlib import LinearLogits

from .options import Options

# Reciprocal of the temperature 0.05.
SCALE = 20.0


class Classifier(nnx.Module):
    """Maps words (B, W) to logits (B, L): `SCALE` times cosines, plus a bias."""

    def __init__(self, labels: int, bias: float, options: Options, *, rngs: nnx.Rngs):
        width = options.width
        normal = nnx.initializers.normal(1.0)
        self.words = nnx.Param(normal(rngs.params(), (options.buckets, width)))
        self.labels = nnx.Param(normal(rngs.params(), (labels, width)))
        self.bias = nnx.Param(jnp.full(labels, bias))
        self.mix = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, words: Array) -> LinearLogits:
        queries, table, bias = self.query(words), self.table, self.bias[...]
        return LinearLogits(queries, table, bias=bias, scale=SCALE)

    @property
    def table(self) -> Array:
        """Unit labels (L, D)."""
        return unit(self.labels[...])

    def query(self, words: Array) -> Array:
        """Unit queries (B, D)."""
        known = (words >= 0)[..., None]
        bag = jnp.where(known, self.words[...][jnp.where(words < 0, 0, words)], 0)
        mean = bag.sum(-2) / jnp.maximum(known.sum(-2), 1)
        return unit(mean + self.mix(nnx.gelu(mean)))


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
    return model.query(words)
