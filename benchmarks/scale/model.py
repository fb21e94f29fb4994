"""A decoder in the form of Llama, as functions of one device's part of the batch.

Where the weights and the sequence lie is the business of `divisions`: the layers ask it
for whole weights and for attention.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

EPSILON = 1e-5
ROPE_BASE = 500_000.0

# Of all layers, with the layers as first axis; the embedding is the head as well.
type Weights = Mapping[str, Array]
type Attend = Callable[[Array, Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class Model:
    """Sizes of a decoder; those of the defaults have 8 billion parameters.

    Attributes:
        layers: Number of layers.
        features: Of a token between layers.
        heads: Query heads.
        key_heads: Key heads.
        head_size: Features of a head.
        gated: Features inside of the gated feed-forward part.
        vocabulary: Classes of the head, rows of the embedding.
        length: Tokens of a sequence.
    """

    layers: int = 32
    features: int = 4096
    heads: int = 32
    key_heads: int = 8
    head_size: int = 128
    gated: int = 14_336
    vocabulary: int = 256_000
    length: int = 32_768

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters by name, layers first."""
        layers, features = self.layers, self.features
        queries, keys = (n * self.head_size for n in (self.heads, self.key_heads))
        return {
            "norm_attention": (layers, features),
            "query": (layers, features, queries),
            "key": (layers, features, keys),
            "value": (layers, features, keys),
            "output": (layers, queries, features),
            "norm_gated": (layers, features),
            "gate": (layers, features, self.gated),
            "up": (layers, features, self.gated),
            "down": (layers, self.gated, features),
            "norm": (features,),
            "embedding": (self.vocabulary, features),
        }


def is_of_layers(name: str) -> bool:
    """Whether the parameter has the layers as its first axis."""
    return name not in ("norm", "embedding")


def body(
    model: Model,
    weights: Weights,
    x: Array,
    positions: Array,
    *,
    whole: Callable[[Weights], Weights],
    attend: Attend,
) -> Array:
    """All layers, (B, T, D) to (B, T, D); each is computed again in the backward pass.

    Args:
        model: Sizes.
        weights: Of all layers, as the devices keep them.
        x: Embedded tokens.
        positions: Of these tokens in their sequences, (T,).
        whole: Makes the weights of one layer whole, in the dtype of `x`.
        attend: Attention of queries (B, T, N, H) to keys and values (B, T, K, H).
    """

    @jax.checkpoint
    def layer(x: Array, own: Weights) -> tuple[Array, None]:
        return _layer(model, whole(own), x, positions, attend), None

    return jax.lax.scan(layer, x, dict(weights))[0]


def _layer(
    model: Model, weights: Weights, x: Array, positions: Array, attend: Attend
) -> Array:
    heads = lambda y: y.reshape(*y.shape[:2], -1, model.head_size)
    y = rms_norm(x, weights["norm_attention"])
    query, key, value = (heads(y @ weights[n]) for n in ("query", "key", "value"))
    query, key = (_rotated(each, positions) for each in (query, key))
    attended = attend(query, key, value)
    x = x + attended.reshape(*x.shape[:2], -1) @ weights["output"]
    y = rms_norm(x, weights["norm_gated"])
    gated = jax.nn.silu(y @ weights["gate"]) * (y @ weights["up"])
    return x + gated @ weights["down"]


def rms_norm(x: Array, scale: Array) -> Array:
    """Rows of mean square 1, times the scale; float32 inside."""
    wide = x.astype(jnp.float32)
    square = jnp.mean(wide**2, axis=-1, keepdims=True)
    scale = scale.astype(jnp.float32).reshape(*(1,) * (x.ndim - 1), -1)
    return (wide * jax.lax.rsqrt(square + EPSILON) * scale).astype(x.dtype)


def _rotated(x: Array, positions: Array) -> Array:
    """Rotary positions of heads (B, T, N, H)."""
    half = x.shape[-1] // 2
    rates = ROPE_BASE ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions.astype(jnp.float32)[:, None] * rates[None, :]
    cosine, sine = (f(angles)[None, :, None, :] for f in (jnp.cos, jnp.sin))
    first, second = x[..., :half], x[..., half:]
    rotated: Any = (first * cosine - second * sine, first * sine + second * cosine)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
