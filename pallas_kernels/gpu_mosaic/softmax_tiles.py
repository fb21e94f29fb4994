"""Sizes of the pieces of a row in the softmax kernel for GPUs."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from pallas_kernels import _devices as devices

THREADS = 128
# Blocks of threads that should fit on a multiprocessor together.
BLOCKS = 2
# Reserve of shared memory for reductions over threads.
SLACK_BYTES = 4096


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of the pieces of a row.

    Attributes:
        piece: Elements of a load, a multiple of 128 times `vector`.
        vector: Consecutive elements that a thread loads at once; a power of 2 that
            divides the length of a row.
        group: Pieces that are in flight at the same time.
        keeps: Whether the row is kept in shared memory for the second pass.
    """

    piece: int
    vector: int
    group: int
    keeps: bool

    def __str__(self) -> str:
        kept = ", kept in shared memory" if self.keeps else ""
        return f"{self.group} pieces of {self.piece} columns at a time{kept}"


def choose_tiles(
    columns: int, dtype: Any, device: devices.Gpu, *, writes: bool
) -> Tiles:
    """The widest loads that the length of a row allows; rows are kept if they fit.

    Args:
        columns: Columns of the array, at least 128.
        dtype: Dtype of the array.
        device: The program's device.
        writes: Whether the row is needed twice.
    """
    size = jnp.dtype(dtype).itemsize
    piece = min(1024, THREADS << int(math.log2(columns // THREADS)))
    vector = math.gcd(columns, 16 // size, piece // THREADS)
    group = min(4, columns // piece)
    room = device.smem_bytes // BLOCKS - SLACK_BYTES
    keeps = writes and math.ceil(columns / piece) * piece * size <= room
    return Tiles(piece, vector, group, keeps)
