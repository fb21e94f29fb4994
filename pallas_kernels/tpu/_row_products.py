"""Products of tiles on the matrix unit, in blocks that do not spill registers.

The compiler would split float32 into bfloat16 parts again for every block, and spill
registers; here a tile is split once.
"""

import math
from collections.abc import Callable
from typing import Any

from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels._devices import V4, V5E, V5P, tpu

from .bfloat16_parts import parts_of

# Maps rows and columns of a bfloat16 part of a factor to its values.
type Factor = Callable[[Any], Any]


def each_block(
    shape: tuple[int, int],
    visit: Callable[[Any, Any], None],
    *,
    turned: bool = False,
    masked: bool = False,
) -> None:
    """Calls `visit` with the rows and columns of blocks that cover a product.

    In a product of a whole tile the compiler spills sums. `turned` says that the first
    factor is transposed on the way, `masked` that lanes of the second one are masked.
    """
    device = tpu()
    # The tallest blocks that do not spill, read from compiled programs.
    tall = 128 if turned else {V5E: 256, V5P: 256, V4: 32}.get(device, 128)
    for row_start, row_size, row_count in cut(shape[0], tall):
        for start, size, count in cut(shape[1], 128 if masked else device.matrix_unit):

            def step(
                i: Any,
                _: None,
                at: Any = (row_start, row_size, row_count, start, size, count),
            ) -> None:
                row_start, row_size, row_count, start, size, count = at
                # Numbers where they can be: a remainder begins at a multiple of tiles,
                # which the compiler does not see in an index times its length.
                row = 0 if row_count == 1 else lax.div(i, count)
                column = 0 if count == 1 else lax.rem(i, count)
                visit(
                    span(row_start, row * row_size, row_size),
                    span(start, column * size, size),
                )

            lax.fori_loop(0, row_count * count, step, None)


def split(
    source: Any, parts: Any, prepare: Callable[[Any, Any], Any], size: int = 16
) -> None:
    """Splits a tile into bfloat16 parts, some rows at a time, after `prepare`."""
    rows, count = source.shape[0], parts.shape[0]

    def some(start: Any, size: int) -> None:
        at = span(0, start, size)
        for i, part in enumerate(parts_of(prepare(source[at, :], start), count)):
            parts[i, at, :] = part

    lax.fori_loop(0, rows // size, lambda i, _: some(i * size, size), None)
    if rows % size:
        some(rows // size * size, rows % size)


def cut(length: int, size: int) -> list[tuple[int, int, int]]:
    """(start, size, number) of the whole blocks and of the remainder."""
    whole, rest = divmod(length, size)
    blocks = [(0, size, whole)] if whole else []
    return [*blocks, (whole * size, rest, 1)] if rest else blocks


def span(start: int, offset: Any, size: int) -> Any:
    if isinstance(offset, int):
        return pl.ds(start + offset, size)
    return pl.ds(pl.multiple_of(start + offset, math.gcd(start, size) or 1), size)
