"""Lists of the tiles that attention kernels visit.

A tile of queries has a list of tiles of keys: first those in which every pair attends,
then those in which the mask is evaluated. For tiles of keys, rows and columns are
exchanged. All lists are concatenated in one array.
"""

from typing import Any, NamedTuple

import numpy as np


class Lists(NamedTuple):
    """One list per tile, both arrays int32.

    Attributes:
        others: The listed tiles of all lists, concatenated; at least one entry, which
            need not belong to a list.
        tiles: (tiles, 4): a tile, the start of its list, the start of masked tiles in
            it, and its end. The longest lists come first, to balance the load. A list
            may be empty.
    """

    others: Any
    tiles: Any


def lists(whole: np.ndarray, partial: np.ndarray, tiles: int) -> Lists:
    """Lists from (2, n) pairs of tiles: `whole`, or `partial` with the mask evaluated.

    Lists belong to the first tile of a pair; `tiles` is the number of these. For lists
    of the second tiles, flip the pairs.
    """
    kinds = np.repeat(np.arange(2), (whole.shape[1], partial.shape[1]))
    rows, columns = np.concatenate([whole, partial], axis=1)
    order = np.lexsort((columns, kinds, rows))
    counts = np.bincount(rows, minlength=tiles)
    stop = np.cumsum(counts)
    start = stop - counts
    some = start + np.bincount(whole[0], minlength=tiles)
    longest = np.argsort(-counts, kind="stable")
    table = np.stack([np.arange(tiles), start, some, stop], axis=1)[longest]
    others = columns[order] if len(columns) else np.zeros(1)
    return Lists(others.astype(np.int32), table.astype(np.int32))
