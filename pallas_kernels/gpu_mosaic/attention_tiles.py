"""Sizes of the attention kernels for Hopper, and limits of the hardware."""

import dataclasses

from pallas_kernels._devices import Gpu

WARPGROUPS = 2  # compute warpgroups
ROWS = 64  # rows per warpgroup
TILE = WARPGROUPS * ROWS  # rows of a block of threads
LENGTHS = 8  # lengths are multiples of this
FEATURES = 64  # numbers of features are multiples of this: 128 bytes, one swizzle
PAIR_COLUMNS = 32  # of an array over pairs, keys are multiples of this: one swizzle
MOST_COLUMNS = 256  # most columns of a product
SPARE_BYTES = 4096  # reserve of shared memory: barriers, and gaps between arrays
MOST_SUMS = 160  # most registers per thread for results


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

    def smem_bytes(
        self, features: int, value_features: int, pairs: PairBytes = NO_PAIRS
    ) -> int:
        ring = self.stages * self.keys * (features + value_features)
        queries = TILE * (features + (value_features != features) * value_features)
        extras = self.stages * pairs.of_step(self.keys)
        return (ring + queries) * 2 + TILE * 4 + extras + SPARE_BYTES


def choose_tiles(
    features: int, value_features: int, device: Gpu, pairs: PairBytes = NO_PAIRS
) -> Tiles | None:
    """The most keys per tile, then the most stages, that fit; None if nothing fits.

    A thread keeps half of a row of the output (`value_features` long) and half of a row
    of scores, besides about 80 other numbers.
    """
    if value_features > MOST_COLUMNS:
        return None
    fitting = (keys for keys in (128, 64) if (value_features + keys) // 2 <= 160)
    sizes = [(keys, stages) for keys in fitting for stages in (4, 3, 2)]
    # One stage, which cannot prefetch, is the last resort.
    for keys, stages in (*sizes, (64, 1)):
        tiles = Tiles(keys, stages)
        if tiles.smem_bytes(features, value_features, pairs) <= device.smem_bytes:
            return tiles
    return None


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
        self, features: int, value_features: int, pairs: PairBytes = NO_PAIRS
    ) -> int:
        """Bytes of shared memory of the largest kernel."""
        size = max(self.keys, self.queries)
        arrays = (TILE + self.stages * size) * (2 * (features + value_features) + 2 * 4)
        return arrays + self.stages * pairs.of_step(size) + SPARE_BYTES


def choose_backward_tiles(
    features: int, value_features: int, device: Gpu, pairs: PairBytes = NO_PAIRS
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
        if tiles.smem_bytes(features, value_features, pairs) <= device.smem_bytes:
            return tiles
    return None
