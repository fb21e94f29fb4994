"""Maps from the tokens of a vocabulary to codes, and sums over the tokens of a code."""

from typing import Any

import jax
import jax.numpy as jnp
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
    checks.require_known_below(function, "mapping", mapping, num_codes, "codes")


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


def tables(
    function: str, embeddings: Array, codebook: Array
) -> tuple[Float[Array, "V D"], Float[Array, "K D"]]:
    """Requires two tables with rows of one length."""
    embeddings, codebook = jnp.asarray(embeddings), jnp.asarray(codebook)
    checks.require_floating(function, embeddings=embeddings, codebook=codebook)
    if (
        embeddings.ndim != 2
        or codebook.ndim != 2
        or embeddings.shape[1] != codebook.shape[1]
    ):
        raise ValueError(
            f"{function}: `embeddings` must have shape (V, D) and `codebook` (K, D) "
            f"with the same D, got {embeddings.shape} and {codebook.shape}."
        )
    return embeddings, codebook


def row_weights(
    function: str, weights: Array | None, x: Float[Array, "V D"]
) -> Float[Array, " V"]:
    """Weight of each row; None counts all alike."""
    if weights is None:
        return jnp.ones(len(x), x.dtype)
    weights = jnp.asarray(weights)
    if not jnp.issubdtype(weights.dtype, jnp.integer):
        checks.require_floating(function, weights=weights)
    checks.require_shape(function, "weights", weights, x.shape[:1], "one per row")
    return lax.stop_gradient(weights.astype(x.dtype))


def totals(
    x: Array, mapping: Array, weights: Array, num_codes: int
) -> tuple[Float[Array, " K"], Float[Array, "K D"]]:
    """Weight, and weighted sum of the rows, of each code."""
    add = jax.ops.segment_sum
    mapping = jnp.where(mapping < 0, num_codes, mapping)  # out of range: dropped
    weighted = x * weights[:, None]
    return add(weights, mapping, num_codes), add(weighted, mapping, num_codes)


def centroids(old: Array, counts: Array, sums: Array) -> Float[Array, "K D"]:
    """The means of the rows of each code; a code without rows stays."""
    # Below the smallest normal number a quotient has lost its digits.
    some = counts[:, None] > float(jnp.finfo(counts.dtype).tiny) * 1e6
    return jnp.where(some, sums / jnp.where(some, counts[:, None], 1), old)
