"""Sizes of the splits and tiles of keys of the decode kernel for Hopper."""

import dataclasses
import math

from pallas_kernels._devices import Gpu

from .attention_tiles import ROWS, SPARE_BYTES

KEYS = 64  # keys per tile
COLUMNS = 32  # columns of the output that are stored at a time: 128 bytes, one swizzle
# Blocks per multiprocessor: one computes while another waits.
BLOCKS = 2
# Fewest tiles of a split: with fewer, copies do not reach their full bandwidth.
LEAST_TILES = 8


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Numbers of splits of the keys, and of prefetched tiles.

    Attributes:
        splits: Splits of a sequence that are read concurrently.
        stages: Tiles of keys, and of values, in shared memory.
    """

    splits: int
    stages: int

    def __str__(self) -> str:
        return f"{self.splits} splits of the keys, {self.stages} tiles of {KEYS} ahead"


def choose_tiles(
    batch: int,
    heads: int,
    keys: int,
    features: tuple[int, int],
    device: Gpu,
    *,
    splits: int | None = None,
) -> Tiles | None:
    """Tiles with enough splits to fill the device, and stages to fill shared memory.

    Args:
        batch: Sequences.
        heads: Key heads.
        keys: Most keys of a sequence.
        features: Features of a key and of a value.
        device: The program's device.
        splits: Most splits; None chooses.

    Returns:
        None if nothing fits.
    """
    tiles = math.ceil(keys / KEYS)
    if splits is None:
        wanted = math.ceil(BLOCKS * device.multiprocessors / (batch * heads))
        splits = min(wanted, tiles // LEAST_TILES)
    stage = 2 * KEYS * sum(features)
    rest = 2 * ROWS * features[0] + 4 * ROWS * COLUMNS + SPARE_BYTES
    for share in (BLOCKS, 1):
        stages = (device.smem_bytes // share - rest) // stage
        if stages >= 2:
            return Tiles(min(max(splits, 1), tiles), min(stages, 4))
    return None
