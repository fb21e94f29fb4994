"""Sizes of the blocks of attention kernels, and their cost model.

Larger blocks need fewer steps of the grid and read keys less often; smaller ones follow
a mask more closely. The caller counts the blocks of its mask for each candidate and
compares the estimated seconds.
"""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp

from pallas_kernels._devices import MIB, Tpu

LANES = 128

type Pass = Literal["forward", "query", "key"]

# Vector memory of a kernel on every TPU by default, less a reserve for the compiler.
_VMEM_BYTES = 12 * MIB
# Seconds of any step of a grid.
_STEP_SECONDS = 0.35e-6
# Vector-unit time of a pair, from the compiled schedules of blocks of 512 x 512.
_PAIR_SECONDS = {"forward": 4e-12, "query": 4e-12, "key": 5e-12}
# Evaluating the mask costs this fraction of it.
_MASK = 0.4
# Fraction of the peak that these short products reach.
_EFFICIENCY = 0.75
# Passes of the matrix unit for a float32 product.
_FLOAT32_PASSES = 6


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes, multiples of 128.

    Attributes:
        query: Queries of a block.
        key: Keys of a block.
        rows: Queries of a piece; divides `query`. See `attention_pieces.py`.
        keys: Keys of a piece; divides `key`.
        chunk: Columns of a piece per product: keys, or queries if the rows of a piece
            are keys.
        overlapped: Whether stages of successive pieces overlap.
    """

    query: int
    key: int
    rows: int
    keys: int
    chunk: int = LANES
    overlapped: bool = True

    @property
    def buffers(self) -> int:
        return 2 if self.overlapped else 1

    def __str__(self) -> str:
        return f"tiles of {self.query} queries x {self.key} keys"


def candidates(
    which: Pass,
    lengths: tuple[int, int],
    features: tuple[int, int],
    dtype: Any,
    device: Tpu,
    *,
    light: bool = True,
    numbers: tuple[int, int] = (0, 0),
) -> list[Tiles]:
    """Tiles that fit in vector memory, the largest first.

    Args:
        which: `forward`, or the gradient of the `query` or of the `key`.
        lengths: Numbers of queries and keys, at least 128.
        features: H and E.
        dtype: The widest dtype of the operands.
        device: The program's device.
        light: `Weights.is_light` of the weights.
        numbers: Numbers that the mask reads per query and per key.
    """
    pieces = _pieces(which, dtype, device, light)
    found = []
    for query in (512, 256, 128):
        for key in (1024, 512, 256, 128):
            # Blocks are not larger than the arrays.
            if any(
                size > LANES and size >= 2 * length
                for size, length in zip((query, key), lengths, strict=True)
            ):
                continue
            tiles = _fitted(pieces, which, query, key)
            size = vmem_bytes(which, tiles, features, dtype)
            size += _bytes_of_numbers(which, tiles, numbers)
            if size <= _VMEM_BYTES:
                found.append(tiles)
    return found


def _pieces(which: Pass, dtype: Any, device: Tpu, light: bool) -> Tiles:
    """The largest pieces whose chunks do not spill registers in any compiled case.

    A chunk is as wide as the matrix unit where registers allow it: fewer columns leave
    some of the unit idle.
    """
    wide = jnp.dtype(dtype).itemsize > 2
    if wide:
        # float32 products are several bfloat16 products, which occupy registers.
        rows, columns, chunk = 128, 256, LANES
    elif not light:
        rows, columns, chunk = 256, 256, LANES
    elif device.matrix_unit > LANES:
        rows, columns, chunk = 128, 512, 256
    else:
        rows, columns, chunk = 256, 512, LANES
    # Where the rows of a piece are keys, its columns are queries.
    query, key = (columns, rows) if which == "key" else (rows, columns)
    return Tiles(query, key, query, key, chunk, overlapped=light and not wide)


def _fitted(pieces: Tiles, which: Pass, query: int, key: int) -> Tiles:
    """Pieces that divide these blocks, with at least two chunks if they overlap."""
    rows, keys = min(query, pieces.rows), min(key, pieces.keys)
    columns = rows if which == "key" else keys
    chunk = max(LANES, min(pieces.chunk, columns // 2))
    overlapped = pieces.overlapped and columns > LANES
    return Tiles(query, key, rows, keys, chunk, overlapped)


def vmem_bytes(which: Pass, tiles: Tiles, features: tuple[int, int], dtype: Any) -> int:
    """An upper estimate of the vector memory."""
    size = jnp.dtype(dtype).itemsize
    wide = sum(-(-count // LANES) * LANES for count in features)
    query_blocks, key_blocks = tiles.query * wide, tiles.key * wide
    blocks = 2 * size * (query_blocks + key_blocks)
    if which == "key":
        results = key_blocks
    else:
        results = query_blocks
        blocks += 2 * 4 * tiles.query * LANES  # numbers per row
    # Buffers of the results, which may be float32, and their sums.
    results *= 3 * 4
    # Scores, their cotangents, and both in the matrix unit's dtype, double-buffered.
    scores = 4 * tiles.rows * tiles.keys * (6 if size <= 2 else 12)
    return blocks + results + scores


def _bytes_of_numbers(which: Pass, tiles: Tiles, numbers: tuple[int, int]) -> int:
    """Vector memory of the blocks of numbers per position."""
    total = 0
    for count, size, of_rows in zip(
        numbers, (tiles.query, tiles.key), (which != "key", which == "key"), strict=True
    ):
        total += 2 * 4 * -(-count // 8) * 8 * size  # 8 sublanes, double-buffered
        total += 4 * count * size * LANES * of_rows  # turned
    return total


def seconds(
    which: Pass,
    tiles: Tiles,
    features: tuple[int, int],
    dtype: Any,
    device: Tpu,
    *,
    visited: float,
    partial: float,
) -> float:
    """Estimated time of `visited` blocks, `partial` of them with the mask."""
    head, value = features
    products = {
        "forward": head + value,
        "query": 2 * head + value,
        "key": 2 * (head + value),
    }[which]
    wide = jnp.dtype(dtype).itemsize
    passes = _FLOAT32_PASSES if wide > 2 else 1
    pairs = tiles.query * tiles.key
    matrix = 2 * passes * products / (_EFFICIENCY * device.flops / device.cores)
    vector = _PAIR_SECONDS[which]
    moved = tiles.query if which == "key" else tiles.key
    copied = moved * (head + value) * wide / (device.bytes_per_second / device.cores)
    block = max(pairs * max(matrix, vector), copied) + _STEP_SECONDS
    return visited * block + partial * pairs * _MASK * vector
