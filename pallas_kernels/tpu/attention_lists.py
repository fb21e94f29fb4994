"""The blocks that an attention kernel visits, as a flat list that fits scalar memory.

A grid step is an entry of the list, and index maps read it: only listed blocks are
fetched, and the pipeline of the grid prefetches the next one. An entry is one int32:

    row (13 bits) | column (13) | kind (2) | first of its row (1) | last of its row (1)

"Row" is the axis that owns the results: queries for the output and the gradient of the
queries, keys for the gradients of keys and values.
"""

import dataclasses
from typing import Any

import numpy as np
from jax import lax

# Most blocks along an axis: 13 bits.
MOST_BLOCKS = 1 << 13
# Most entries of one call: a quarter of the megabyte of scalar memory.
MOST_ENTRIES = 1 << 16
NOTHING, SOME, ALL = 0, 1, 2


def lists(
    rows: np.ndarray,
    columns: np.ndarray,
    whole: np.ndarray,
    row_count: int,
    *,
    most_entries: int = MOST_ENTRIES,
) -> np.ndarray:
    """Lists of at most `most_entries` entries, (lists, entries); rows are not divided.

    Args:
        rows: Row of each visited block, in any order.
        columns: Column of each visited block.
        whole: Whether every pair of the block attends.
        row_count: Number of rows. One without blocks gets an entry that computes
            nothing but writes its results.
        most_entries: At least the number of columns.

    Returns:
        int32. Shorter lists end in entries that do nothing.
    """
    empty = np.setdiff1d(np.arange(row_count), rows)
    kinds = np.where(whole, ALL, SOME)
    rows = np.concatenate([rows, empty]).astype(np.int32)
    columns = np.concatenate([columns, np.zeros_like(empty)]).astype(np.int32)
    kinds = np.concatenate([kinds, np.full_like(empty, NOTHING)]).astype(np.int32)
    order = np.lexsort((columns, rows))
    rows, columns, kinds = rows[order], columns[order], kinds[order]
    borders = np.diff(rows, prepend=-1, append=row_count) != 0
    first, last = borders[:-1], borders[1:]
    entries = _packed(rows, columns, kinds, first, last)

    # Each list takes as many whole rows as fit.
    stops = np.flatnonzero(last) + 1
    divided, start = [], 0
    while start < len(entries):
        fitting = stops[(stops > start) & (stops <= start + most_entries)]
        stop = int(fitting[-1])
        divided.append(entries[start:stop])
        start = stop
    length = max(map(len, divided))
    found = np.empty((len(divided), length), np.int32)
    for out, one in zip(found, divided, strict=True):
        out[: len(one)] = one
        # Padding repeats the blocks of the last entry, which need no copy.
        out[len(one) :] = one[-1] & ~_FLAGS
    return found


_FLAGS = 0b1111


def _packed(
    rows: np.ndarray,
    columns: np.ndarray,
    kinds: np.ndarray,
    first: np.ndarray,
    last: np.ndarray,
) -> np.ndarray:
    return (rows << 17) | (columns << 4) | (kinds << 2) | (first << 1) | last


@dataclasses.dataclass(frozen=True)
class Entry:
    """An entry of a list, as read by a kernel."""

    packed: Any

    @property
    def row(self) -> Any:
        return lax.shift_right_logical(self.packed, 17)

    @property
    def column(self) -> Any:
        return lax.shift_right_logical(self.packed, 4) & (MOST_BLOCKS - 1)

    @property
    def kind(self) -> Any:
        return lax.shift_right_logical(self.packed, 2) & 3

    @property
    def is_first(self) -> Any:
        return (self.packed & 2) != 0

    @property
    def is_last(self) -> Any:
        return (self.packed & 1) != 0
