"""Which blocks of (query, key, key) tuples a trilinear kernel visits, as lists.

A block holds tiles of keys of either axis, and a list says of every tile whether the
mask leaves all of its pairs with the queries, some, or none. So one step of a grid
fetches a large block, and the loop inside it skips what a narrow window leaves out.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

# Of a tile of pairs, as a mask classifies it.
NONE, SOME, ALL = 0, 1, 2
# Bits of a word: first and last block of an owner, then two per tile.
FIRST, LAST, KINDS = 1, 2, 2
# Tiles of both axes in one block, so that a word is a non-negative int32.
TILES = 14

# Kind of (query start, stop, key start, stop); of blocks of all three axes by index.
type Status = Callable[..., np.ndarray]

type Predicate = Callable[..., Any]

_AT_ONCE = 1 << 20


class Masks(NamedTuple):
    """Static predicates on positions; None where everything attends.

    Attributes:
        first: Of (query, first key).
        second: Of (query, second key).
        joint: Of all three.
    """

    first: Predicate | None = None
    second: Predicate | None = None
    joint: Predicate | None = None


class Axis(NamedTuple):
    """The pairs of queries and one key axis, as far as the mask leaves them.

    Attributes:
        rows: Tile of queries of each block of keys that is not NONE, in order.
        blocks: Its place along the keys.
        kinds: Of its tiles, (blocks listed, tiles of a block).
        grid: How many tiles of queries and blocks of keys there are.
    """

    rows: np.ndarray
    blocks: np.ndarray
    kinds: np.ndarray
    grid: tuple[int, int]

    @property
    def per_row(self) -> np.ndarray:
        """Blocks, and tiles, that each tile of queries visits: (2, rows)."""
        tiles = (self.kinds != NONE).sum(1)
        return np.stack(
            [
                np.bincount(self.rows, weights, self.grid[0]).astype(np.int64)
                for weights in (np.ones_like(tiles), tiles)
            ]
        )


def axis(
    status: Status, lengths: tuple[int, int], query: int, tile: int, count: int
) -> Axis:
    """Classifies the tiles of one key axis.

    Args:
        status: Of the mask.
        lengths: Of queries and keys.
        query: Queries of a tile.
        tile: Keys of a tile.
        count: Tiles of a block.
    """
    block = tile * count
    grid = (-(-lengths[0] // query), -(-lengths[1] // block))
    parts = [np.zeros((2, 0), np.int64)]
    step = max(1, _AT_ONCE // max(grid[1], 1))
    for start in range(0, grid[0], step):
        row = np.arange(start, min(start + step, grid[0]))[:, None]
        column = np.arange(grid[1])[None]
        kinds = _kinds(status, lengths, (row, query), (column, block))
        found = np.stack(np.nonzero(kinds != NONE))
        parts.append(found + np.array([[start], [0]]))
    rows, blocks = np.concatenate(parts, 1)
    tiles = blocks[:, None] * count + np.arange(count)
    kinds = _kinds(status, lengths, (rows[:, None], query), (tiles, tile))
    some = (kinds != NONE).any(1)
    return Axis(rows[some], blocks[some], kinds[some], grid)


def _kinds(
    status: Status,
    lengths: tuple[int, int],
    queries: tuple[np.ndarray, int],
    keys: tuple[np.ndarray, int],
) -> np.ndarray:
    """Of tiles, given by index and size; NONE beyond the keys, SOME across the end."""
    (row, query), (column, key) = queries, keys
    starts, stops = column * key, (column + 1) * key
    # A tile beyond the end is classified as the last key, and the answer not used.
    inside = np.minimum(starts, lengths[1] - 1)
    kinds = status(
        row * query,
        np.minimum((row + 1) * query, lengths[0]),
        inside,
        np.minimum(stops, lengths[1]),
    )
    shape = np.broadcast_shapes(row.shape, column.shape)
    kinds = np.broadcast_to(np.asarray(kinds, np.int8), shape)
    kinds = np.where(stops > lengths[1], np.minimum(kinds, SOME), kinds)
    return np.where(starts >= lengths[1], NONE, kinds)


class Visits(NamedTuple):
    """Blocks in the order in which they are visited, int32, one entry per block.

    Attributes:
        rows: Tile of queries.
        firsts: Block of keys of the first axis.
        seconds: Block of keys of the second axis.
        words: `FIRST` and `LAST`, the kinds of the tiles of the first axis, then those
            of the second.
    """

    rows: np.ndarray
    firsts: np.ndarray
    seconds: np.ndarray
    words: np.ndarray


def visits(
    first: Axis, second: Axis, owner: int, joint: Status | None = None
) -> Visits:
    """Lists the blocks that are not NONE, and one for each owner that has none.

    Args:
        first: The first key axis.
        second: The second, of the same tiles of queries.
        owner: 0 for all blocks of a tile of queries after each other, 1 and 2 for those
            of a block of the first and of the second key axis.
        joint: Kind of blocks `(rows, firsts, seconds)` under what relates all axes.
    """
    counts = (first.kinds.shape[1], second.kinds.shape[1])
    if sum(counts) > TILES:
        raise ValueError(f"a block must have at most {TILES} tiles, got {counts}")
    one, two = _pairs(first, second)
    at = np.stack([first.rows[one], first.blocks[one], second.blocks[two]])
    seconds = second.kinds
    if joint is not None:
        left = joint(*at) != NONE
        at, one, two = at[:, left], one[left], two[left]
        # A tile of pairs proves nothing then: masks are evaluated on tuples.
        seconds = np.minimum(seconds, SOME)
    words = _packed(first.kinds[one], 0) + _packed(seconds[two], counts[0])
    # Owners without a block have results too: zeros, written by a step that skips.
    owners = (first.grid[0], first.grid[1], second.grid[1])[owner]
    idle = np.setdiff1d(np.arange(owners), at[owner])
    nothing = np.zeros((3, idle.size), np.int64)
    nothing[owner] = idle
    at = np.concatenate([at, nothing], 1)
    words = np.concatenate([words, np.zeros(idle.size, np.int64)])
    order = np.lexsort((at[2], at[1], at[0], at[owner]))
    at, words = at[:, order], words[order]
    starts = np.diff(at[owner], prepend=-1) != 0
    stops = np.diff(at[owner], append=owners) != 0
    words = words + FIRST * starts + LAST * stops
    return Visits(*(x.astype(np.int32) for x in (*at, words)))


def _pairs(first: Axis, second: Axis) -> tuple[np.ndarray, np.ndarray]:
    """Of every tile of queries all pairs of its blocks, as places in both lists."""
    some, others = (axis.per_row[0] for axis in (first, second))
    # Each block of the first axis with all that its row has of the second.
    times = others[first.rows]
    one = np.repeat(np.arange(first.rows.size), times)
    starts = (np.cumsum(others) - others)[first.rows]
    before = np.cumsum(times) - times
    two = np.arange(one.size) - np.repeat(before - starts, times)
    assert one.size == (some * others).sum()
    return one, two


def _packed(kinds: np.ndarray, place: int) -> np.ndarray:
    """Two bits per tile, from tile `place` of the word on."""
    bits = KINDS + 2 * (place + np.arange(kinds.shape[-1]))
    return (kinds.astype(np.int64) << bits).sum(-1)
