"""Checks, axes and dtypes that all maps share, and entries that do not count.

A map works in the dtype of the sums, float32 or float64, and returns the dtype of its
argument. Entries where `where` is False, and scores of -inf, do not count: they get the
value 0 (-inf from the logarithm of a map) and the gradient 0. A row without an entry
that counts is 0 everywhere. NaN and +inf make their row NaN.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array

from softlib import _checks as checks
from softlib._dtypes import accumulator_dtype

type Axis = int | tuple[int, ...] | None


class Entries(NamedTuple):
    """The checked arguments of a map.

    Attributes:
        x: In the dtype of the sums; entries that do not count may hold anything.
        axes: The axes of a row, ascending and not negative.
        where: True for entries that count, in the shape of `x`; None for all.
        dtype: The dtype of the result.
    """

    x: Array
    axes: tuple[int, ...]
    where: Array | None
    dtype: Any

    @classmethod
    def of(
        cls,
        function: str,
        x: Array,
        axis: Axis,
        where: Array | None = None,
        name: str = "x",
    ) -> "Entries":
        checks.require_floating(function, **{name: x})
        checks.require_axes(function, "axis", axis, x.ndim)
        if where is not None:
            checks.require_boolean(function, where=where)
            why = f"the shape of `{name}`"
            checks.require_broadcastable(function, "where", where, x.shape, why)
            where = jnp.broadcast_to(
                where.reshape((1,) * (x.ndim - where.ndim) + where.shape), x.shape
            )
        every = range(x.ndim) if axis is None else axis
        every = (every,) if isinstance(every, int) else every
        axes = tuple(sorted(each % x.ndim for each in every))
        return cls(x.astype(accumulator_dtype(x)), axes, where, x.dtype)

    @property
    def scores(self) -> Array:
        """The entries, -inf where they do not count."""
        return self.given_scores(self.x)

    def given_scores(self, x: Array) -> Array:
        """`scores` of the argument as it was given, in its own dtype."""
        return x if self.where is None else jnp.where(self.where, x, -jnp.inf)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Sizes of the axes that are not those of a row."""
        return tuple(n for i, n in enumerate(self.x.shape) if i not in self.axes)

    @property
    def size(self) -> int:
        """Number of entries of a row."""
        return math.prod(self.x.shape[axis] for axis in self.axes)

    def result(self, y: Array) -> Array:
        return y.astype(self.dtype)

    def rows(self, y: Array) -> Array:
        """Reshapes an array in the shape of `x` to (*rows, V)."""
        y = jnp.moveaxis(y, self.axes, range(-len(self.axes), 0))
        return y.reshape(*y.shape[: y.ndim - len(self.axes)], self.size)

    def unrows(self, y: Array) -> Array:
        """The inverse of `rows`."""
        y = y.reshape(*self.row_shape, *(self.x.shape[axis] for axis in self.axes))
        return jnp.moveaxis(y, range(-len(self.axes), 0), self.axes)

    def per_row(self, function: str, name: str, value: ArrayLike) -> Array:
        """A per-row option in the dtype of the sums; its axes broadcast to the rows."""
        value = jnp.asarray(value)
        checks.require_floating(function, **{name: value})
        why = "a number, or one value per row"
        checks.require_broadcastable(function, name, value, self.row_shape, why)
        axes = (1,) * (len(self.row_shape) - value.ndim) + value.shape
        return value.reshape(axes).astype(self.x.dtype)

    def beside(self, value: Array) -> Array:
        """A result of `per_row`, with axes of length 1 for those of a row."""
        return jnp.expand_dims(value, self.axes)


def moderating(size: Array) -> Array:
    """A power of two that scales numbers of this size away from overflow; mostly 1.

    The reciprocal of one of the largest numbers is subnormal, which a processor may
    flush to 0, and the sum of two overflows.
    """
    half = float(2.0 ** (jnp.finfo(size.dtype).maxexp // 2))
    return jnp.where(size > half, 1 / half, 1).astype(size.dtype)
