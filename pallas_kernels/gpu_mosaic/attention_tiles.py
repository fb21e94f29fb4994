"""Sizes of the attention kernels for Hopper, and what the hardware fixes of them."""

import dataclasses

from pallas_kernels._devices import Gpu

WARPGROUPS = 2  # that multiply
ROWS = 64  # of one warpgroup
TILE = WARPGROUPS * ROWS  # rows of a block of threads
LENGTHS = 8  # what lengths are multiples of
FEATURES = 64  # what numbers of features are multiples of: 128 bytes, one swizzle
MOST_COLUMNS = 256  # of a product
SPARE_BYTES = 4096  # of shared memory: barriers, and gaps between arrays
MOST_SUMS = 160  # registers of a thread for results, which leave enough for all else


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of the forward kernel.

    Attributes:
        keys: Per tile.
        stages: Tiles of keys, and of values, in shared memory.
    """

    keys: int = 128
    stages: int = 2

    def smem_bytes(self, features: int, value_features: int) -> int:
        ring = self.stages * self.keys * (features + value_features)
        queries = TILE * (features + (value_features != features) * value_features)
        return (ring + queries) * 2 + TILE * 4 + SPARE_BYTES


def choose_tiles(features: int, value_features: int, device: Gpu) -> Tiles | None:
    """The most keys per tile, then stages, that registers and shared memory hold.

    A thread keeps half of a row of the output, of which there are `value_features`, and
    half of a row of scores, beside about 80 other numbers. None if nothing fits.
    """
    if value_features > MOST_COLUMNS:
        return None
    fitting = (keys for keys in (128, 64) if (value_features + keys) // 2 <= 160)
    sizes = [(keys, stages) for keys in fitting for stages in (4, 3, 2)]
    # With one stage nothing is fetched ahead: only where there is no other way.
    for keys, stages in (*sizes, (64, 1)):
        tiles = Tiles(keys, stages)
        if tiles.smem_bytes(features, value_features) <= device.smem_bytes:
            return tiles
    return None


@dataclasses.dataclass(frozen=True)
class BackwardTiles:
    """Sizes of the backward kernels.

    Attributes:
        keys: Per tile of the ring of the kernel of dQ.
        queries: Per tile of the ring of the kernel of dK and dV.
        stages: Tiles in either ring.
        together: Whether one kernel computes dK and dV, or each has its own.
    """

    keys: int = 64
    queries: int = 64
    stages: int = 2
    together: bool = True

    def smem_bytes(self, features: int, value_features: int) -> int:
        """Bytes of shared memory of the kernel that takes most."""
        rows = TILE + self.stages * max(self.keys, self.queries)
        return rows * (2 * (features + value_features) + 2 * 4) + SPARE_BYTES


def choose_backward_tiles(
    features: int, value_features: int, device: Gpu
) -> BackwardTiles | None:
    """As many stages as shared memory holds, up to four; None if nothing fits.

    A thread keeps half of a row of dK and of dV. Where both take too many registers
    each has a kernel of its own, and scores are computed once more.
    """
    if max(features, value_features) > MOST_COLUMNS:
        return None
    together = (features + value_features) // 2 <= MOST_SUMS
    for stages in (4, 3, 2, 1):
        tiles = BackwardTiles(stages=stages, together=together)
        if tiles.smem_bytes(features, value_features) <= device.smem_bytes:
            return tiles
    return None
