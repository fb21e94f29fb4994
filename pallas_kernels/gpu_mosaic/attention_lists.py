"""Which tiles attend to which, as the lists that attention kernels walk along.

A tile of queries has a list of tiles of keys: first those in which every pair attends,
then those in which the mask is evaluated. Seen from the keys it is the same with rows
and columns exchanged. The lists lie one after the other in one array.
"""

from typing import Any, NamedTuple

import numpy as np


class Lists(NamedTuple):
    """One list per tile, both arrays int32.

    Attributes:
        others: The tiles that are listed, all lists one after the other; at least one
            entry, which need not belong to a list.
        tiles: (tiles, 4): a tile, where its list starts, where those begin in which the
            mask is evaluated, and where it ends. The longest lists come first, so that
            no long one is left for the end. A list may be empty.
    """

    others: Any
    tiles: Any


def lists(whole: np.ndarray, partial: np.ndarray, tiles: int) -> Lists:
    """Lists from pairs of tiles, (2, n) each: all pairs attend, or the mask decides.

    `tiles`: how many there are of the kind that comes first in a pair. For the lists of
    the other kind pass the pairs upside down.
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
