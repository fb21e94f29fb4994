"""Sizes of the blocks and strips of the softmax kernel for TPUs."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from pallas_kernels import _devices as devices

LANES = 128
# Registers of 1024 float32 that are processed at a time without spills, as compiled.
_REGISTERS, _FEW_REGISTERS = 20, 9
_SMALL = (devices.V4.name, devices.ANY_TPU.name)
# Bytes of a block: enough for a copy to take much longer than starting it.
BLOCK_BYTES = 2 << 20
SLACK_BYTES = 4 << 20


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of the blocks of the array, and of the strips of a block.

    Attributes:
        rows: Rows of a block; a multiple of `strip`.
        columns: Columns of a block, a multiple of 128: all, or a multiple of `chunk`.
        strip: Rows that are processed at a time, a multiple of 8 (16 for 16 bits).
        chunk: Columns that are processed at a time, a multiple of 128.
    """

    rows: int
    columns: int
    strip: int
    chunk: int

    def __str__(self) -> str:
        return f"tiles of {self.rows} rows x {self.columns} columns"


def held_bytes(dtype: Any, out_dtype: Any) -> int:
    """Bytes of VMEM per element, with a double buffer of each array."""
    arrays = (dtype,) if out_dtype is None else (dtype, out_dtype)
    return 2 * sum(jnp.dtype(each).itemsize for each in arrays)


def choose_tiles(
    rows: int, columns: int, dtype: Any, out_dtype: Any, device: devices.Tpu
) -> Tiles:
    """Whole rows if they fit half of VMEM, else tiles of columns.

    Args:
        rows: Rows of the array.
        columns: Columns of the array.
        dtype: Dtype of the array.
        out_dtype: Dtype of a result of this shape; None for one result per row.
        device: The program's device.
    """
    held = held_bytes(dtype, out_dtype)
    size = held // 2 if out_dtype is None else held // 4  # of an array, on average
    least = 32 // min(jnp.dtype(each).itemsize for each in (dtype, out_dtype or dtype))
    width = up(columns, LANES)
    budget = min(device.vmem_bytes // 2, device.vmem_bytes - SLACK_BYTES)
    budget = budget * size // held
    is_whole = least * width * size <= budget
    # Beside the scores two numbers per lane are carried.
    room = 1024 * (_FEW_REGISTERS if device.name in _SMALL else _REGISTERS)
    carried = 2 * LANES
    chunk = min(width, (room // least - carried) // LANES * LANES)
    strip = max(least, room // (chunk + carried) // least * least)
    tile = width if is_whole else BLOCK_BYTES // (size * strip) // chunk * chunk
    block = min(BLOCK_BYTES, budget) // (tile * size)
    # Several blocks per core, so that copies and work overlap.
    block = min(block, math.ceil(rows / (4 * device.cores)))
    strip = min(strip, up(max(block, 1), least))
    block = max(block // strip, 1) * strip
    return Tiles(block, tile, strip, chunk)


def up(n: int, multiple: int) -> int:
    return math.ceil(n / multiple) * multiple
