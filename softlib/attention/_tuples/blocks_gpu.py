"""The tiles and axis order of the GPU kernels for pairs of keys.

Like `blocks`, for devices on which every tile of queries has 64 rows, and keys of the
first axis are multiplied in two at a time.
"""

import functools
from typing import NamedTuple

from pallas_kernels import _devices, _trilinear as lists
from pallas_kernels.gpu_mosaic.attention_tiles import FEATURES
from pallas_kernels.gpu_mosaic.trilinear_lists import Runs, runs
from pallas_kernels.gpu_mosaic.trilinear_tiles import (
    MOST_FEATURES,
    PAIR,
    Pass,
    Problem,
    Tiles,
    candidates,
    seconds,
)
from softlib.attention._engine.plan import Skeleton
from softlib.attention._engine.tiles import Operands

from .blocks import axes, in_order, joint_status

# Pairs of keys of the first axis that are first classified together.
_COUNT = 8
# Most steps of a kernel, 4 bytes each, which are constants of the program.
MOST_STEPS = 1 << 22


class Order(NamedTuple):
    """The order of the key axes, and the sizes."""

    swapped: bool
    tiles: Tiles


def problem_of(operands: Operands) -> Problem:
    """The sizes of the problem, with padded features."""
    up = lambda size: -(-size // FEATURES) * FEATURES
    assert operands.value is not None
    return Problem(
        operands.groups, (up(operands.query.shape[-1]), up(operands.value.shape[-1]))
    )


def orders(which: Pass, operands: Operands) -> tuple[Order, ...] | str:
    """The cheaper order (both for gradients of keys), or the reason for none."""
    device = _devices.gpu() or _devices.H100
    skeleton, lengths = Skeleton.of(operands.plan.mask), operands.plan.lengths
    return _orders(which, skeleton, lengths, problem_of(operands), device)


@functools.lru_cache(maxsize=64)
def _orders(
    which: Pass,
    skeleton: Skeleton,
    lengths: tuple[int, int, int],
    problem: Problem,
    device: _devices.Gpu,
) -> tuple[Order, ...] | str:
    costs: dict[Order, float] = {}
    most = None
    for swapped in (False, True):
        own = in_order(lengths, swapped)
        for tiles in candidates(which, problem, device):
            first, second = _axes(skeleton, own, swapped, tiles)
            steps = int((first.per_row[1] * second.per_row[1]).sum())
            if steps > MOST_STEPS:
                most = steps
            else:
                order = Order(swapped, tiles)
                costs[order] = seconds(which, tiles, problem, device, steps)
    if which == "key" and len(costs) == 2:
        return tuple(costs)
    if which != "key" and costs:
        return (min(costs, key=lambda order: costs[order]),)
    if most is not None:
        return (
            f"{most} pairs of tiles are more than its lists hold; masks such as "
            "windows leave fewer"
        )
    sizes = "{} and {}".format(*problem.features)
    return (
        f"features of queries and values, padded {sizes}, are more than {MOST_FEATURES}"
    )


def _axes(
    skeleton: Skeleton, lengths: tuple[int, int, int], swapped: bool, tiles: Tiles
) -> list[lists.Axis]:
    sizes, counts = (PAIR, tiles.keys), (_COUNT, 1)
    return axes(skeleton, lengths, swapped, tiles.queries, sizes, counts)


def runs_of(which: Pass, operands: Operands, order: Order) -> Runs:
    """The lists of one kernel."""
    skeleton = Skeleton.of(operands.plan.mask)
    return _listed(
        which, skeleton, in_order(operands.plan.lengths, order.swapped), order
    )


@functools.lru_cache(maxsize=64)
def _listed(
    which: Pass, skeleton: Skeleton, lengths: tuple[int, int, int], order: Order
) -> Runs:
    swapped, tiles = order
    first, second = _axes(skeleton, lengths, swapped, tiles)
    sizes = (tiles.queries, PAIR * _COUNT, tiles.keys)
    joint = joint_status(skeleton, lengths, swapped, sizes)
    owner = 2 if which == "key" else 0
    owners = second.grid[1] if which == "key" else first.grid[0]
    return runs(lists.visits(first, second, owner, joint), _COUNT, owner, owners)
