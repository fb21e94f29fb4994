"""A decoder over characters whose attention is an option.

Positions are rotary, as in the paper: queries and keys are rotated before they are
normalised. Without them (`--no-rotary`) a model of this size learns less in this time,
so that there is less to lose with the length.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from language_model.model import rotate

from softlib import LinearLogits
from softlib.attention import dot_product_attention, softplus_attention
from softlib.losses import softmax_cross_entropy
from softlib.masks import Causal, Mask, Window

from .options import Options
from .text import VOCABULARY_SIZE

# Of the re-weighting; None does not re-weight.
POWER: dict[str, float | None] = {"lssa": None, "lssar-3": 3, "lssar-15": 15}
ATTEND: dict[str, Callable[..., Array]] = {
    "softmax": dot_product_attention,
    **{
        name: functools.partial(softplus_attention, power=power)
        for name, power in POWER.items()
    },
}


class CharacterModel(nnx.Module):
    """Maps bytes (B, T) to logits (B, T, 256)."""

    def __init__(self, attention: str, options: Options, *, rngs: nnx.Rngs):
        small = nnx.initializers.normal(0.02)
        width = options.width
        self.embedding = nnx.Embed(
            VOCABULARY_SIZE, width, embedding_init=small, rngs=rngs
        )
        self.norm_in = nnx.RMSNorm(width, rngs=rngs)
        self.blocks = nnx.List(
            [Block(attention, options, rngs=rngs) for _ in range(options.layers)]
        )
        self.norm_out = nnx.RMSNorm(width, rngs=rngs)

    def __call__(self, tokens: Array, *, mask: Mask | None = None) -> LinearLogits:
        x = self.norm_in(self.embedding(tokens))
        for block in self.blocks:
            x = block(x, Causal() if mask is None else mask)
        return LinearLogits(self.norm_out(x), self.embedding.embedding[...])


class Block(nnx.Module):
    """Attention, then a two-layer network, each on the normalised residual stream."""

    def __init__(self, attention: str, options: Options, *, rngs: nnx.Rngs):
        width = options.width

        def linear(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, use_bias=False, rngs=rngs)

        self.attention, self.heads = attention, options.heads
        self.rotary = options.rotary
        self.norm_attention = nnx.RMSNorm(width, rngs=rngs)
        self.query_key_value = linear(width, 3 * width)
        self.attention_out = linear(width, width)
        self.norm_mlp = nnx.RMSNorm(width, rngs=rngs)
        self.up = linear(width, 4 * width)
        self.down = linear(4 * width, width)

    def __call__(self, x: Array, mask: Mask) -> Array:
        split = (*x.shape[:-1], 3, self.heads, x.shape[-1] // self.heads)
        projected = self.query_key_value(self.norm_attention(x)).reshape(split)
        query, key, value = jnp.moveaxis(projected, -3, 0)
        if self.rotary:
            query, key = rotate(query), rotate(key)
        mixed = ATTEND[self.attention](query, key, value, mask=mask)
        x = x + self.attention_out(mixed.reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.norm_mlp(x))))


def build(attention: str, options: Options) -> CharacterModel:
    """The seed decides every weight, and all attentions start from the same."""

    @nnx.jit  # one program instead of one for every initialiser
    def create() -> CharacterModel:
        return CharacterModel(attention, options, rngs=nnx.Rngs(options.seed))

    return create()


def token_losses(
    model: CharacterModel, inputs: Array, labels: Array, mask: Mask | None = None
) -> Array:
    """Nats of each character, (B, T)."""
    return softmax_cross_entropy(model(inputs, mask=mask), labels)


def mean_loss(model: CharacterModel, inputs: Array, labels: Array) -> Array:
    return token_losses(model, inputs, labels).mean()


@functools.partial(nnx.jit, static_argnames="window")
def _losses(model, inputs, labels, *, window: int | None) -> Array:
    mask = None if window is None else Window(left=window - 1, right=0)
    return token_losses(model, inputs, labels, mask)


def losses_by_position(
    model: CharacterModel, sequences: jax.Array, *, window: int | None = None
) -> Array:
    """Nats of each character of each sequence; optionally only `window` keys each.

    Attention is causal, so the first n columns are what a sequence of length n gives.
    """
    parts = [sequences[i : i + 8] for i in range(0, len(sequences), 8)]
    found = [_losses(model, p[:, :-1], p[:, 1:], window=window) for p in parts]
    return jnp.concatenate(found)
