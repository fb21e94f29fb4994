"""Arithmetic of trilinear attention inside a kernel: rows, pieces, products.

A float32 array is split into bfloat16 pieces, see `bfloat16_parts`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from . import bfloat16_parts as parts_
from .trilinear_tiles import LANES


def spread(rows: jax.Array, factors: jax.Array) -> jax.Array:
    """Rows times each factor: (M, H), (J, H) -> (J * M, H)."""
    pieces = [rows * factors[j : j + 1] for j in range(factors.shape[0])]
    return jnp.concatenate(pieces, 0)


def gather(found: Sequence[jax.Array], factors: jax.Array) -> jax.Array:
    """The transpose of `spread`: (J * M, H), (J, H) -> (M, H)."""
    pieces = [piece * factors[j : j + 1] for j, piece in enumerate(found)]
    return functools.reduce(jnp.add, pieces)


def row_blocks(x: jax.Array, rows: int) -> list[jax.Array]:
    """Blocks of so many rows."""
    return [x[start : start + rows] for start in range(0, x.shape[0], rows)]


def along(column: jax.Array, like: Any) -> jax.Array:
    """One value per row, in all lanes of `column`, widened to the lanes of `like`."""
    width = like.shape[1]
    if width % LANES:
        return column[:, :1]
    return jnp.concatenate([column] * (width // LANES), 1)


def contract(left: Sequence[jax.Array], right: Sequence[jax.Array]) -> jax.Array:
    """The product left @ right.T of operands given as pieces."""
    return _dot(left, right, (1, 1))


def product(left: Sequence[jax.Array], right: Sequence[jax.Array]) -> jax.Array:
    """The product left @ right of operands given as pieces."""
    return _dot(left, right, (1, 0))


def _dot(
    left: Sequence[jax.Array], right: Sequence[jax.Array], axes: tuple[int, int]
) -> jax.Array:
    """One product of concatenated pieces, which fills a wider matrix unit."""
    pairs = parts_.pairs((len(left), len(right)))
    lhs = _joined([left[n] for n, _ in pairs], axes[0])
    rhs = _joined([right[m] for _, m in pairs], axes[1])
    return parts_.product(lhs, rhs, axes)


def _joined(pieces: list[jax.Array], axis: int) -> jax.Array:
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis)


def divided(x: jax.Array, count: int) -> list[jax.Array]:
    """Bfloat16 pieces that add up to x, with 8 bits each; a single one is rounded."""
    return list(parts_.parts_of(x, count))


def store(ref: Any, x: jax.Array) -> None:
    """Stores the pieces of `x`, as many as `ref` holds."""
    for n, piece in enumerate(divided(x, ref.shape[0])):
        ref[n] = piece


def load(ref: Any, own: Any = slice(None)) -> list[jax.Array]:
    return [ref[n, own] for n in range(ref.shape[0])]


def zeroed(x: jax.Array, start: Any, length: int) -> jax.Array:
    """`x`, whose first row has the index `start`, with 0 from row `length` on."""
    if length % x.shape[0] == 0:
        return x
    row = start + lax.broadcasted_iota(jnp.int32, (x.shape[0], 1), 0)
    return jnp.where(row < length, x, jnp.zeros_like(x))


def as_row(column: jax.Array) -> jax.Array:
    """Transposes (M, 1) to (1, M)."""
    return jnp.where(_diagonal(column.shape[0]), column, 0).sum(0, keepdims=True)


def as_column(row: jax.Array) -> jax.Array:
    """Transposes (1, M) to (M, 1)."""
    return jnp.where(_diagonal(row.shape[1]), row, 0).sum(1, keepdims=True)


def _diagonal(size: int) -> jax.Array:
    line = lambda axis: lax.broadcasted_iota(jnp.int32, (size, size), axis)
    return line(0) == line(1)


def quotient(x: jax.Array, size: int, count: int) -> Any:
    """The quotient x // size for 0 <= x < count * size, by comparisons."""
    if size & (size - 1) == 0:
        return lax.shift_right_logical(x, size.bit_length() - 1)
    steps = ((x >= size * n).astype(jnp.int32) for n in range(1, count))
    return functools.reduce(jnp.add, steps, jnp.zeros_like(x))
