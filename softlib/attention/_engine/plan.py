"""Block plans: the blocks of a mask that are visited, found on the host and cached."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from softlib import _checks as checks, masks
from softlib.masks import Mask, PerAxis

from . import block_lists
from .block_lists import CpuSizes, Sizes

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockPlan:
    """The blocks of pairs of a query and a key that attention has to visit.

    With several key axes, of a query and a key of each: a block then has a column per
    axis.

    A plan may be given to attention in the place of its mask. It is a pytree: passed as
    an argument of a compiled function its lists are operands instead of constants of
    the program, and plans with lists of equal lengths share a compilation.

    Args:
        mask: The mask, on the indices of the queries and of each key axis.
        whole: Row and columns of the blocks in which every pair attends, row by row.
        partial: Row and columns of the blocks in which the mask is evaluated.
        counts: None if the lists are full; else how many entries of `whole` and of
            `partial` count, because devices with lists of other lengths share them.
        lengths: Static numbers of queries and of the keys of each axis.
        blocks: Static sizes of a block, likewise.

    Example:
        >>> plan = softlib.attention.block_plan(softlib.masks.Causal(), 512, 512)
        >>> print(plan.density <= 1.0)
        True
    """

    # Any: transformations rebuild a plan from whatever stands for its arrays.
    mask: Any
    whole: Any
    partial: Any
    lengths: tuple[int, ...] = dataclasses.field(metadata=_STATIC)
    blocks: tuple[int, ...] = dataclasses.field(metadata=_STATIC)
    counts: Any = None

    @property
    def grid(self) -> tuple[int, ...]:
        """Blocks along the queries and along each key axis."""
        return tuple(
            -(-length // size)
            for length, size in zip(self.lengths, self.blocks, strict=True)
        )

    @property
    def visited(self) -> int:
        """Number of visited blocks."""
        return self.whole.shape[-1] + self.partial.shape[-1]

    def in_one_list(self) -> "BlockPlan":
        """The same blocks, with the mask evaluated in all of them."""
        lists = self.whole, self.partial
        on_host = all(isinstance(blocks, np.ndarray) for blocks in lists)
        partial = (np if on_host else jnp).concatenate(lists, axis=-1)
        return dataclasses.replace(self, whole=self.whole[:, :0], partial=partial)

    @property
    def density(self) -> float:
        """The visited fraction of all blocks; time is proportional to it."""
        return self.visited / max(math.prod(self.grid), 1)


def block_plan(
    mask: Mask | PerAxis | None,
    query_length: int,
    key_length: int | tuple[int, ...],
    *,
    block_query: int | None = None,
    block_key: int | tuple[int | None, ...] | None = None,
    query_offset: int = 0,
) -> BlockPlan:
    """The blocks that attention under `mask` visits, as lists.

    The classification is the mask's own closed form: no token is visited. The result is
    cached on the mask and the shapes.

    Args:
        mask: A mask value; None for all pairs. Masks that hold arrays are evaluated
            wherever their arrays decide. `masks.PerAxis` for several key axes.
        query_length: Static number of queries.
        key_length: Static number of keys; a tuple, of each key axis, for
            `kronecker_attention`.
        block_query: Static queries per block; None chooses the size, out of 128, 256
            and 512, that costs least for this mask, here: on a CPU of a few cores small
            blocks are as fast as large ones.
        block_key: Static keys per block; None as for `block_query`; a tuple with
            several key axes.
        query_offset: Static position of the first query.

    Returns:
        A `BlockPlan`, with lists of int32 in NumPy.

    Raises:
        TypeError: `mask` is no mask value, or a size is no Python int.
        ValueError: A block size is not positive, a length is negative, or there are not
            as many of them as `mask` has key axes.

    Example:
        >>> window = softlib.masks.Window(127, 0)
        >>> sizes = {"block_query": 128, "block_key": 128}
        >>> plan = softlib.attention.block_plan(window, 1024, 1024, **sizes)
        >>> print(plan.visited, plan.grid)
        15 (8, 8)
    """
    function = "block_plan"
    several = isinstance(key_length, tuple) or isinstance(mask, PerAxis)
    lengths = key_length if isinstance(key_length, tuple) else (key_length,)
    if not lengths:
        raise ValueError(
            f"{function}: `key_length` must hold a length per key axis, got ()."
        )
    named = [("query_length", query_length), *(("key_length", n) for n in lengths)]
    for name, length in named:
        if length != 0:
            checks.require_positive_integer(function, name, length)
    if several:
        mask = per_axis(function, mask, len(lengths))
    mask = masks.All() if mask is None else mask
    if not isinstance(mask, Mask | PerAxis):
        raise TypeError(
            f"{function}: `mask` must be a mask value or None, got "
            f"{type(mask).__name__}; wrap a NumPy array of blocks in masks.Blocks."
        )
    sizes = block_sizes(
        function, {"block_query": block_query, "block_key": block_key}, len(lengths)
    )
    return plan_of(mask.shift(query_offset), (query_length, *lengths), sizes)


def per_axis(function: str, mask: Any, axes: int) -> PerAxis:
    """Turns a mask of pairs that holds on each key axis into a mask of tuples."""
    if mask is None or isinstance(mask, Mask):
        return PerAxis(*(mask,) * axes)
    if not isinstance(mask, PerAxis):
        raise TypeError(
            f"{function}: `mask` must be a mask value, masks.PerAxis, a BlockPlan or "
            f"None, got {type(mask).__name__}."
        )
    if len(mask.axes) != axes:
        raise ValueError(
            f"{function}: `mask` must have {axes} key axes, got a PerAxis of "
            f"{len(mask.axes)}."
        )
    return mask


def block_sizes(
    function: str, given: dict[str, Any], key_axes: int
) -> tuple[int | None, ...]:
    """Checked sizes, of the queries and of each key axis, from two arguments."""
    (query_name, query), (key_name, key) = given.items()
    keys = key if isinstance(key, tuple) else (key,) * (key_axes if key is None else 1)
    if len(keys) != key_axes:
        raise ValueError(
            f"{function}: `{key_name}` must be {key_axes} sizes, one per key axis, got "
            f"{key!r}."
        )
    for name, size in ((query_name, query), *((key_name, size) for size in keys)):
        if size is not None:
            checks.require_positive_integer(function, name, size)
    return (query, *keys)


def plan_of(
    mask: Mask | PerAxis,
    lengths: tuple[int, ...],
    blocks: tuple[int | None, ...] | None = None,
    *,
    all_partial: bool = False,
    groups: int = 1,
    sizes: Sizes | None = None,
) -> BlockPlan:
    """A block plan; with `all_partial` all visited blocks are masked.

    `groups`: query heads per key head. Their scores exist together: with many of them
    blocks are smaller. `sizes` of blocks to choose from are those for a CPU if None.
    """
    blocks = blocks or (None,) * len(lengths)
    skeleton = Skeleton.of(mask)
    whole, partial, chosen = block_lists.lists(
        skeleton, lengths, blocks, all_partial, sizes or CpuSizes(groups)
    )
    return BlockPlan(mask, whole, partial, lengths, chosen)


def cheapest_last_axis(mask: PerAxis, lengths: tuple[int, ...], groups: int) -> int:
    """Index of the cheapest key axis to stream; others multiply into the queries.

    The last one where it makes no difference.
    """
    count, blocks = len(mask.axes), (None,) * len(lengths)
    costs, tiles = {}, CpuSizes(groups)
    for axis in reversed(range(count)):
        order = (*(i for i in range(count) if i != axis), axis)
        moved = PerAxis(*(mask.axes[i] for i in order))
        sizes = (lengths[0], *(lengths[i + 1] for i in order))
        skeleton = Skeleton.of(moved)
        costs[axis], _ = block_lists.cheapest(skeleton, sizes, blocks, tiles)
    return min(costs, key=lambda axis: costs[axis])


class Skeleton(NamedTuple):
    """A mask without its arrays: hashable, and enough to classify blocks."""

    structure: Any
    leaves: int

    @classmethod
    def of(cls, mask: Mask | PerAxis) -> "Skeleton":
        leaves, structure = jax.tree.flatten(mask)
        return cls(structure, len(leaves))

    @property
    def mask(self) -> Any:
        # The classification never reads arrays, so placeholders do.
        return jax.tree.unflatten(self.structure, [_PLACEHOLDER] * self.leaves)


_PLACEHOLDER = object()
