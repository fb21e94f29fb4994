"""A decoder of the Llama form in Flax NNX, made of softlib's parts.

RMSNorm, rotary positions in pairs (2i, 2i + 1), heads that share keys, gated
feed-forward, and a head whose logits are a value that is never formed. The layers are
stacked on a leading axis and visited by a scan, so that one of them is compiled.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from softlib import LinearLogits, attention


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a model.

    Attributes:
        vocabulary_size: V.
        width: D, features of a token between layers.
        layers: Number of layers.
        heads: Query heads of a layer.
        key_heads: Key and value heads; each serves heads / key_heads query heads.
        head_size: Features of a head, even.
        feed_forward: Width inside of the gated feed-forward.
        rotary_base: Pair i of a head turns by t / rotary_base^(2i / head_size).
        epsilon: Added to the mean square by RMSNorm.
        tied: Whether the embedding table is also the weight of the head.
    """

    vocabulary_size: int
    width: int
    layers: int
    heads: int
    key_heads: int
    head_size: int
    feed_forward: int
    rotary_base: float = 10_000.0
    epsilon: float = 1e-5
    tied: bool = True


class Cache(NamedTuple):
    """Keys and values of the tokens that were read, one row per sequence.

    Sequences stand at the left and are padded on the right: token t of a sequence is in
    place t, and what is behind `lengths` is never read, then overwritten.

    Attributes:
        key: (layers, B, S, K, H); S places for the tokens of a sequence.
        value: (layers, B, S, K, H).
        lengths: (B,) int32, tokens that each sequence has so far.
    """

    # Any: transformations rebuild it from whatever stands for its arrays.
    key: Any
    value: Any
    lengths: Any

    @property
    def size(self) -> int:
        """S, the longest sequence that fits."""
        return self.key.shape[2]


class Read(NamedTuple):
    """What a model says after it has read tokens.

    Attributes:
        logits: Value of shape (B, T, V); of the next token at each place.
        cache: The cache with the tokens.
        activations: (layers, B, T, feed_forward) if they were asked for: the gated
            products before the last matrix of each feed-forward.
    """

    logits: Any
    cache: Any = None
    activations: Any = None


class Llama(nnx.Module):
    """Maps token ids to logits of the next token.

    Args:
        config: The sizes.
        dtype: Of parameters, activations and the cache.
        rngs: Key source of the initial weights.
    """

    def __init__(self, config: Config, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        small = nnx.initializers.normal(0.02)
        self.embedding = nnx.Embed(
            config.vocabulary_size,
            config.width,
            embedding_init=small,
            dtype=dtype,
            param_dtype=dtype,
            rngs=rngs,
        )

        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap
        def stacked(rngs: nnx.Rngs) -> Layer:
            return Layer(config, dtype, rngs=rngs)

        self.layers = stacked(rngs)
        self.norm = _norm(config, dtype, rngs)
        if not config.tied:
            shape = (config.vocabulary_size, config.width)
            self.head = nnx.Param(small(rngs.params(), shape, dtype))

    @property
    def table(self) -> jax.Array:
        """Weight of the head, (V, D)."""
        head = self.embedding.embedding if self.config.tied else self.head
        return head[...]

    def __call__(self, tokens: jax.Array) -> LinearLogits:
        """Logits (B, T, V) at each place of token ids (B, T), without a cache.

        Shorter sequences are padded on the right, by any token: attention is causal, so
        the logits at real tokens do not see the padding.
        """
        return self.read(tokens).logits

    def read(self, tokens: jax.Array, *, keep_activations: bool = False) -> Read:
        """As calling the model, with the activations of its feed-forwards too."""
        places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

        def attend(query: Any, key: Any, value: Any, kept: None) -> tuple[Any, None]:
            found = attention.dot_product_attention(query, key, value, is_causal=True)
            return found, kept

        hidden, (_, activations) = self._visit(
            self.embedding(tokens), places, attend, None, keep_activations
        )
        return Read(LinearLogits(hidden, self.table), None, activations)

    def prefill(self, tokens: jax.Array, lengths: jax.Array, *, size: int) -> Read:
        """Reads the beginning of sequences into a new cache.

        Args:
            tokens: (B, T), padded on the right by any token.
            lengths: (B,), real tokens of each sequence, from 1 to T.
            size: Static; places of the cache, for the tokens that follow too.

        Returns:
            Logits (B, 1, V) after the last real token of each sequence, and the cache.

        Raises:
            ValueError: The tokens do not fit the cache, or there are none.
        """
        batch, length = tokens.shape
        if not 0 < length <= size:
            raise ValueError(
                f"prefill: `tokens` must have 1 to `size`={size} places, got {length}."
            )
        places = jnp.broadcast_to(jnp.arange(length), tokens.shape)

        def attend(query: Any, key: Any, value: Any, _: None) -> tuple[Any, Any]:
            found = attention.dot_product_attention(query, key, value, is_causal=True)
            room = ((0, 0), (0, size - length), (0, 0), (0, 0))
            return found, (jnp.pad(key, room), jnp.pad(value, room))

        embeddings = self.embedding(tokens)
        hidden, ((key, value), _) = self._visit(embeddings, places, attend, None, False)
        lengths = lengths.astype(jnp.int32)
        last = hidden[jnp.arange(batch), lengths - 1][:, None]
        return Read(LinearLogits(last, self.table), Cache(key, value, lengths))

    def extend(self, tokens: jax.Array, cache: Cache) -> Read:
        """Reads T more tokens of each sequence, (B, T), and appends them to the cache.

        A sequence that outgrows the cache has NaN for its logits from there on.

        Returns:
            Logits (B, T, V) after each of the tokens, and the cache with them.
        """
        return self.extend_by(self.embedding(tokens), cache)

    def extend_by(self, embeddings: jax.Array, cache: Cache) -> Read:
        """As `extend`, of embeddings (B, T, D) that need not be those of tokens."""
        batch, length, _ = embeddings.shape
        places = cache.lengths[:, None] + jnp.arange(length)[None]
        rows = jnp.arange(batch)[:, None]
        total = cache.lengths + length

        # `decode_attention` makes the rows of a length beyond the cache NaN.
        def attend(query: Any, key: Any, value: Any, kept: Any) -> tuple[Any, Any]:
            put = lambda array, new: array.at[rows, places].set(new, mode="drop")
            kept = put(kept[0], key), put(kept[1], value)
            found = attention.decode_attention(
                query, *kept, key_value_seq_lengths=total, is_causal=True
            )
            return found, kept

        hidden, ((key, value), _) = self._visit(
            embeddings, places, attend, (cache.key, cache.value), False
        )
        return Read(LinearLogits(hidden, self.table), Cache(key, value, total))

    def _visit(
        self, x: Any, places: Any, attend: Any, kept: Any, keep_activations: bool
    ) -> Any:
        """The hidden features after the last norm, and what every layer kept."""
        graph, layers = nnx.split(self.layers)

        def step(x: jax.Array, given: Any) -> tuple[jax.Array, Any]:
            layer, kept = given
            x, kept, activations = nnx.merge(graph, layer)(x, places, attend, kept)
            return x, (kept, activations if keep_activations else None)

        x, found = jax.lax.scan(step, x, (layers, kept))
        return self.norm(x), found


class Layer(nnx.Module):
    """Attention, then a gated feed-forward, each on normalised features."""

    def __init__(self, config: Config, dtype: Any, *, rngs: nnx.Rngs):
        def linear(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(
                inputs,
                outputs,
                use_bias=False,
                dtype=dtype,
                param_dtype=dtype,
                rngs=rngs,
            )

        width, wide = config.width, config.feed_forward
        queries = config.heads * config.head_size
        keys = config.key_heads * config.head_size
        self.config = config
        self.norm_attention = _norm(config, dtype, rngs)
        self.query = linear(width, queries)
        self.key = linear(width, keys)
        self.value = linear(width, keys)
        self.attention_out = linear(queries, width)
        self.norm_feed_forward = _norm(config, dtype, rngs)
        self.gate = linear(width, wide)
        self.up = linear(width, wide)
        self.down = linear(wide, width)

    def __call__(self, x: jax.Array, places: Any, attend: Any, kept: Any) -> Any:
        base, size = self.config.rotary_base, self.config.head_size
        split = lambda array: array.reshape(*array.shape[:-1], -1, size)
        y = self.norm_attention(x)
        query, key, value = (split(f(y)) for f in (self.query, self.key, self.value))
        query, key = (rotate(array, places, base=base) for array in (query, key))
        mixed, kept = attend(query, key, value, kept)
        x = x + self.attention_out(mixed.reshape(*x.shape[:-1], -1))
        y = self.norm_feed_forward(x)
        activations = nnx.silu(self.gate(y)) * self.up(y)
        return x + self.down(activations), kept, activations


def rotate(x: jax.Array, places: jax.Array, *, base: float) -> jax.Array:
    """Turns pairs (2i, 2i + 1) of (B, T, N, H) by the angles of their places (B, T)."""
    size = x.shape[-1]
    frequencies = base ** (-jnp.arange(0, size, 2) / size)
    angles = places[:, :, None, None] * frequencies[None, None, None]
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], size // 2, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    cos, sin = (jnp.broadcast_to(f(angles), a.shape) for f in (jnp.cos, jnp.sin))
    turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def _norm(config: Config, dtype: Any, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(
        config.width, epsilon=config.epsilon, dtype=dtype, param_dtype=dtype, rngs=rngs
    )
