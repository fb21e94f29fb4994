"""Maps from the tokens of a vocabulary to the codes of a codebook."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Integer

from softlib import _checks as checks
from softlib._dtypes import common_dtype
from softlib._ids import labels_in_range


def token_counts(function: str, mapping: Array, num_codes: int) -> Int[Array, " K"]:
    """Counts the tokens of each code; one without a code is not counted."""
    checks.require_positive_integer(function, "num_codes", num_codes)
    require_mapping(function, mapping, num_codes)
    return _count(mapping, num_codes)


def log_weights_of(
    mapping: Integer[Array, " V"],
    num_codes: int,
    counts: Array | None,
    token_bias: Array | None,
    dtype: DTypeLike,
) -> Float[Array, " K"]:
    """The logarithm of the tokens of each code, or of the sum of their e^b."""
    if token_bias is None:
        if counts is None:
            counts = _count(mapping, num_codes)
        return lax.stop_gradient(jnp.log(counts.astype(dtype)))
    bias = token_bias.astype(common_dtype(dtype, token_bias.dtype))
    codes = in_range(mapping, num_codes)
    options = {"mode": "drop", "indices_are_sorted": False}
    start = jnp.full(num_codes, -jnp.inf, bias.dtype)
    top = start.at[codes].max(lax.stop_gradient(bias), **options)
    top = jnp.where(jnp.isfinite(top), top, 0)
    here = jnp.where(codes < num_codes, top[jnp.minimum(codes, num_codes - 1)], 0)
    total = (
        jnp.zeros(num_codes, bias.dtype).at[codes].add(jnp.exp(bias - here), **options)
    )
    # Selected before the logarithm as well: its derivative at 0 is infinite.
    empty = total == 0
    return jnp.where(empty, -jnp.inf, top + jnp.log(jnp.where(empty, 1, total)))


def require_mapping(function: str, mapping: Array, num_codes: int) -> None:
    checks.require_integer(function, mapping=mapping)
    if mapping.ndim != 1 or not mapping.size:
        raise ValueError(
            f"{function}: `mapping` must have shape (V,), one code per token and at "
            f"least one, got {mapping.shape}."
        )
    if isinstance(mapping, jax.core.Tracer):
        return
    values = np.asarray(mapping)
    least, most = int(values.min()), int(values.max())
    if least < 0 or most >= num_codes:
        raise ValueError(
            f"{function}: `mapping` must hold codes in [0, {num_codes}), got "
            f"{least if least < 0 else most}."
        )


def require_token_bias(function: str, token_bias: Array | None, mapping: Array) -> None:
    checks.require_floating(function, token_bias=token_bias)
    shape, why = mapping.shape, "one per token"
    checks.require_shape(function, "token_bias", token_bias, shape, why)


def _count(mapping: Array, num_codes: int) -> Int[Array, " K"]:
    zeros = jnp.zeros(num_codes, jnp.int32)
    return zeros.at[in_range(mapping, num_codes)].add(1, mode="drop")


def in_range(mapping: Array, num_codes: int) -> Int[Array, " V"]:
    """`num_codes` for what is outside [0, num_codes): a negative index would wrap."""
    codes = labels_in_range(mapping, num_codes)
    return jnp.where(codes < 0, num_codes, codes)


def checked_counts(function: str, counts: Any, num_codes: int) -> Array:
    """Numbers of tokens, one per code."""
    counts = jnp.asarray(counts)
    if not jnp.issubdtype(counts.dtype, jnp.integer):
        checks.require_floating(function, counts=counts)
    checks.require_shape(function, "counts", counts, (num_codes,), "one per code")
    return counts
