"""Sizes into which the decode kernel for Hopper divides the keys."""

import dataclasses
import math

from pallas_kernels._devices import Gpu

from .attention_tiles import ROWS, SPARE_BYTES

KEYS = 64  # of a tile
COLUMNS = 32  # of the output that leave at a time: 128 bytes, one swizzle
# Blocks that a multiprocessor should have: one computes while another waits.
BLOCKS = 2
# Of a split: fewer tiles are over before the copies are in full swing.
LEAST_TILES = 8


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Numbers of parts of the keys, and of tiles that are read ahead.

    Attributes:
        splits: Parts of a sequence that are read side by side.
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
    """As many splits as fill the device, and as many stages as shared memory holds.

    Args:
        batch: Sequences.
        heads: Of keys.
        keys: Of a sequence, at most.
        features: Of a key and of a value.
        device: What it is for.
        splits: At most; None chooses.

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
