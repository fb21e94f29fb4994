"""A decoder transformer in Flax NNX: RMSNorm, rotary positions, gated MLP, tied head.

The model returns its logits as a value that is never formed: with the vocabulary of
this example they would be the largest array of the program by far.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from softlib import LinearLogits


class LanguageModel(nnx.Module):
    """Maps token ids (B, T) to logits (B, T, V); `table` is (V, D).

    Args:
        vocabulary_size: V, rows of the embedding table that is also the output head.
        width: D.
        layers: Number of blocks.
        heads: Number of attention heads.
        feed_forward: Width inside the gated MLP.
        rngs: Key source of the initial weights.
    """

    def __init__(
        self,
        *,
        vocabulary_size: int,
        width: int,
        layers: int,
        heads: int,
        feed_forward: int,
        rngs: nnx.Rngs,
    ):
        # Logits start near 0, so the first loss is that of a uniform guess, log V.
        small = nnx.initializers.normal(0.02)
        self.embedding = nnx.Embed(
            vocabulary_size, width, embedding_init=small, rngs=rngs
        )
        self.blocks = nnx.List(
            [Block(width, heads, feed_forward, rngs=rngs) for _ in range(layers)]
        )
        self.norm_in = nnx.RMSNorm(width, rngs=rngs)
        self.norm_out = nnx.RMSNorm(width, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> LinearLogits:
        x = self.norm_in(self.embedding(tokens))
        for block in self.blocks:
            x = block(x)
        return LinearLogits(self.norm_out(x), self.table)

    @property
    def table(self) -> jax.Array:
        """Weight of the tied head, (V, D)."""
        return self.embedding.embedding[...]


class Block(nnx.Module):
    """Attention, then a gated MLP, each on the normalised residual stream."""

    def __init__(self, width: int, heads: int, feed_forward: int, *, rngs: nnx.Rngs):
        def linear(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, use_bias=False, rngs=rngs)

        self.heads = heads
        self.norm_attention = nnx.RMSNorm(width, rngs=rngs)
        self.query_key_value = linear(width, 3 * width)
        self.attention_out = linear(width, width)
        self.norm_mlp = nnx.RMSNorm(width, rngs=rngs)
        self.gate = linear(width, feed_forward)
        self.up = linear(width, feed_forward)
        self.down = linear(feed_forward, width)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attend(self.norm_attention(x))
        y = self.norm_mlp(x)
        return x + self.down(nnx.silu(self.gate(y)) * self.up(y))

    def attend(self, x: jax.Array) -> jax.Array:
        *batch, length, width = x.shape
        split = (*batch, length, 3, self.heads, width // self.heads)
        query, key, value = jnp.moveaxis(self.query_key_value(x).reshape(split), -3, 0)
        mixed = jax.nn.dot_product_attention(
            rotate(query), rotate(key), value, is_causal=True
        )
        return self.attention_out(mixed.reshape(x.shape))


def rotate(x: jax.Array, base: float = 10_000.0) -> jax.Array:
    """Rotary position embedding of (..., T, N, H): pair i turns by t / base^(2i/H)."""
    length, half = x.shape[-3], x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half) / half)
    angle = jnp.outer(jnp.arange(length), frequency)[:, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    # The same shape on both sides of every product: no implicit rank promotion.
    a, b = jnp.split(x, 2, axis=-1)
    cos, sin = (jnp.broadcast_to(c, a.shape) for c in (cos, sin))
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
