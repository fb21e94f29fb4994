"""Logarithms of Gaussian kernels of weighted samples, row by row.

Every estimate is a log-sum-exp over rows of log-sum-exps within a row, so that nothing
underflows and only one row need exist at a time.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float

from softlib import _checks as checks
from softlib._compiled_once import compiled_once
from softlib._dtypes import accumulator_dtype, promoted
from softlib.typing import Scalar


class Weights(NamedTuple):
    """Normalised weights of N samples.

    Their logarithms would have no derivative at a weight of 0.
    """

    values: Float[Array, " N"]
    keep: Bool[Array, " N"]  # also True for a sample of weight 0
    empty: Bool[Array, ""]  # no sample has a weight; all are then equal


class Axis(NamedTuple):
    """Points in units of the bandwidth, relative to a common centre."""

    points: Float[Array, "N D"]
    squares: Float[Array, " N"]


def checked_points(function: str, **arrays: ArrayLike) -> tuple[Array, ...]:
    """Checked floating arrays (N, d); vectors are refused as ambiguous."""
    found = tuple(jnp.asarray(array) for array in arrays.values())
    for name, array in zip(arrays, found, strict=True):
        checks.require_floating(function, **{name: array})
        if array.ndim != 2 or 0 in array.shape:
            raise ValueError(
                f"{function}: `{name}` must have shape (N, d) with N and d at least 1, "
                f"got {array.shape}. Numbers are points of one axis: `{name}[:, None]`."
            )
    return found


def check_row_chunk(function: str, row_chunk: int | None) -> None:
    if row_chunk is not None:
        checks.require_positive_integer(function, "row_chunk", row_chunk)


def weights_of(
    function: str,
    count: int,
    weights: ArrayLike | None,
    where: ArrayLike | None,
    dtype: DTypeLike,
    suffix: str = "",
) -> Weights:
    keep = jnp.ones(count, bool) if where is None else jnp.asarray(where)
    why = "one per sample"
    checks.require_boolean(function, **{f"where{suffix}": keep})
    checks.require_shape(function, f"where{suffix}", keep, (count,), why)
    values = keep.astype(dtype)
    if weights is not None:
        weights = jnp.asarray(weights)
        checks.require_floating(function, **{f"weights{suffix}": weights})
        checks.require_shape(function, f"weights{suffix}", weights, (count,), why)
        values = jnp.where(keep, weights, 0).astype(dtype)
    most = lax.stop_gradient(values.max(initial=0))
    empty = most == 0
    # An empty sample gets equal weights: finite sums, which the caller drops.
    values = jnp.where(empty, 1, values / jnp.where(empty, 1, most))
    return Weights(values / values.sum(), keep, empty)


def axes_of(weights: Weights, bandwidth: Scalar, *arrays: Array) -> tuple[Axis, ...]:
    """Arrays of one space, centred by the mean of the first, divided by the bandwidth.

    Centring keeps the digits of |a|² + |b|² - 2 ab. Distances do not depend on the
    centre, so it has no derivative.
    """
    dtype = accumulator_dtype(*arrays, weights.values)
    weighted = weights.values[:, None] * arrays[0].astype(dtype)
    centre = lax.stop_gradient(weighted.sum(0))

    def axis(array: Array) -> Axis:
        shifted, unit = promoted(array.astype(dtype) - centre[None], bandwidth)
        shifted = shifted / unit
        return Axis(shifted, (shifted**2).sum(-1))

    return tuple(axis(array) for array in arrays)


def select(weights: Weights, array: Array) -> Array:
    """`array`, 0 for samples that are dropped or not finite at weight 0.

    To be applied before any arithmetic: 0 * NaN is NaN.
    """
    keep = weights.keep & ((weights.values != 0) | jnp.isfinite(array).all(-1))
    return jnp.where(keep[:, None], array, 0)


def log_kernel_row(row: Axis, others: Axis, index: Array | None) -> Float[Array, " N"]:
    """-|a - b|² / 2 of one point and all others; exactly 0 at the point's own index."""
    product = jnp.dot(others.points, row.points, precision=lax.Precision.HIGHEST)
    squared = jnp.maximum(row.squares + others.squares - 2 * product, 0)
    if index is not None:
        own = jnp.arange(others.squares.shape[0]) == index
        squared = jnp.where(own, 0, squared)
    return -squared / 2


@compiled_once(0, 3)
def over_rows(
    function: Callable[..., Any], common: Any, rows: Any, row_chunk: int | None
) -> Any:
    """Maps `function(common, index, *row)` over rows, `row_chunk` of them at a time.

    `function` must be module-level: one defined in a call is compiled in every call.
    """
    count = jax.tree.leaves(rows)[0].shape[0]
    indexed = (jnp.arange(count), *rows)
    of_row = lambda row: function(common, *row)
    if row_chunk is None:
        return jax.vmap(of_row)(indexed)
    # Without the checkpoint the kernels of all chunks are kept for the backward pass.
    return lax.map(jax.checkpoint(of_row), indexed, batch_size=row_chunk)


def mean_log(weights: Weights, values: Float[Array, " N"]) -> Float[Array, ""]:
    """The logarithm of the weighted mean of e^values.

    Unlike that of `logsumexp`, its derivative by a weight of 0 is right.
    """
    w = weights.values
    some = w != 0
    top = lax.stop_gradient(jnp.where(some, values, -jnp.inf).max(initial=-jnp.inf))
    top = jnp.where(jnp.isfinite(top), top, 0)
    # A value of weight 0 may be so far above the others that e^value overflows.
    most = math.log(float(jnp.finfo(values.dtype).max)) / 2
    above = values - top
    total = (w * jnp.exp(jnp.where(some, above, jnp.minimum(above, most)))).sum()
    return top + jnp.log(total)
