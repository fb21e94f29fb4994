"""The network that is trained: one layer of attention, then a network per token."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from softlib.nn import TensorAttention

from .options import Options


class Kind(NamedTuple):
    """What the models differ in, besides their heads.

    Attributes:
        order: Of the attention: one query and `order - 1` keys.
        layers: How many follow each other, before the network per token.
    """

    order: int
    layers: int


KINDS = {"tensor": Kind(3, 1), "pairwise": Kind(2, 1), "deeper": Kind(2, 2)}


class TripleModel(nnx.Module):
    """Maps numbers (B, n) to logits of the answers (B, n).

    A layer of order 2 is ordinary attention. All have a blank key, which a query can
    attend to that finds nothing.
    """

    def __init__(self, kind: Kind, options: Options, *, rngs: nnx.Rngs):
        width, hidden = options.width, options.mlp_features
        self.embedding = nnx.Embed(
            options.modulus,
            width,
            embedding_init=nnx.initializers.normal(1.0),
            rngs=rngs,
        )
        self.layers = nnx.List(
            [
                TensorAttention(
                    width,
                    options.tensor_heads if kind.order == 3 else options.pairwise_heads,
                    order=kind.order,
                    head_features=options.head_features,
                    value_features=options.head_features,
                    blank_key=True,
                    scale=options.head_features**-0.5,
                    # So few pairs are stored sooner than streamed.
                    implementation="reference",
                    rngs=rngs,
                )
                for _ in range(kind.layers)
            ]
        )
        self.up = nnx.Linear(width, hidden, rngs=rngs)
        self.down = nnx.Linear(hidden, 1, rngs=rngs)

    def __call__(self, tokens: Array) -> Array:
        x = self.embedding(tokens)
        for attention in self.layers:
            x = x + attention(x)
        return self.down(nnx.gelu(self.up(x)))[..., 0]


def build(name: str, options: Options, seed: int) -> TripleModel:
    """The seed decides every weight."""

    @nnx.jit  # one program instead of one for every initialiser
    def create() -> TripleModel:
        return TripleModel(KINDS[name], options, rngs=nnx.Rngs(seed))

    return create()


@nnx.jit
def _logits(model: TripleModel, tokens: Array) -> Array:
    return model(tokens)


def errors(model: Any, tokens: np.ndarray, answers: np.ndarray) -> float:
    """The share of wrong answers."""
    logits = np.asarray(_logits(model, jnp.asarray(tokens)))
    return float(((logits > 0) != answers).mean())


@nnx.jit
def attention_weights(model: TripleModel, tokens: Array) -> Array:
    """(B, heads, i, j, k); entry 0 of j and k is the blank."""
    return model.layers[0].attention_weights(model.embedding(tokens))


def parameters(model: nnx.Module) -> int:
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
