"""Softmax and logsumexp of all rows at once, or of blocks of rows in turn.

XLA passes over all rows three times, to find the maximum, the sum and the result. An
array that does not fit the cache is read three times from memory, a block only once.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from softlib._dispatch import Implementation, Operation
from softlib._dtypes import accumulator_dtype
from softlib._sharding import automatic_axes

from . import _kernels as kernels

type Axes = tuple[int, ...]

# Elements of a block: few enough for the shared cache, enough for all cores.
STEP = 1 << 20
# XLA is as fast with fewer elements than this, measured on a CPU with 32 MiB of cache.
LEAST = 1 << 25


class Options(NamedTuple):
    """Static options: the axes of a row, and the dtype of the result."""

    axes: Axes
    dtype: Any


class Rows(NamedTuple):
    """The scores as an operand; entries that do not count are -inf.

    They may be narrower than the sums.
    """

    z: Array

    @property
    def wide(self) -> Array:
        """The scores in the dtype of the sums."""
        return self.z.astype(accumulator_dtype(self.z))


def _softmax(options: Options, operands: Rows) -> Array:
    return softmax_of(options.axes, operands.wide).astype(options.dtype)


def _logsumexp(options: Options, operands: Rows) -> Array:
    return logsumexp_of(options.axes, operands.wide)


def softmax_of(axes: Axes, z: Array) -> Array:
    y = jnp.exp(z - row_max(axes, z))
    # The largest entry adds 1, so only the sum of an empty row is below it. For arrays
    # of one column XLA vectorises `maximum` but not `where`.
    return y / jnp.maximum(y.sum(axes, keepdims=True), 1)


def logsumexp_of(axes: Axes, z: Array) -> Array:
    """The logsumexp: -inf for a row without scores above -inf, +inf for one with it."""
    top = row_max(axes, z)
    total = jnp.exp(z - top).sum(axes)
    top, empty = jnp.squeeze(top, axes), total == 0
    lse = top + jnp.log(jnp.where(empty, 1, total))
    return jnp.where(top == jnp.inf, jnp.inf, jnp.where(empty, -jnp.inf, lse))


def row_max(axes: Axes, z: Array) -> Array:
    """The maximum of each row with axes kept; the least finite number if it is -inf.

    The reduction starts from that number: a `where` after it would keep XLA on CPUs
    from using its fused kernel for exp(z - max(z)).
    """
    least = jnp.asarray(jnp.finfo(z.dtype).min, z.dtype)
    if all(z.shape[axis] == 1 for axis in axes):  # XLA would drop the start value
        return jnp.maximum(z, least)
    return jnp.expand_dims(lax.reduce(z, least, lax.max, axes), axes)


def _logsumexp_by_blocks(options: Options, operands: Rows) -> Array:
    axes, z = options.axes, operands.z
    rows = z.shape[: -len(axes)]
    flat = z.reshape(-1, *z.shape[len(rows) :])
    own = tuple(range(1, flat.ndim))
    step = _rows_of_a_step(axes, z)
    one = lambda block: logsumexp_of(own, Rows(block).wide)
    whole = len(flat) // step * step
    blocks = flat[:whole].reshape(-1, step, *flat.shape[1:])
    found = lax.map(one, blocks).reshape(whole)
    if whole < len(flat):
        found = jnp.concatenate([found, one(flat[whole:])])
    return found.reshape(rows)


def _softmax_in_place(options: Options, operands: Rows) -> Array:
    axes, z = options.axes, operands.wide
    rows = z.shape[: -len(axes)]
    flat = z.reshape(-1, *z.shape[len(rows) :])
    own = tuple(range(1, flat.ndim))
    step = _rows_of_a_step(axes, z)

    def visit(i: Array, y: Array, size: int = step) -> Array:
        block = softmax_of(own, lax.dynamic_slice_in_dim(y, i * step, size))
        return lax.dynamic_update_slice_in_dim(y, block, i * step, 0)

    count, rest = divmod(len(flat), step)
    flat = lax.fori_loop(0, count, visit, flat)
    if rest:
        flat = visit(jnp.asarray(count), flat, rest)
    return flat.reshape(z.shape).astype(options.dtype)


def _rows_of_a_step(axes: Axes, z: Array) -> int:
    count = _count(axes, z)
    return max(1, min(count, STEP // max(1, z.size // max(1, count))))


def _count(axes: Axes, z: Array) -> int:
    return math.prod(z.shape[: z.ndim - len(axes)])


def _not_rows(options: Options, operands: Rows) -> str | None:
    axes = options.axes
    ndim = operands.z.ndim
    if axes != tuple(range(ndim - len(axes), ndim)) or len(axes) == ndim:
        return f"the axes {axes} of a row are not the last of {ndim}"
    if operands.z.size == 0:
        return "the array is empty"
    free = automatic_axes(operands)
    if free:
        return f"mesh axis {free[0]!r} is not manual, and rows may lie on any device"
    return None


def _not_worth_it(options: Options, operands: Rows) -> str | None:
    axes = options.axes
    size = operands.z.size
    if size < LEAST:
        return f"{size} elements are too few to gain by it"
    if _count(axes, operands.z) < 2 * _rows_of_a_step(axes, operands.z):
        return "there are too few rows"
    return _not_rows(options, operands)


SOFTMAX = Operation(
    "softmax",
    (
        *kernels.implementations("softmax"),
        Implementation("xla", _softmax),
        # Only by name: only the caller knows that the argument is donated.
        Implementation("in_place", _softmax_in_place, _not_rows),
    ),
)
LOGSUMEXP = Operation(
    "logsumexp",
    (
        *kernels.implementations("logsumexp"),
        Implementation(
            "xla_blocks", _logsumexp_by_blocks, _not_worth_it, platform="cpu"
        ),
        Implementation("xla", _logsumexp),
    ),
)
