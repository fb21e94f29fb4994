"""Products of tiles on the matrix unit, which multiplies numbers of bfloat16.

A number of float32 is the sum of three of bfloat16, each with 8 of its 24 bits. Left to
the compiler, a product of float32 is divided anew for every block of it, in registers
that it does not have; here a tile is divided once.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels._devices import V4, V5E, V5P, tpu

# Bits of float32 that bfloat16 has.
_UPPER = 0xFFFF0000
_COUNTS = {lax.Precision.HIGHEST: 3, lax.Precision.HIGH: 2, lax.Precision.DEFAULT: 1}

# From the rows and columns of a part of a factor to what it holds.
type Factor = Callable[[Any], Any]


def part_count(dtype: Any, precision: lax.Precision) -> int:
    """How many numbers of bfloat16 stand for one of the dtype."""
    return 1 if dtype == jnp.bfloat16 else _COUNTS[precision]


def parts_of(x: Any, count: int) -> Iterator[Any]:
    """Numbers of bfloat16, the largest first; their sum is x if they are three."""
    for _ in range(count - 1):
        # Rounding to bfloat16 and back would be simplified away by some compilers.
        bits = lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(_UPPER)
        upper = lax.bitcast_convert_type(bits, jnp.float32)
        yield upper.astype(jnp.bfloat16)
        x = x - upper
    yield x.astype(jnp.bfloat16)


def pairs(counts: tuple[int, int]) -> list[tuple[int, int]]:
    """The products of parts that reach the bits of float32.

    The smallest first: they are rounded off least.
    """
    every = [(i, j) for i in range(counts[0]) for j in range(counts[1])]
    enough = (pair for pair in every if sum(pair) < max(counts))
    return sorted(enough, key=sum, reverse=True)


def product(first: Any, second: Any, contract: tuple[int, int]) -> Any:
    return lax.dot_general(
        first,
        second,
        (((contract[0],), (contract[1],)), ((), ())),
        # Any other precision is refused for bfloat16.
        precision=lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def each_block(
    shape: tuple[int, int], visit: Callable[[Any, Any], None], *, turned: bool = False
) -> None:
    """Calls `visit` with the rows and columns of blocks that cover a product.

    A product of a whole tile is cut by the compiler so that sums spill. `turned` where
    the first factor has to be transposed on the way.
    """
    device = tpu()
    # The tallest that leave nothing to spill, read from compiled programs.
    tall = 128 if turned else {V5E: 256, V5P: 256, V4: 32}.get(device, 128)
    for row_start, row_size, row_count in cut(shape[0], tall):
        for start, size, count in cut(shape[1], device.matrix_unit):

            def step(
                i: Any,
                _: None,
                at: Any = (row_start, row_size, start, size, count),
            ) -> None:
                row_start, row_size, start, size, count = at
                row, column = i, 0
                if count > 1:
                    row, column = lax.div(i, count), lax.rem(i, count)
                visit(
                    span(row_start, row * row_size, row_size),
                    span(start, column * size, size),
                )

            lax.fori_loop(0, row_count * count, step, None)


def split(
    source: Any, parts: Any, prepare: Callable[[Any, Any], Any], size: int = 16
) -> None:
    """Divides a tile, some rows at a time, which `prepare` sees with their start."""
    rows, count = source.shape[0], parts.shape[0]

    def some(start: Any, size: int) -> None:
        at = span(0, start, size)
        for i, part in enumerate(parts_of(prepare(source[at, :], start), count)):
            parts[i, at, :] = part

    lax.fori_loop(0, rows // size, lambda i, _: some(i * size, size), None)
    if rows % size:
        some(rows // size * size, rows % size)


def cut(length: int, size: int) -> list[tuple[int, int, int]]:
    """(start, size, number) of the whole blocks and of the rest."""
    whole, rest = divmod(length, size)
    parts = [(0, size, whole)] if whole else []
    return [*parts, (whole * size, rest, 1)] if rest else parts


def span(start: int, offset: Any, size: int) -> Any:
    return pl.ds(pl.multiple_of(start + offset, math.gcd(start, size) or 1), size)
