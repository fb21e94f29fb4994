"""Lists of the blocks of (query, key, key) tuples that a trilinear kernel visits.

A block holds tiles of keys of either axis, and a list says for every tile whether the
mask leaves all of its pairs with the queries, some, or none. So one step of the grid
fetches a large block, and the loop inside skips tiles that a narrow window leaves out.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

# The kind of a tile of pairs: its status under the mask.
NONE, SOME, ALL = 0, 1, 2
# Bits of a word: first and last block of an owner, then two bits per tile.
FIRST, LAST, KINDS = 1, 2, 2
# Most tiles of both axes in one block, so that a word is a non-negative int32.
TILES = 14

# Kind of a tile by (query start, stop, key start, stop); of a block by three indices.
type Status = Callable[..., np.ndarray]

type Predicate = Callable[..., Any]

_AT_ONCE = 1 << 20


class Masks(NamedTuple):
    """Static predicates on positions; None where everything attends.

    Attributes:
        first: Predicate of (query, first key).
        second: Predicate of (query, second key).
        joint: Predicate of all three.
    """

    first: Predicate | None = None
    second: Predicate | None = None
    joint: Predicate | None = None


class Axis(NamedTuple):
    """The pairs of queries and keys of one axis that the mask leaves.

    Attributes:
        rows: Tile of queries of each block of keys that is not NONE, in order.
        blocks: Index of the block of keys.
        kinds: Kinds of its tiles, (blocks listed, tiles of a block).
        grid: Numbers of tiles of queries and of blocks of keys.
    """

    rows: np.ndarray
    blocks: np.ndarray
    kinds: np.ndarray
    grid: tuple[int, int]

    @property
    def per_row(self) -> np.ndarray:
        """Numbers of blocks and tiles that each tile of queries visits: (2, rows)."""
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
        status: Kinds of tiles under the mask.
        lengths: Numbers of queries and keys.
        query: Queries per tile.
        tile: Keys per tile.
        count: Tiles per block.
    """
    block = tile * count
    grid = (-(-lengths[0] // query), -(-lengths[1] // block))
    listed = [np.zeros((2, 0), np.int64)]
    step = max(1, _AT_ONCE // max(grid[1], 1))
    for start in range(0, grid[0], step):
        row = np.arange(start, min(start + step, grid[0]))[:, None]
        column = np.arange(grid[1])[None]
        kinds = _kinds(status, lengths, (row, query), (column, block))
        found = np.stack(np.nonzero(kinds != NONE))
        listed.append(found + np.array([[start], [0]]))
    rows, blocks = np.concatenate(listed, 1)
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
    """Kinds of tiles, by index and size; NONE beyond the keys, SOME across the end."""
    (row, query), (column, key) = queries, keys
    starts, stops = column * key, (column + 1) * key
    # A tile beyond the end is classified as the last key; its kind is not used.
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
    """Blocks in the order of their visits, int32, one entry per block.

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
        owner: Sorts blocks by tile of queries (0), or by block of the first (1) or the
            second (2) key axis.
        joint: Kind of blocks `(rows, firsts, seconds)` under the joint mask.
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
        # Tiles of pairs are never ALL then: the joint mask is evaluated on tuples.
        seconds = np.minimum(seconds, SOME)
    words = _packed(first.kinds[one], 0) + _packed(seconds[two], counts[0])
    # The results of owners without a block are zeros, written by a step that skips.
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
    """All pairs of blocks of every tile of queries, as indices into both lists."""
    some, others = (axis.per_row[0] for axis in (first, second))
    # Each block of the first axis with all blocks of the second in its row.
    times = others[first.rows]
    one = np.repeat(np.arange(first.rows.size), times)
    starts = (np.cumsum(others) - others)[first.rows]
    before = np.cumsum(times) - times
    two = np.arange(one.size) - np.repeat(before - starts, times)
    assert one.size == (some * others).sum()
    return one, two


def _packed(kinds: np.ndarray, start: int) -> np.ndarray:
    """Kinds packed into words, two bits per tile, from tile `start` of the word on."""
    bits = KINDS + 2 * (start + np.arange(kinds.shape[-1]))
    return (kinds.astype(np.int64) << bits).sum(-1)
