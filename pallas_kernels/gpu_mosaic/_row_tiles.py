"""Tile sizes of the row-statistics kernels for Hopper, from a cost model.

A block of threads needs most of the shared memory of a multiprocessor: so a grid runs
in rounds of one block per multiprocessor, and an incomplete round costs as much as a
full one. Forward, the number of splits of the classes is that which fills the rounds
best. Backward, the classes are visited in chunks, each with three grids that read and
write the float32 gradient of hidden once. Larger chunks save this traffic, smaller ones
memory for stored cotangents, and some fill their rounds better: the cheapest chunk is
taken whose cotangents stay below a share of the float32 logits.

A float32 weight is rounded to 16 bits, some classes at a time: forward as many as a
copy of `COPY_BYTES` holds, backward those of a chunk.
"""

import dataclasses
import itertools
import math

from pallas_kernels import _measured
from pallas_kernels._devices import Gpu

WARPGROUPS = 2  # compute warpgroups
ROWS = 64  # rows per warpgroup
BLOCK = WARPGROUPS * ROWS  # rows of a block of threads
SPAN = 64  # columns: two bytes each, one swizzle of 128 bytes
# Classes of a tile of logits: most numbers per row and class that registers allow. (An
# accumulator of 256 classes takes half of the registers.)
FORWARD_CLASSES = ((256, 6), (128, 14), (64, 18))
BACKWARD_CLASSES = ((256, 5), (128, 13), (64, 18))
WIDEST = 256
COLUMNS = 32  # columns per slice
PRODUCT_FEATURES = (256, 192, 128, 64)  # features per tile of the gradients
MOST_STAGES = 6
# Largest copy of some classes of a float32 weight in 16 bits, forward: 128 MiB.
COPY_BYTES = 1 << 27
# Reserve of shared memory: barriers, and scratch of sums over rows of a warpgroup.
SLACK_BYTES = 4096
# Largest size of a chunk's 16-bit cotangents relative to the float32 logits.
SHARE = 0.008
LEAST_CHUNK, MOST_CHUNK = 1024, 16_384
# Seconds to start a kernel, and cost of filling a ring in tiles.
LAUNCH, FILLING = 4e-6, 1
# Cost of reading the left operand of a product, in columns.
READING = 32
# Of the backward pass, in files of measured times.
NAME = "row statistics, gradients"


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of a kernel that computes logits, 128 rows at a time.

    Attributes:
        classes: Classes of a tile, a multiple of `columns`, 256 at most.
        columns: Classes of a slice of a tile, a divisor of 128.
        stages: Slots of the ring.
        splits: Splits of the classes over blocks of threads, per tile of rows.
    """

    classes: int
    columns: int
    stages: int
    splits: int

    def __str__(self) -> str:
        return f"tiles of {BLOCK} rows x {self.classes} classes in {self.splits} splits"


@dataclasses.dataclass(frozen=True)
class ForwardTiles:
    """Sizes of the forward pass.

    Attributes:
        logits: Sizes of the kernel.
        chunk: Classes of a float32 weight that are rounded and visited at a time, a
            multiple of 256; None if all are visited at once.
    """

    logits: Tiles
    chunk: int | None = None

    def __str__(self) -> str:
        return str(self.logits)


@dataclasses.dataclass(frozen=True)
class ProductTiles:
    """Sizes of a kernel that multiplies cotangents, 128 rows of the result at a time.

    Attributes:
        columns: Columns of a tile of the result, a multiple of 64, 256 at most.
        stages: Slots of the ring.
    """

    columns: int
    stages: int


@dataclasses.dataclass(frozen=True)
class BackwardTiles:
    """Sizes of the backward pass.

    Attributes:
        logits: Sizes of the kernel that computes cotangents of a chunk.
        chunk: Classes whose cotangents are stored at a time, a multiple of 256.
        hidden: Sizes for the gradient of hidden, (rows, features).
        weight: Sizes for the gradient of the weight. Of (D, V) the columns are classes:
            they divide the chunk, and are 128 with a gradient filter.
    """

    logits: Tiles
    chunk: int
    hidden: ProductTiles
    weight: ProductTiles

    def __str__(self) -> str:
        return f"{self.logits}, cotangents of {self.chunk} classes at a time"


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Sizes of a problem that determine the choice of tiles.

    Attributes:
        rows: N.
        features: D.
        vocabulary: V.
        numbers: Numbers per row and per class that are combined with logits.
        vocab_axis: The axis of the weight that runs over classes.
        rounded: Whether the weight is float32, and rounded to 16 bits.
        filtered: Whether there is a gradient filter.
    """

    rows: int
    features: int
    vocabulary: int
    numbers: int = 0
    vocab_axis: int = 0
    rounded: bool = False
    filtered: bool = False

    @property
    def row_tiles(self) -> int:
        return _ceil(self.rows, BLOCK)


def choose_tiles(shapes: Shapes, device: Gpu) -> ForwardTiles | None:
    """Tiles of the forward pass; None if none leaves enough registers."""
    classes = _classes(FORWARD_CLASSES, shapes)
    if classes is None:
        return None
    chunk = _copied(shapes) if shapes.rounded else None
    visited = shapes.vocabulary if chunk is None else chunk
    splits = _splits(shapes.row_tiles, _ceil(visited, classes), device)
    tiles = Tiles(classes, COLUMNS, _stages(classes, 0, device), splits)
    return ForwardTiles(tiles, chunk)


def _copied(shapes: Shapes) -> int:
    """Classes of a float32 weight that are copied at a time, in equal chunks."""
    most = max(COPY_BYTES // (2 * shapes.features) // WIDEST, 1) * WIDEST
    chunks = _ceil(shapes.vocabulary, most)
    return _ceil(_ceil(shapes.vocabulary, chunks), WIDEST) * WIDEST


def choose_backward_tiles(shapes: Shapes, device: Gpu) -> BackwardTiles | None:
    """Tiles of the backward pass; None if none leaves enough registers."""
    classes = _classes(BACKWARD_CLASSES, shapes)
    if classes is None:
        return None

    def cost(sizes: tuple[int, int]) -> float:
        correction = _measured.factor(device.name, NAME, sizes)
        return correction * seconds(shapes, sizes, device)

    return _backward_tiles(shapes, classes, min(candidates(shapes), key=cost), device)


def candidates(shapes: Shapes) -> list[tuple[int, int]]:
    """Classes of a chunk, and features of a tile of the gradients."""
    most = max(int(2 * SHARE * shapes.vocabulary), LEAST_CHUNK)
    most = min(most, MOST_CHUNK, _ceil(shapes.vocabulary, WIDEST) * WIDEST)
    least = _ceil(min(most, LEAST_CHUNK), WIDEST) * WIDEST
    return list(itertools.product(range(least, most + 1, WIDEST), PRODUCT_FEATURES))


def backward_tiles(
    shapes: Shapes, sizes: tuple[int, int], device: Gpu
) -> BackwardTiles | None:
    """Tiles of these sizes; None if none leaves enough registers."""
    classes = _classes(BACKWARD_CLASSES, shapes)
    if classes is None:
        return None
    return _backward_tiles(shapes, classes, sizes, device)


def _backward_tiles(
    shapes: Shapes, classes: int, sizes: tuple[int, int], device: Gpu
) -> BackwardTiles:
    chunk, features = sizes
    staging = 2 * WARPGROUPS * ROWS * 2

    def product(columns: int) -> ProductTiles:
        return ProductTiles(columns, _stages(columns, staging * SPAN, device))

    return BackwardTiles(
        Tiles(
            classes,
            COLUMNS,
            _stages(classes, staging * COLUMNS, device),
            _splits(shapes.row_tiles, chunk // classes, device),
        ),
        chunk,
        product(features),
        product(features if shapes.vocab_axis == 0 else _class_columns(shapes)),
    )


def _class_columns(shapes: Shapes) -> int:
    """Classes of a tile of the gradient of a weight (D, V).

    A gradient filter lists the rows for every 128 classes.
    """
    return BLOCK if shapes.filtered else WIDEST


def seconds(shapes: Shapes, sizes: tuple[int, int], device: Gpu) -> float:
    """Estimated time of the whole backward pass; infinite without tiles of logits."""
    chunk, features = sizes
    classes = _classes(BACKWARD_CLASSES, shapes)
    if classes is None:
        return math.inf
    logits = chunk // classes
    splits = _splits(shapes.row_tiles, logits, device)
    pieces = _ceil(shapes.features, features)
    columns, of_weight = features, chunk // BLOCK * pieces
    if shapes.vocab_axis == 1:
        columns = _class_columns(shapes)
        of_weight = _ceil(shapes.features, BLOCK) * (chunk // columns)
    # Products of one block of threads, times the rounds of its grid.
    products = (
        _rounds(shapes.row_tiles * splits, device)
        * (_ceil(logits, splits) * (classes + READING) * shapes.features)
        + _rounds(shapes.row_tiles * pieces, device) * (features + READING) * chunk
        + _rounds(of_weight, device) * (columns + READING) * shapes.rows
    )
    of_products = 2 * BLOCK * products / (device.flops / device.multiprocessors)
    moved = 8 * shapes.rows * pieces * features  # the gradient of hidden
    of_chunk = of_products + moved / device.bytes_per_second + 3 * LAUNCH
    return _ceil(shapes.vocabulary, chunk) * of_chunk


def _classes(sizes: tuple[tuple[int, int], ...], shapes: Shapes) -> int | None:
    return next((size for size, most in sizes if shapes.numbers <= most), None)


def _splits(row_tiles: int, tiles: int, device: Gpu) -> int:
    """The best number of splits of the tiles of classes; of equal ones the fewest."""
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
    """Number of slots of (128 + columns) x 64 elements of 2 bytes."""
    room = device.smem_bytes - SLACK_BYTES - staging_bytes
    return min(MOST_STAGES, room // ((BLOCK + columns) * SPAN * 2))


def _ceil(length: int, size: int) -> int:
    return -(-length // size)
