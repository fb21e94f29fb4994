"""Vectors of neighbouring weights by the nearest code of a codebook."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype, common_dtype

from ._groups import require_group_size
from ._kmeans import assign_codes, kmeans
from ._packing import MOST_BITS
from ._quantized_array import QuantizedArray


@array_arguments
def quantize_vectors(
    weight: Float[Array, "*batch size"],
    codebook: Float[Array, "K d"],
    *,
    group_size: int | None = None,
    where: Bool[Array, "*batch size"] | None = None,
) -> QuantizedArray:
    r"""Replaces each $d$ neighbours of the last axis by the nearest code.

    A code of $\log_2 K$ bits stands for $d$ weights: 256 codes of 4 numbers are two
    bits a weight. With `group_size` the weights of a group are first divided by their
    root mean square, which becomes its scale.

    Args:
        weight: Vectors are along its last axis.
        codebook: One row per code, 1 to 65,536 of them; `fit_codebook` finds one.
        group_size: Static number of weights that share a scale, a multiple of $d$ that
            divides the last axis. None has no scale.
        where: True for the weights that count; the others are exactly 0. The nearest
            code is that of the weight with 0 instead.

    Returns:
        Codes, codebook and scales, these in float32 (float64 if an argument is). A
        group of zeros has scale 1.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: $d$ or `group_size` does not divide the last axis, the codebook has
            too many rows or none, or `where` has another shape.

    Derivatives: of the scale those of a root mean square; codes have none. The codebook
        is passed on.
    Cost: one product of the weight with the codebook, in blocks.
    Source: "PV-Tuning: Beyond Straight-Through Estimation for Extreme LLM Compression".

    Example:
        >>> codebook = jnp.array([[0.0, 0.0], [1.0, 1.0], [1.0, -1.0]])
        >>> weight = jnp.array([[0.8, 1.1, 0.1, -0.2, 0.9, -0.7]])
        >>> found = softlib.quantize.quantize_vectors(weight, codebook)
        >>> print(found.bits, found.codes, found.decode())
        2 [[1 0 2]] [[ 1.  1.  0.  0.  1. -1.]]
    """
    function = "quantize_vectors"
    checks.require_floating(function, weight=weight, codebook=codebook)
    checks.require_rank(function, "weight", weight, 1, "(..., size)")
    checks.require_boolean(function, where=where)
    checks.require_shape(function, "where", where, weight.shape, "that of `weight`")
    if codebook.ndim != 2 or not 1 <= codebook.shape[0] <= 2**MOST_BITS:
        raise ValueError(
            f"{function}: `codebook` must have shape (K, d) with 1 to {2**MOST_BITS} "
            f"rows, got {codebook.shape}."
        )
    count, width = codebook.shape
    _require_width(function, "codebook", width, weight)
    dtype = accumulator_dtype(weight, codebook)
    vectors, scale = _normalized(function, weight, width, group_size, where, dtype)
    codes = assign_codes(vectors, codebook.astype(dtype))
    return QuantizedArray(
        codes.reshape(*weight.shape[:-1], -1),
        bits=max(1, math.ceil(math.log2(count))),
        scale=scale,
        codebook=codebook.astype(dtype),
        where=where,
    )


@array_arguments
def fit_codebook(
    key: PRNGKeyArray,
    weight: Float[Array, "*batch size"],
    num_codes: int,
    *,
    vector_size: int,
    group_size: int | None = None,
    num_steps: int = 20,
) -> Float[Array, "K d"]:
    """Finds a codebook for `quantize_vectors` by k-means of a weight's vectors.

    Args:
        key: A key of `jax.random`, for the starting points.
        weight: As in `quantize_vectors`.
        num_codes: Static number of codes, 1 to 65,536.
        vector_size: Static number of weights of a vector; divides the last axis.
        group_size: As in `quantize_vectors`.
        num_steps: Static number of iterations.

    Returns:
        One row per code, float32 (float64 if `weight` is).

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: A size does not divide the last axis, or a number is out of range.

    Derivatives: none are meant: assignments jump. Gradients are stopped.
    Cost: that of `kmeans` of the vectors.
    Source: "PV-Tuning: Beyond Straight-Through Estimation for Extreme LLM Compression".

    Example:
        >>> key, weight = jax.random.key(0), jnp.array([[1.0, 2.0, 5.0, 6.0]])
        >>> found = softlib.quantize.fit_codebook(key, weight, 2, vector_size=2)
        >>> print(jnp.sort(found, axis=0))
        [[1. 2.]
         [5. 6.]]
    """
    function = "fit_codebook"
    checks.require_floating(function, weight=weight)
    checks.require_rank(function, "weight", weight, 1, "(..., size)")
    checks.require_positive_integer(function, "num_codes", num_codes)
    if num_codes > 2**MOST_BITS:
        raise ValueError(
            f"{function}: `num_codes` must be at most {2**MOST_BITS}, got {num_codes}."
        )
    checks.require_positive_integer(function, "vector_size", vector_size)
    _require_width(function, "vector_size", vector_size, weight)
    dtype = accumulator_dtype(weight)
    vectors, _ = _normalized(function, weight, vector_size, group_size, None, dtype)
    with checks.under_name(function, "kmeans"):
        return kmeans(vectors, num_codes, key=key, num_steps=num_steps).codebook


def _require_width(function: str, name: str, width: int, weight: Array) -> None:
    length = weight.shape[-1]
    if width < 1 or length % width:
        raise ValueError(
            f"{function}: `{name}` must have vectors whose length divides the last "
            f"axis of `weight` ({length}), got {width}."
        )


def _normalized(
    function: str,
    weight: Array,
    width: int,
    group_size: int | None,
    where: Array | None,
    dtype: jnp.dtype,
) -> tuple[Float[Array, "vectors d"], Float[Array, "*batch groups"] | None]:
    """The vectors of the weight, divided by the scale of their group, and the scale."""
    weight = weight.astype(common_dtype(dtype, weight.dtype))
    if where is not None:
        weight = jnp.where(where, weight, 0)
    if group_size is None:
        return weight.reshape(-1, width), None
    require_group_size(function, group_size, weight, width)
    groups = weight.reshape(*weight.shape[:-1], -1, group_size)
    squares = jnp.square(groups)
    total = jnp.ones_like(squares) if where is None else where.reshape(squares.shape)
    count = jnp.maximum(total.sum(-1), 1).astype(dtype)
    mean = squares.sum(-1) / count
    scale = jnp.where(mean == 0, 1, jnp.sqrt(jnp.where(mean == 0, 1, mean)))
    return (groups / scale[..., None]).reshape(-1, width), scale
