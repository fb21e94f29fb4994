"""Which tiles a trilinear kernel visits, as the runs that its warpgroups walk along.

A block of threads owns a tile of results. For each tile that it streams through shared
memory there is a run: the pairs of keys of the first axis that are multiplied in while
that tile is there. So the large tile is fetched once for all of them.
"""

from typing import Any, NamedTuple

import numpy as np

from pallas_kernels._trilinear import ALL, KINDS, NONE, Visits


class Runs(NamedTuple):
    """Runs of all tiles that own results, int32.

    Attributes:
        pairs: Which pair of keys of the first axis each step multiplies in, one run
            after the other; at least one entry, which need not belong to a run.
        runs: (runs, 3): the tile that is streamed, and between which steps of its owner
            it is there; at least one row.
        tiles: (tiles, 6): a tile of results, where its runs start, where those begin in
            which the mask of the second axis is evaluated, and where they end; where
            its steps start in `pairs`, and how many there are. Those with the most come
            first, so that no long one is left for the end.
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
        owners: How many tiles own results.
    """
    kinds = visits.words[:, None] >> (KINDS + 2 * np.arange(count + 1)) & 3
    firsts, second = kinds[:, :count], kinds[:, count]
    block, place = np.nonzero((firsts != NONE) & (second != NONE)[:, None])
    pair = visits.firsts[block] * count + place
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
