"""Sizes of the attention kernels for Hopper, and limits of the hardware."""

import dataclasses

from pallas_kernels import _measured
from pallas_kernels._devices import Gpu

WARPGROUPS = 2  # compute warpgroups
ROWS = 64  # rows per warpgroup
TILE = WARPGROUPS * ROWS  # rows of a block of threads
LENGTHS = 8  # lengths are multiples of this
SWIZZLE = 128  # bytes
FEATURES = 64  # numbers of features are multiples of this: one swizzle
WIDE_COLUMNS = 32  # of a float32 result that are stored at a time: one swizzle
PAIR_COLUMNS = 32  # of an array over pairs, keys are multiples of this: one swizzle
MOST_COLUMNS = 256  # most columns of a product
SPARE_BYTES = 4096  # reserve of shared memory: barriers, and gaps between arrays
MOST_SUMS = 160  # most registers per thread for results
NAME = "attention"  # of the forward pass, in files of measured times


@dataclasses.dataclass(frozen=True)
class PairBytes:
    """Bytes of what a step reads besides queries, keys and values.

    Attributes:
        matrices: Per pair of a query and a key.
        rows: Per query or key.
    """

    matrices: int = 0
    rows: int = 0

    def of_step(self, size: int) -> int:
        """Bytes for a tile of 128 positions and `size` on the other axis."""
        return self.matrices * TILE * size + self.rows * max(TILE, size)


NO_PAIRS = PairBytes()


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of the forward kernel.

    Attributes:
        keys: Keys per tile.
        stages: Tiles of keys, and of values, in shared memory.
    """

    keys: int = 128
    stages: int = 2

    def __str__(self) -> str:
        return f"tiles of {TILE} queries x {self.keys} keys in {self.stages} stages"

    def smem_bytes(
        self,
        features: int,
        value_features: int,
        pairs: PairBytes = NO_PAIRS,
        is_wide: bool = False,
    ) -> int:
        """Bytes of shared memory; `is_wide` if the output is float32."""
        ring = self.stages * self.keys * (features + value_features)
        separate = value_features if value_features != features else 0
        out = 2 * WIDE_COLUMNS if is_wide else separate
        queries = TILE * (features + out)
        extras = self.stages * pairs.of_step(self.keys)
        return (ring + queries) * 2 + TILE * 4 + extras + SPARE_BYTES


def choose_tiles(
    features: int,
    value_features: int,
    device: Gpu,
    pairs: PairBytes = NO_PAIRS,
    is_wide: bool = False,
) -> Tiles | None:
    """The most keys per tile, then the most stages, that fit; None if nothing fits.

    Where tiles were measured on the device, the fastest of those that fit.
    """

    def cost(tiles: Tiles) -> float:
        return _measured.factor(device.name, NAME, (tiles.keys, tiles.stages))

    fitting = candidates(features, value_features, device, pairs, is_wide)
    return min(fitting, key=cost, default=None)


def candidates(
    features: int,
    value_features: int,
    device: Gpu,
    pairs: PairBytes = NO_PAIRS,
    is_wide: bool = False,
) -> list[Tiles]:
    """Tiles that registers and shared memory hold, the largest first.

    A thread keeps half of a row of the output (`value_features` long) and half of a row
    of scores, besides about 80 other numbers.
    """
    if value_features > MOST_COLUMNS:
        return []
    fitting = (keys for keys in (128, 64) if (value_features + keys) // 2 <= 160)
    sizes = [(keys, stages) for keys in fitting for stages in (4, 3, 2)]
    # One stage, which cannot prefetch, is the last resort.
    tiles = [Tiles(keys, stages) for keys, stages in (*sizes, (64, 1))]
    room = device.smem_bytes
    fits = lambda t: t.smem_bytes(features, value_features, pairs, is_wide) <= room
    return list(filter(fits, tiles))


@dataclasses.dataclass(frozen=True)
class BackwardTiles:
    """Sizes of the backward kernels.

    Attributes:
        keys: Keys per tile in the ring of the kernel of dQ.
        queries: Queries per tile in the ring of the kernel of dK and dV.
        stages: Tiles in either ring.
        together: Whether one kernel computes dK and dV, or each has its own.
    """

    keys: int = 64
    queries: int = 64
    stages: int = 2
    together: bool = True

    def smem_bytes(
        self,
        features: int,
        value_features: int,
        pairs: PairBytes = NO_PAIRS,
        is_wide: bool = False,
    ) -> int:
        """Bytes of the largest kernel; `is_wide` if results are float32."""
        size = max(self.keys, self.queries)
        arrays = (TILE + self.stages * size) * (2 * (features + value_features) + 2 * 4)
        arrays += is_wide * TILE * WIDE_COLUMNS * 4
        return arrays + self.stages * pairs.of_step(size) + SPARE_BYTES


def choose_backward_tiles(
    features: int,
    value_features: int,
    device: Gpu,
    pairs: PairBytes = NO_PAIRS,
    is_wide: bool = False,
) -> BackwardTiles | None:
    """The most stages that shared memory holds, up to four; None if nothing fits.

    A thread keeps half of a row of dK and of dV. If both take too many registers, each
    has its own kernel, and scores are computed once more.
    """
    if max(features, value_features) > MOST_COLUMNS:
        return None
    together = (features + value_features) // 2 <= MOST_SUMS
    for stages in (4, 3, 2, 1):
        tiles = BackwardTiles(stages=stages, together=together)
        size = tiles.smem_bytes(features, value_features, pairs, is_wide)
        if size <= device.smem_bytes:
            return tiles
    return None
