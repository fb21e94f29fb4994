"""Numbers that a mask reads per query and per key, besides positions.

Numbers lie along lanes in memory. In a tile of scores those of its columns stay there,
those of its rows are needed along sublanes: their block is turned once for each row of
blocks, into scratch in which all lanes are equal.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .attention_blocks import column
from .attention_pieces import chunk_of
from .attention_tiles import LANES, Tiles


class Reads(NamedTuple):
    """Numbers of a mask per position: arrays, or references in a kernel.

    Attributes:
        queries: int32 (b, n, T), where b is 1 or the number of batch entries; None for
            nothing.
        keys: int32 (b, m, S), likewise.
    """

    queries: Any = None
    keys: Any = None

    @property
    def arrays(self) -> list[Any]:
        return [x for x in self if x is not None]

    @property
    def counts(self) -> "Reads":
        """The same with the count of numbers per position in place of each array."""
        return Reads(*(None if x is None else x.shape[1] for x in self))

    def specs(self, tiles: Tiles, at: Callable[..., Any]) -> list[pl.BlockSpec]:
        """Block specs; `at` gives batch entry and blocks from the indices of a grid.

        The blocks are those of queries and of keys.
        """
        sizes = (tiles.query, tiles.key)
        return [
            _spec(x, side, size, at)
            for side, (x, size) in enumerate(zip(self, sizes, strict=True))
            if x is not None
        ]

    def taken(self, refs: list[Any]) -> "Reads":
        """References to those that exist, taken from the front of `refs`."""
        return Reads(*(None if x is None else refs.pop(0) for x in self))


def _spec(x: Any, side: int, size: int, at: Callable[..., Any]) -> pl.BlockSpec:
    entries, count, _ = x.shape

    def index(*grid: Any) -> Any:
        batch, *blocks = at(*grid)
        return (0 if entries == 1 else batch), 0, blocks[side]

    return pl.BlockSpec((None, count, size), index)


def scratch(count: int | None, size: int) -> list[Any]:
    """Scratch for the numbers of the rows of tiles of scores, in blocks of `size`."""
    return [] if count is None else [pltpu.VMEM((count, size, LANES), jnp.int32)]


def turn(ref: Any, out_ref: Any) -> None:
    """Puts the numbers of a block, along lanes, into scratch."""
    count, size = ref.shape

    def some(i: Any, _: None) -> None:
        rows = chunk_of(0, i, LANES)
        for n in range(count):
            out_ref[n, rows, :] = column(ref[n : n + 1, rows])

    lax.fori_loop(0, size // LANES, some, None)


def rows_of(turned_ref: Any, rows: Any) -> list[Any]:
    """Numbers of these rows of a block, (rows, 1) each."""
    if turned_ref is None:
        return []
    return [turned_ref[n, rows, :1] for n in range(turned_ref.shape[0])]


def columns_of(ref: Any, columns: Any) -> list[Any]:
    """Numbers of these columns of a block, (1, columns) each."""
    if ref is None:
        return []
    return [ref[n : n + 1, columns] for n in range(ref.shape[0])]
