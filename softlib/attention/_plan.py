"""Which blocks of a mask a stream visits: found on the host and cached."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from softlib import _checks as checks, masks
from softlib.masks import Block, Mask

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockPlan:
    """The blocks of (query, key) pairs that attention under a mask has to visit.

    A plan may be given to attention in the place of its mask. It is a pytree: passed as
    an argument of a compiled function its lists are operands instead of constants of
    the program, and plans with lists of equal lengths share a compilation.

    Args:
        mask: The mask, on the indices of `query` and `key`.
        whole: Row and column of the blocks in which every pair attends, row by row.
        partial: Row and column of the blocks in which the mask is evaluated.
        counts: None if the lists are full; else how many entries of `whole` and of
            `partial` count, because devices with lists of other lengths share them.
        lengths: Static numbers of queries and keys.
        blocks: Static sizes of a block.

    Example:
        >>> plan = softlib.attention.block_plan(softlib.masks.Causal(), 512, 512)
        >>> print(plan.density <= 1.0)
        True
    """

    # Any: transformations rebuild a plan from whatever stands for its arrays.
    mask: Any
    whole: Any
    partial: Any
    lengths: tuple[int, int] = dataclasses.field(metadata=_STATIC)
    blocks: tuple[int, int] = dataclasses.field(metadata=_STATIC)
    counts: Any = None

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks along the queries and along the keys."""
        (t, s), (q, k) = self.lengths, self.blocks
        return -(-t // q), -(-s // k)

    @property
    def visited(self) -> int:
        """How many blocks are visited."""
        return self.whole.shape[-1] + self.partial.shape[-1]

    @property
    def density(self) -> float:
        """The visited fraction of all blocks; what the time is proportional to."""
        rows, columns = self.grid
        return self.visited / max(rows * columns, 1)


def block_plan(
    mask: Mask | None,
    query_length: int,
    key_length: int,
    *,
    block_query: int | None = None,
    block_key: int | None = None,
    query_offset: int = 0,
) -> BlockPlan:
    """The blocks that attention under `mask` visits, as lists.

    The classification is the mask's own closed form: no token is visited. The result is
    cached on the mask and the shapes.

    Args:
        mask: A mask value; None for all pairs. Masks that hold arrays are evaluated
            wherever their arrays decide.
        query_length: Static number of queries.
        key_length: Static number of keys.
        block_query: Static queries per block; None chooses the size, out of 128, 256
            and 512, that costs least for this mask.
        block_key: Static keys per block; None as for `block_query`.
        query_offset: Static position of the first query.

    Returns:
        A `BlockPlan`, with lists of int32 in NumPy.

    Raises:
        TypeError: `mask` is no mask value, or a size is no Python int.
        ValueError: A block size is not positive, or a length is negative.

    Example:
        >>> window = softlib.masks.Window(127, 0)
        >>> sizes = {"block_query": 128, "block_key": 128}
        >>> plan = softlib.attention.block_plan(window, 1024, 1024, **sizes)
        >>> print(plan.visited, plan.grid)
        15 (8, 8)
    """
    mask = masks.All() if mask is None else mask
    if not isinstance(mask, Mask):
        raise TypeError(
            f"block_plan: `mask` must be a mask value or None, got "
            f"{type(mask).__name__}; wrap a NumPy array of blocks in masks.Blocks."
        )
    for name, size in (("query_length", query_length), ("key_length", key_length)):
        if size != 0:
            checks.require_positive_integer("block_plan", name, size)
    for name, size in (("block_query", block_query), ("block_key", block_key)):
        if size is not None:
            checks.require_positive_integer("block_plan", name, size)
    return plan_of(
        mask.shift(query_offset),
        (query_length, key_length),
        (block_query, block_key),
    )


def plan_of(
    mask: Mask,
    lengths: tuple[int, int],
    blocks: tuple[int | None, int | None] = (None, None),
    *,
    all_partial: bool = False,
    groups: int = 1,
) -> BlockPlan:
    """As `block_plan`; `all_partial` where something else decides in every block.

    `groups`: query heads per key head, whose scores exist together; with many of them
    blocks are smaller.
    """
    skeleton = Skeleton.of(mask)
    whole, partial, blocks = _lists(skeleton, lengths, blocks, all_partial, groups)
    return BlockPlan(mask, whole, partial, lengths, blocks)


class Skeleton(NamedTuple):
    """A mask without its arrays: hashable, and enough to classify blocks."""

    structure: Any
    leaves: int

    @classmethod
    def of(cls, mask: Mask) -> "Skeleton":
        leaves, structure = jax.tree.flatten(mask)
        return cls(structure, len(leaves))

    @property
    def mask(self) -> Mask:
        # The classification never looks at arrays: their places are enough.
        return jax.tree.unflatten(self.structure, [_PLACE] * self.leaves)


# Stands where an array of the mask stood.
_PLACE = object()

# Seconds per pair of a large block are 1; smaller blocks pay more for each step of the
# loop and for their narrower products. Measured on a CPU with d = 64.
_RATES = {512: 1.0, 256: 1.1, 128: 1.5}
# Evaluating the mask costs this fraction of a block's products.
_PARTIAL = 0.3
# Scores of one step beyond this leave the caches of most CPUs.
_SCORES = 1 << 20
# A grid with more cells than this is not classified only to choose a size.
_GRID = 1 << 22


@functools.lru_cache(maxsize=128)
def _lists(
    skeleton: Skeleton,
    lengths: tuple[int, int],
    blocks: tuple[int | None, int | None],
    all_partial: bool,
    groups: int,
) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    best = None
    for sizes in _candidates(lengths, blocks, groups):
        found = masks.block_map(skeleton.mask, lengths, sizes)
        if all_partial:
            found = np.minimum(found, Block.SOME)
        if lengths[1] % sizes[1]:  # the last keys are padding
            found[:, -1:] = np.minimum(found[:, -1:], Block.SOME)
        whole, partial = found == Block.ALL, found == Block.SOME
        rate = _RATES.get(min(sizes), 1.0) * sizes[0] * sizes[1]
        cost = rate * (whole.sum() + (1 + _PARTIAL) * partial.sum())
        if best is None or cost < best[0]:
            best = cost, whole, partial, sizes
    assert best is not None
    _, whole, partial, sizes = best
    whole, partial = (
        np.stack(np.nonzero(where)).astype(np.int32) for where in (whole, partial)
    )
    whole.flags.writeable = partial.flags.writeable = False
    return whole, partial, sizes


def _candidates(
    lengths: tuple[int, int],
    blocks: tuple[int | None, int | None],
    groups: int,
) -> list[tuple[int, int]]:
    def short(size: int, length: int) -> int:
        # One block of a whole number of vector registers where that holds everything.
        return min(size, max(8, -(-length // 8) * 8))

    def of(size: int, axis: int) -> int:
        given = blocks[axis]
        return short(size, lengths[axis]) if given is None else given

    every = list(dict.fromkeys((of(size, 0), of(size, 1)) for size in _RATES))
    # Too many scores for one step: the smallest blocks. Too many blocks: the largest.
    fitting = [s for s in every if groups * s[0] * s[1] <= _SCORES] or every[-1:]
    cells = lambda s: -(-lengths[0] // s[0]) * -(-lengths[1] // s[1])
    return [s for s in fitting if cells(s) <= _GRID] or fitting[:1]
