"""Tile sizes of the row-statistics kernels for Hopper, from a model of what they cost.

A block of threads needs most of the shared memory of a multiprocessor, so that a grid
runs in rounds of one block per multiprocessor, and a round that is not full costs as
much as one that is. Forward, the classes are cut in as many splits as fill the rounds
best. Backward, the classes are visited chunk after chunk, with three grids each and the
float32 gradient of hidden read and written once: larger chunks spare that traffic,
smaller ones memory for the stored cotangents, and some fill their rounds better. The
cheapest chunk is taken whose cotangents stay below a share of the logits in float32.
"""

import dataclasses
import itertools
import math

from pallas_kernels._devices import Gpu

WARPGROUPS = 2  # that multiply
ROWS = 64  # of one warpgroup
BLOCK = WARPGROUPS * ROWS  # rows of a block of threads
SPAN = 64  # columns: two bytes each, one swizzle of 128 bytes
# Classes of a tile of logits, and up to how many numbers per row and class there are
# registers besides: an accumulator of 256 classes takes half of them.
FORWARD_CLASSES = ((256, 6), (128, 14), (64, 18))
BACKWARD_CLASSES = ((256, 5), (128, 13), (64, 18))
WIDEST = 256
COLUMNS = 32  # of a slice
PRODUCT_FEATURES = (256, 192, 128, 64)  # of a tile of the gradients
MOST_STAGES = 6
# Of shared memory: barriers, and what sums over the rows of a warpgroup need.
SLACK_BYTES = 4096
# Of the float32 logits, that the cotangents of a chunk in 16 bits may take.
SHARE = 0.008
LEAST_CHUNK, MOST_CHUNK = 1024, 16_384
# Seconds to start a kernel, and tiles as which filling a ring counts.
LAUNCH, FILLING = 4e-6, 1
# Columns as which reading the left operand of a product counts.
READING = 32


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of a kernel that computes logits, of 128 rows at a time.

    Attributes:
        classes: Of a tile, a multiple of `columns`, 256 at most.
        columns: Classes of a slice of a tile, a divisor of 128.
        stages: Slots of the ring.
        splits: Of the classes; blocks of threads share the rows of a tile.
    """

    classes: int
    columns: int
    stages: int
    splits: int

    def __str__(self) -> str:
        return f"tiles of {BLOCK} rows x {self.classes} classes in {self.splits} splits"


@dataclasses.dataclass(frozen=True)
class BackwardTiles:
    """Sizes of the backward pass.

    Attributes:
        logits: Of the kernel that computes cotangents of a chunk.
        chunk: Classes whose cotangents are stored at a time, a multiple of 256.
        features: Of a tile of the gradients, a multiple of 64, 256 at most.
        stages: Slots of the ring of the products.
    """

    logits: Tiles
    chunk: int
    features: int
    stages: int

    def __str__(self) -> str:
        return f"{self.logits}, cotangents of {self.chunk} classes at a time"


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Sizes of a problem, as far as the choice of tiles depends on them.

    Attributes:
        rows: N.
        features: D.
        vocabulary: V.
        numbers: Per row and per class, that a slice of logits is combined with.
    """

    rows: int
    features: int
    vocabulary: int
    numbers: int = 0

    @property
    def row_tiles(self) -> int:
        return _ceil(self.rows, BLOCK)


def choose_tiles(shapes: Shapes, device: Gpu) -> Tiles | None:
    """Tiles of the forward pass; None if none leaves enough registers."""
    classes = _classes(FORWARD_CLASSES, shapes)
    if classes is None:
        return None
    splits = _splits(shapes.row_tiles, _ceil(shapes.vocabulary, classes), device)
    return Tiles(classes, COLUMNS, _stages(classes, 0, device), splits)


def choose_backward_tiles(shapes: Shapes, device: Gpu) -> BackwardTiles | None:
    """Tiles of the backward pass; None if none leaves enough registers."""
    classes = _classes(BACKWARD_CLASSES, shapes)
    if classes is None:
        return None
    most = max(int(2 * SHARE * shapes.vocabulary), LEAST_CHUNK)
    most = min(most, MOST_CHUNK, _ceil(shapes.vocabulary, WIDEST) * WIDEST)
    least = _ceil(min(most, LEAST_CHUNK), WIDEST) * WIDEST
    tries = itertools.product(range(least, most + 1, WIDEST), PRODUCT_FEATURES)
    chunk, features = min(
        tries, key=lambda sizes: _seconds(shapes, classes, *sizes, device)
    )
    staging = 2 * WARPGROUPS * ROWS * 2
    return BackwardTiles(
        Tiles(
            classes,
            COLUMNS,
            _stages(classes, staging * COLUMNS, device),
            _splits(shapes.row_tiles, chunk // classes, device),
        ),
        chunk,
        features,
        _stages(features, staging * SPAN, device),
    )


def _seconds(
    shapes: Shapes, classes: int, chunk: int, features: int, device: Gpu
) -> float:
    """Estimated time of the whole backward pass."""
    logits = chunk // classes
    splits = _splits(shapes.row_tiles, logits, device)
    pieces = _ceil(shapes.features, features)
    # Multiplications of one block of threads, times the rounds of its grid.
    products = (
        _rounds(shapes.row_tiles * splits, device)
        * (_ceil(logits, splits) * (classes + READING) * shapes.features)
        + _rounds(shapes.row_tiles * pieces, device) * (features + READING) * chunk
        + _rounds(chunk // BLOCK * pieces, device) * (features + READING) * shapes.rows
    )
    of_products = 2 * BLOCK * products / (device.flops / device.multiprocessors)
    moved = 8 * shapes.rows * pieces * features  # the gradient of hidden
    of_chunk = of_products + moved / device.bytes_per_second + 3 * LAUNCH
    return _ceil(shapes.vocabulary, chunk) * of_chunk


def _classes(sizes: tuple[tuple[int, int], ...], shapes: Shapes) -> int | None:
    return next((size for size, most in sizes if shapes.numbers <= most), None)


def _splits(row_tiles: int, tiles: int, device: Gpu) -> int:
    """Parts into which the tiles of classes are divided; of equals the fewest."""
    best = (math.inf, 1)
    for splits in range(1, min(tiles, 4 * device.multiprocessors) + 1):
        per_split = _ceil(tiles, splits)
        if per_split * (splits - 1) >= tiles:
            continue  # a split would be empty
        cost = _rounds(row_tiles * splits, device) * (per_split + FILLING)
        best = min(best, (cost, splits))
    return best[1]


def _rounds(blocks: int, device: Gpu) -> int:
    return _ceil(blocks, device.multiprocessors)


def _stages(columns: int, staging_bytes: int, device: Gpu) -> int:
    """Slots of (128 + columns) x 64 elements of 2 bytes."""
    room = device.smem_bytes - SLACK_BYTES - staging_bytes
    return min(MOST_STAGES, room // ((BLOCK + columns) * SPAN * 2))


def _ceil(length: int, size: int) -> int:
    return -(-length // size)
