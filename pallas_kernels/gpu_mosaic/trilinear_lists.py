"""Runs: the lists of tiles that a trilinear kernel visits.

A block of threads owns a tile of results. Each tile that it streams through shared
memory has a run: the pairs of keys of the first axis that are multiplied in with this
tile. So the large tile is fetched once for all of them.
"""

from typing import Any, NamedTuple

import numpy as np

from pallas_kernels._trilinear import ALL, KINDS, NONE, Visits


class Runs(NamedTuple):
    """Runs of all tiles that own results, int32.

    Attributes:
        pairs: The pair of keys of the first axis of each step, all runs concatenated;
            at least one entry, which need not belong to a run.
        runs: (runs, 3): the streamed tile, and its first and last step (exclusive)
            among those of its owner; at least one row.
        tiles: (tiles, 6): a tile of results, the start of its runs, the start of those
            in which the mask of the second axis is evaluated, and their end; the start
            of its steps in `pairs`, and their number. Tiles with the most steps come
            first, to balance the load.
    """

    pairs: Any
    runs: Any
    tiles: Any


def runs(visits: Visits, count: int, owner: int, owners: int) -> Runs:
    """The runs of the blocks of `visits`, each of one tile of the second axis.

    Args:
        visits: Blocks by their owner, whose tiles of the first axis are pairs of keys.
        count: Pairs in a block.
        owner: 0 if tiles of queries own the results and those of the second axis are
            streamed; 2 for the other way round.
        owners: Number of tiles that own results.
    """
    kinds = visits.words[:, None] >> (KINDS + 2 * np.arange(count + 1)) & 3
    firsts, second = kinds[:, :count], kinds[:, count]
    block, offset = np.nonzero((firsts != NONE) & (second != NONE)[:, None])
    pair = visits.firsts[block] * count + offset
    own, streamed = visits.rows[block], visits.seconds[block]
    if owner == 2:
        own, streamed = streamed, own
    partial = second[block] != ALL
    order = np.lexsort((pair, streamed, partial, own))
    own, partial, streamed, pair = (x[order] for x in (own, partial, streamed, pair))

    of = lambda tiles: np.bincount(tiles, minlength=owners)
    before = lambda counts: np.cumsum(counts) - counts
    keys = np.stack([own, partial, streamed])
    start = np.flatnonzero((np.diff(keys, axis=1, prepend=-1) != 0).any(0))
    steps, has_runs, whole = of(own), of(own[start]), of(own[start][~partial[start]])
    own = own[start]
    first = before(steps)
    table = np.stack(
        [streamed[start], start, np.append(start[1:], pair.size)[: start.size]], axis=1
    )
    table[:, 1:] -= first[own, None]
    begin = before(has_runs)
    columns = [np.arange(owners), begin, begin + whole, begin + has_runs, first, steps]
    tiles = np.stack(columns, axis=1)[np.argsort(-steps, kind="stable")]
    pair = pair if pair.size else np.zeros(1)
    table = table if start.size else np.zeros((1, 3))
    return Runs(*(x.astype(np.int32) for x in (pair, table, tiles)))
