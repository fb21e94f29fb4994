"""Sizes of the blocks of attention kernels, and their cost model.

Larger blocks need fewer steps of the grid and read keys less often; smaller ones follow
a mask more closely. The caller counts the blocks of its mask for each candidate and
compares the estimated seconds.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp

from pallas_kernels._attention_extras import Extras, Role
from pallas_kernels._devices import MIB, Tpu

LANES = 128

type Pass = Literal["forward", "query", "key"]

# Of the passes, in files of measured times.
NAMES: dict[Pass, str] = {
    "forward": "attention",
    "query": "attention, gradient of the query",
    "key": "attention, gradients of key and value",
}
# Vector memory of a kernel on every TPU by default, less a reserve for the compiler.
_VMEM_BYTES = 12 * MIB
# Seconds of any step of a grid.
_STEP_SECONDS = 0.35e-6
# Vector-unit time of a pair, from the compiled schedules of blocks of 512 x 512.
_PAIR_SECONDS = {"forward": 4e-12, "query": 4e-12, "key": 5e-12}
# Evaluating the mask costs this fraction of it, and so does an array over pairs.
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


@dataclasses.dataclass(frozen=True)
class Part:
    """Static facts of an array that is read besides queries, keys and values.

    Attributes:
        role: What it is for.
        over: Whether it varies over queries, and over keys.
        dtype: Its dtype.
        count: Numbers per position; 1 if it varies over both.
        of_batch: Whether it varies over batch entries.
        of_heads: Whether it varies over heads.
    """

    role: Role
    over: tuple[bool, bool]
    dtype: Any
    count: int = 1
    of_batch: bool = False
    of_heads: bool = False

    def is_turned(self, is_transposed: bool) -> bool:
        """Whether it is turned in tiles whose rows are keys if `is_transposed`."""
        return self.over[int(is_transposed)] and (is_transposed or not all(self.over))

    def turned(
        self, block: tuple[int, int], is_transposed: bool
    ) -> tuple[tuple[int, ...], Any]:
        """Shape and dtype of what is turned, of a block of queries by keys."""
        dtype = jnp.int32 if self.role != "bias" else jnp.float32
        if all(self.over):
            return block[::-1], dtype
        return (self.count, block[int(is_transposed)], LANES), dtype

    def bytes_of_block(self, block: tuple[int, int]) -> int:
        """Bytes of a block of queries by keys, in registers of 8 sublanes."""
        if all(self.over):
            return block[0] * block[1] * jnp.dtype(self.dtype).itemsize
        return 4 * -(-self.count // 8) * 8 * block[self.over.index(True)]

    def vmem_bytes(self, block: tuple[int, int], is_transposed: bool) -> int:
        size = 2 * self.bytes_of_block(block)  # double-buffered
        if self.is_turned(is_transposed):
            size += 4 * math.prod(self.turned(block, is_transposed)[0])
        return size


def parts_of(extras: Extras) -> tuple[Part, ...]:
    """Static facts of the arrays."""
    return tuple(
        Part(
            role,
            over,
            x.dtype,
            x.shape[1] if role == "mask" else 1,
            x.shape[0] != 1,
            role != "mask" and x.shape[1] != 1,
        )
        for role, over, x in extras.given
    )


def candidates(
    which: Pass,
    lengths: tuple[int, int],
    features: tuple[int, int],
    dtype: Any,
    device: Tpu,
    *,
    light: bool = True,
    parts: Sequence[Part] = (),
) -> list[Tiles]:
    """Tiles that fit in vector memory, the largest first.

    Args:
        which: `forward`, or the gradient of the `query` or of the `key`.
        lengths: Numbers of queries and keys, at least 128.
        features: H and E.
        dtype: The widest dtype of the operands.
        device: The program's device.
        light: `Weights.is_light` of the weights.
        parts: What else is read.
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
            block = (query, key)
            size += sum(part.vmem_bytes(block, which == "key") for part in parts)
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


def seconds(
    which: Pass,
    tiles: Tiles,
    features: tuple[int, int],
    dtype: Any,
    device: Tpu,
    *,
    visited: float,
    partial: float,
    parts: Sequence[Part] = (),
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
    moved *= (head + value) * wide
    moved += sum(part.bytes_of_block((tiles.query, tiles.key)) for part in parts)
    copied = moved / (device.bytes_per_second / device.cores)
    block = max(pairs * max(matrix, vector), copied) + _STEP_SECONDS
    over_pairs = [part for part in parts if part.role != "mask"]
    turned = [x for x in over_pairs if all(x.over) and x.is_turned(which == "key")]
    evaluated = partial + visited * (len(over_pairs) + len(turned))
    return visited * block + evaluated * pairs * _MASK * vector
