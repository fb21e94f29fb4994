"""Attention over a mask value as the `attention_fn` of Flax's attention layers."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jaxtyping import Array, Float, Integer

from softlib import _checks as checks, attention, masks
from softlib._dtypes import common_dtype
from softlib.masks import Mask
from softlib.typing import Implementations, Precision


def attention_fn(
    mask: Mask | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    normalizer: Literal["softmax", "softplus", "stablemax"] = "softmax",
    block_query: int | None = None,
    block_key: int | None = None,
    implementation: Implementations = None,
) -> Callable[..., Array]:
    r"""The `attention_fn` of a Flax attention layer, under a mask that is a value.

    For `nnx.MultiHeadAttention`, `linen.MultiHeadDotProductAttention` and the layers
    made of them: `attention_fn=softlib.nn.attention_fn(mask)`. Each call of the layer
    is then one of `softlib.attention.dot_product_attention`. A pair attends if `mask`
    and the layer's own mask (its argument `mask`, the cache, `is_causal`) both allow
    it.

    The `mask` of a call of the layer may itself be a mask value, which may hold arrays:
    `layer(x, mask=masks.Padding(key=lengths))` makes no array of pairs. Where it is an
    array it is Flax's: anything but 0 attends, in any dtype.

    What cannot be done raises: dropout of weights that are never formed, their capture
    (`sow_weights`), products of weights by custom functions, and a query of a cache
    whose position a mask needs and the layer does not pass. With
    `nnx.MultiHeadAttention`, pass `input_positions` for that; elsewhere use
    `attention_fn()` and give the layer the row of the mask for that position.

    Args:
        mask: Static mask value on positions, without arrays. None for all pairs.
        scale: Static factor of the products; None for $1/\sqrt H$.
        softcap: Static positive number; see
            `softlib.attention.dot_product_attention`, as for the options that follow.
        normalizer: Static; `softmax`, `softplus` or `stablemax`.
        block_query: Static queries per block; None chooses.
        block_key: Static keys per block.
        implementation: Static; see `softlib.explain`.

    Returns:
        A function of the arguments that Flax's `dot_product_attention` takes. It
        returns the attended values in the dtype of the layer. A query that may attend
        to no key gets 0, where Flax's own gives the mean of all values. Two made with
        equal options are equal, so that equal layers share a compilation.

    Raises:
        TypeError: `mask` is no mask value, or one that holds arrays; or a number is
            traced.
        ValueError: An option is out of range.

    Derivatives: as `softlib.attention.dot_product_attention`.
    Cost: as there. A boolean array over pairs is read in every block that `mask`
        leaves.
    Source: softlib's own.

    Example:
        >>> from flax import nnx
        >>> attend = softlib.nn.attention_fn(softlib.masks.Window(2, 0))
        >>> layer = nnx.MultiHeadAttention(
        ...     2, 8, attention_fn=attend, decode=False, rngs=nnx.Rngs(0)
        ... )
        >>> print(layer(jnp.ones((1, 5, 8))).shape)
        (1, 5, 8)
    """
    if mask is not None:
        require_static_mask("attention_fn", mask)
    if isinstance(scale, jax.Array | np.ndarray):
        raise TypeError(
            "attention_fn: `scale` must be a Python number or None (it is static), "
            f"got {type(scale).__name__}."
        )
    for name, size in (("block_query", block_query), ("block_key", block_key)):
        if size is not None:
            checks.require_positive_integer("attention_fn", name, size)
    if softcap is not None:
        checks.require_positive_number("attention_fn", "softcap", softcap)
    choices = ("softmax", "softplus", "stablemax")
    checks.require_one_of("attention_fn", "normalizer", normalizer, choices)
    options = {
        "scale": scale,
        "softcap": softcap,
        "normalizer": normalizer,
        "block_query": block_query,
        "block_key": block_key,
        "implementation": static_names(implementation),
    }
    return _AttentionFn(mask, tuple(options.items()))


@dataclasses.dataclass(frozen=True)
class _AttentionFn:
    """A value and no closure: Flax compares the static parts of modules."""

    mask: Mask | None
    options: tuple[tuple[str, Any], ...]

    # Linen looks at the names here and drops what is not among them without a word, so
    # each argument that a layer may pass has to stand here, also those that raise.
    def __call__(
        self,
        query: Float[Array, "*batch T N H"],
        key: Float[Array, "*batch S K H"],
        value: Float[Array, "*batch S K E"],
        bias: Float[Array, "..."] | None = None,
        mask: Any = None,
        broadcast_dropout: bool = True,
        dropout_rng: Any = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Dtype | None = None,
        precision: Precision = None,
        module: Any = None,
        is_causal: bool = False,
        force_fp32_for_softmax: bool = False,
        einsum_dot_general: Callable[..., Array] | None = None,
        qk_attn_weights_einsum: Callable[..., Array] | None = None,
        attn_weights_value_einsum: Callable[..., Array] | None = None,
        input_positions: Integer[Array, "*batch T"] | None = None,
    ) -> Float[Array, "*batch T N E"]:
        _refuse(
            dropout_rate=dropout_rate if not deterministic else 0.0,
            module=module,
            einsum_dot_general=einsum_dot_general,
            qk_attn_weights_einsum=qk_attn_weights_einsum,
            attn_weights_value_einsum=attn_weights_value_einsum,
        )
        # Sums of exponentials are float32 at least: force_fp32_for_softmax is met.
        if dtype is None:
            dtype = common_dtype(query, key, value)
        query, key, value = (x.astype(dtype) for x in (query, key, value))
        if mask is not None and not isinstance(mask, Mask):
            if not isinstance(mask, jax.Array | np.ndarray):
                raise TypeError(
                    "attention_fn: `mask` must be an array, a mask value or None, got "
                    f"{type(mask).__name__}."
                )
            mask = _on_pairs(jnp.asarray(mask) != 0, query)
        parts = tuple(part for part in (self.mask, mask) if part is not None)
        offset = _query_offset(parts, query, key, is_causal, input_positions)
        attended: Any = attention.dot_product_attention(
            query,
            key,
            value,
            mask=parts,
            bias=None if bias is None else _on_pairs(bias, query),
            query_offset=offset,
            is_causal=is_causal,
            precision=precision,
            **dict(self.options),
        )
        return attended


def require_static_mask(function: str, mask: Any) -> None:
    """A layer keeps it among its static parts, which are hashed and compared."""
    if not isinstance(mask, Mask):
        raise TypeError(
            f"{function}: `mask` must be a mask value or None, got "
            f"{type(mask).__name__}; arrays belong to the call of the layer."
        )
    if jax.tree.leaves(mask):
        raise TypeError(
            f"{function}: `mask` must hold no arrays, because it is static, got "
            f"{type(mask).__name__}; pass it to the call of the layer."
        )


def static_names(names: Implementations) -> str | tuple[str, ...] | None:
    """Hashable."""
    return names if names is None or isinstance(names, str) else tuple(names)


def _refuse(**given: Any) -> None:
    """Refuses options of a layer that need the attention weights as an array."""
    reasons = {
        "dropout_rate": (
            "0 or `deterministic` True, because the attention weights are never "
            "formed; drop the output of the layer instead"
        ),
        "module": (
            "None (no `sow_weights`), because the attention weights are never formed"
        ),
    }
    other = "None, because the products are those of softlib.attention"
    for name, value in given.items():
        if value is not None and not (name == "dropout_rate" and value == 0):
            shown = value if name == "dropout_rate" else type(value).__name__
            raise ValueError(
                f"attention_fn: `{name}` must be {reasons.get(name, other)}, "
                f"got {shown}."
            )


def _on_pairs(array: Array, query: Array) -> Array:
    """The array with the leading axes that broadcasting implies."""
    missing = (1,) * (query.ndim - array.ndim)
    return array.reshape(*missing, *array.shape)


def _query_offset(
    parts: tuple[Any, ...],
    query: Array,
    key: Array,
    is_causal: bool,
    input_positions: Array | None,
) -> Any:
    """Position of the first query among the keys: 0, or an index in a cache.

    One query and many keys come from a cache. Position 0 would then be wrong, and the
    arguments do not say which entry was written last.
    """
    from_cache = query.shape[-3] == 1 < key.shape[-3]
    if input_positions is not None:
        if not from_cache:
            raise ValueError(
                "attention_fn: `input_positions` must be None unless one query meets "
                f"the keys of a cache, got {query.shape[-3]} queries and "
                f"{key.shape[-3]} keys, which stand at 0, 1, ..."
            )
        positions = jnp.broadcast_to(input_positions, (*query.shape[:-3], 1))
        return positions[..., 0]
    if from_cache and (is_causal or any(map(_has_positions, parts))):
        raise ValueError(
            "attention_fn: `mask` and `is_causal` must not depend on the position of "
            "the query where one query meets many keys, as in a cache, because the "
            "position is not known; pass `input_positions` to nnx.MultiHeadAttention, "
            f"or the row of the mask as an array, got {key.shape[-3]} keys."
        )
    return 0


def _has_positions(part: Any) -> bool:
    if isinstance(part, masks.Padding):
        return part.query is not None
    return isinstance(part, Mask) and not isinstance(part, masks.All)
