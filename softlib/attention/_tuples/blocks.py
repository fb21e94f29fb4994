"""The blocks, sizes and axis order of the TPU kernels for pairs of keys.

Results do not depend on the order of the two key axes: the one that costs less on the
TPU for which the program is traced is multiplied into the queries.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from pallas_kernels import _devices, _trilinear as lists
from pallas_kernels.tpu.bfloat16_parts import part_count
from pallas_kernels.tpu.trilinear_tiles import (
    LANES,
    MOST_ENTRIES,
    Pass,
    Problem,
    Tiles,
    choose_tiles,
    seconds,
)
from softlib import _kernel_limits as limits, masks
from softlib.attention._engine.plan import Skeleton
from softlib.attention._engine.tiles import Operands, Options
from softlib.masks import PerAxis

_OWNERS = {"forward": 0, "query": 0, "first": 1, "second": 2}


class Order(NamedTuple):
    """The order of the key axes, and the sizes of each kernel."""

    swapped: bool
    tiles: tuple[Tiles, ...]


def chosen_order(
    passes: tuple[Any, ...], options: Options, operands: Operands
) -> Order | str:
    """The cheaper order, or the reason why there is none."""
    value = operands.value
    assert value is not None
    up = lambda n: -(-n // LANES) * LANES
    arrays = (operands.query, operands.key, value, *operands.outer[0])
    problem = Problem(
        operands.groups,
        operands.plan.lengths,
        (up(operands.query.shape[-1]), up(value.shape[-1])),
        pieces_of(options, operands),
        max(x.dtype.itemsize for x in arrays),
    )
    skeleton = Skeleton.of(operands.plan.mask)
    return _cheapest(passes, skeleton, problem, _devices.tpu())


@functools.lru_cache(maxsize=64)
def _cheapest(
    passes: tuple[Any, ...],
    skeleton: Skeleton,
    problem: Problem,
    device: _devices.Tpu,
) -> Order | str:
    found: dict[Order, float] = {}
    reason = "no tile fits the vector memory"
    for swapped in (False, True):
        own = problem._replace(lengths=in_order(problem.lengths, swapped))
        tiles, cost = [], 0.0
        for which in passes:
            chosen = choose_tiles(which, own, device)
            if chosen is None:
                break
            one, two = _axes(skeleton, own.lengths, swapped, chosen)
            blocks, visited = (int(n) for n in (one.per_row * two.per_row).sum(1))
            if blocks + max(*one.grid, *two.grid) > MOST_ENTRIES:
                reason = (
                    f"{blocks} blocks of keys are more than its lists hold; masks "
                    "such as windows leave fewer"
                )
                break
            cost += seconds(which, chosen, own, device, visited, blocks)
            tiles.append(chosen)
        if len(tiles) == len(passes):
            found[Order(swapped, tuple(tiles))] = cost
    return min(found, key=lambda order: found[order], default=reason)


@functools.lru_cache(maxsize=64)
def axes(
    skeleton: Skeleton,
    lengths: tuple[int, int, int],
    swapped: bool,
    query: int,
    sizes: tuple[int, int],
    counts: tuple[int, int],
) -> list[lists.Axis]:
    """Both key axes in this order: sizes of tiles, and tiles per block."""
    mask = ordered(skeleton.mask, swapped)
    return [
        lists.axis(
            (masks.All() if axis is None else axis).block_status,
            (lengths[0], length),
            *(query, size, count),
        )
        for axis, length, size, count in zip(
            mask.axes, lengths[1:], sizes, counts, strict=True
        )
    ]


def visits_of(
    which: Pass, operands: Operands, tiles: Tiles, order: Order
) -> lists.Visits:
    """The lists of one kernel."""
    lengths = lengths_of(operands, order.swapped)
    skeleton = Skeleton.of(operands.plan.mask)
    return _listed(_OWNERS[which], skeleton, lengths, order.swapped, tiles)


@functools.lru_cache(maxsize=64)
def _listed(
    owner: int,
    skeleton: Skeleton,
    lengths: tuple[int, int, int],
    swapped: bool,
    tiles: Tiles,
) -> lists.Visits:
    first, second = _axes(skeleton, lengths, swapped, tiles)
    sizes = (tiles.query, tiles.first, tiles.second)
    joint = joint_status(skeleton, lengths, swapped, sizes)
    return lists.visits(first, second, owner, joint)


def _axes(
    skeleton: Skeleton, lengths: tuple[int, int, int], swapped: bool, tiles: Tiles
) -> list[lists.Axis]:
    sizes = (tiles.combined, tiles.keys)
    return axes(skeleton, lengths, swapped, tiles.query, sizes, tiles.counts)


def joint_status(
    skeleton: Skeleton,
    lengths: tuple[int, int, int],
    swapped: bool,
    sizes: tuple[int, int, int],
) -> lists.Status | None:
    """A function from block indices to their status under the joint masks, or None."""
    joint = ordered(skeleton.mask, swapped).joint

    def status(*at: np.ndarray) -> np.ndarray:
        edges = []
        for index, size, length in zip(at, sizes, lengths, strict=True):
            edges += [index * size, np.minimum((index + 1) * size, length)]
        return functools.reduce(np.minimum, [each._status(*edges) for each in joint])

    return status if joint else None


def ordered(mask: PerAxis, swapped: bool) -> PerAxis:
    """The mask with the key axes in this order."""
    return mask._permuted((1, 0)) if swapped else mask


def masks_of(
    mask: PerAxis, lengths: tuple[int, int, int], swapped: bool
) -> lists.Masks:
    """The masks as functions for kernels; `lengths` are in this order."""
    mask = ordered(mask, swapped)._within(*lengths)
    first, second = (
        None if axis in (None, masks.All()) else axis.attends for axis in mask.axes
    )

    def joint(*indices: Any) -> Any:
        found = [each._attends(*indices) for each in mask.joint]
        return functools.reduce(jnp.logical_and, found)

    return lists.Masks(first, second, joint if mask.joint else None)


def lengths_of(operands: Operands, swapped: bool) -> tuple[int, int, int]:
    """Lengths of the queries and of the key axes in this order."""
    return in_order(operands.plan.lengths, swapped)


def in_order(lengths: tuple[int, int, int], swapped: bool) -> tuple[int, int, int]:
    query, first, second = lengths
    return (query, second, first) if swapped else lengths


def pieces_of(options: Options, operands: Operands) -> tuple[int, int]:
    """Numbers of bfloat16 parts of the left and the right operands of products.

    One part is a rounding to bfloat16, which keys and values may have already.
    """
    asked = part_count(jnp.float32, limits.PRECISIONS[options.precision])
    arrays = (*operands.outer[0], operands.key, operands.value)
    if any(x is not None and x.dtype == jnp.float32 for x in arrays):
        return asked, asked
    return (1 if options.precision is None else asked), 1
