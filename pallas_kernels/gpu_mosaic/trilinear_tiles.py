"""Sizes of the tiles of trilinear attention on Hopper, and their cost model.

The matrix unit takes 64 rows at a time: queries of the heads that share a key head. A
tile of 64 queries visits, beyond a window, 63 keys of either axis, so using heads as
rows saves work.

A step is a pair of keys of the first axis, one for each of two warpgroups, and a tile
of the other axis. It costs its products and a latency: the next product of a warpgroup
waits for its last one, and only the other warpgroup uses the time.
"""

import dataclasses
from typing import Literal, NamedTuple

from pallas_kernels._devices import Gpu

from .attention_tiles import ROWS, SPARE_BYTES, WARPGROUPS

# Keys of the first axis multiplied in at a time, one by each warpgroup.
PAIR = WARPGROUPS
# Slots for pairs, which are small and prefetched across the end of a run.
SLOTS = 8
# Fewest queries of a tile: the rows of a TMA copy of a head.
LEAST_QUERIES = 8
MOST_FEATURES = 128

type Pass = Literal["forward", "query", "key"]

# Fraction of the peak that dependent products reach.
_EFFICIENCY = 0.5
# Seconds of a step besides its products: queries times a key, sums of rows, a wait.
_STEP = 0.4e-6
# Products per tuple, over the features of queries and of values.
PRODUCTS = {"forward": (1, 1), "query": (2, 1), "key": (2, 2)}


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes, all static.

    Attributes:
        groups: Query heads of a tile, a power of two that divides those that share a
            key head.
        keys: Keys of the second axis of a tile.
        stages: Tiles in the ring of streamed tiles.
    """

    groups: int = 1
    keys: int = 64
    stages: int = 2

    @property
    def queries(self) -> int:
        """Number of queries of a tile, each with one row per head."""
        return ROWS // self.groups

    def __str__(self) -> str:
        heads = f" of {self.groups} heads" if self.groups > 1 else ""
        return f"tiles of {self.queries} queries{heads} x {PAIR} x {self.keys} keys"

    def smem_bytes(self, which: Pass, features: int, value_features: int) -> int:
        both, widest = features + value_features, max(features, value_features)
        pairs = SLOTS * PAIR * both * 2
        sums, per_row = ROWS * widest * 4, 2 * 4
        if which == "key":
            streamed = self.stages * ROWS * (2 * both + per_row)
            held = (1 + WARPGROUPS) * ROWS * both * 2
        else:
            streamed = self.stages * self.keys * both * 2
            held = ROWS * (both * 2 + 2 * per_row)
        return pairs + sums + streamed + held + SPARE_BYTES


class Problem(NamedTuple):
    """Sizes of a problem that determine the choice of tiles.

    Attributes:
        groups: Query heads per key head.
        features: H and E, multiples of 64.
    """

    groups: int
    features: tuple[int, int]


def candidates(which: Pass, problem: Problem, device: Gpu) -> list[Tiles]:
    """Tiles that fit in registers and shared memory; empty if none does.

    A thread keeps half of a row of the results, of a step's contribution, and of
    scores.
    """
    if max(problem.features) > MOST_FEATURES:
        return []
    most = ROWS // LEAST_QUERIES
    groups = max(n for n in (1, 2, 4, 8) if n <= most and problem.groups % n == 0)
    found = []
    for keys in (64,) if which == "key" else (128, 64):
        if which == "query" and keys + max(problem.features) > 192:
            continue  # scores, their cotangents, the results and what is added to them
        for stages in (4, 3, 2):
            tiles = Tiles(groups, keys, stages)
            if tiles.smem_bytes(which, *problem.features) <= device.smem_bytes:
                found.append(tiles)
                break
    return found


def seconds(
    which: Pass, tiles: Tiles, problem: Problem, device: Gpu, steps: int
) -> float:
    """Estimated time of `steps`, all of one key head, on the whole device."""
    features = sum(
        n * size for n, size in zip(PRODUCTS[which], problem.features, strict=True)
    )
    work = 2 * PAIR * ROWS * tiles.keys * features
    products = work * device.multiprocessors / (_EFFICIENCY * device.flops)
    head_groups = problem.groups // tiles.groups
    return steps * head_groups * (products + _STEP) / device.multiprocessors
