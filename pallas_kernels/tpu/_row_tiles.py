"""Tile sizes of the row-statistics kernels, from a cost model.

A forward pass takes 2 N V D operations, a backward one 4 N V D. The streamed operand is
read once per tile of the other: the weight N / rows times (forward and gradient of
hidden), hidden V / classes times (gradient of the weight). The model takes the slower
of products and memory, plus a constant per grid step. The cheapest sizes that fit in
vector memory are taken, of equal ones the smallest.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

from pallas_kernels import _measured
from pallas_kernels._devices import V4, Tpu

type Pass = Literal["forward", "hidden", "weight"]

# Seconds that the pipeline of a grid adds to each step.
STEP = 0.4e-6
# Share of vector memory; the rest is for the compiler's spills and copies.
SHARE = 0.75
LANES = 128
# Of the passes, in files of measured times.
NAMES: dict[Pass, str] = {
    "forward": "row statistics",
    "hidden": "row statistics, gradient of hidden",
    "weight": "row statistics, gradient of the weight",
}


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of a step.

    Attributes:
        rows: Rows of hidden.
        classes: Classes of the weight.
        features: Features summed over in one product; a divisor of D.
        vmem_bytes: Vector memory of the kernel.
    """

    rows: int
    classes: int
    features: int
    vmem_bytes: int

    def __str__(self) -> str:
        return f"tiles of {self.rows} rows x {self.classes} classes"


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Sizes of a problem that determine the choice of tiles."""

    rows: int
    features: int
    vocabulary: int
    hidden_bytes: int  # per element
    weight_bytes: int
    labels: bool = False
    filtered: bool = False


def choose_tiles(kind: Pass, shapes: Shapes, device: Tpu) -> Tiles | None:
    """The cheapest tiles; None if even the smallest do not fit."""

    def cost(tiles: Tiles) -> tuple[float, int]:
        correction = _measured.factor(device.name, NAMES[kind], sizes_of(shapes, tiles))
        estimate = seconds(kind, shapes, tiles, device)
        return correction * estimate, tiles.vmem_bytes

    return min(fitting(kind, shapes, device), key=cost, default=None)


def fitting(kind: Pass, shapes: Shapes, device: Tpu) -> Iterator[Tiles]:
    """The candidates that vector memory holds."""
    for found in _candidates(kind, shapes, _widths(shapes, device)):
        if found.vmem_bytes <= SHARE * device.vmem_bytes:
            yield found


def sizes_of(shapes: Shapes, tiles: Tiles) -> tuple[int, int, int]:
    """Rows, classes, and parts of the features: what times are measured by."""
    return tiles.rows, tiles.classes, shapes.features // tiles.features


def _widths(shapes: Shapes, device: Tpu) -> tuple[int, ...]:
    """Candidates for the classes of a tile: wider slices do not fit into registers."""
    widest = 512 if shapes.filtered else 1024
    if device == V4:
        widest //= 2
    return tuple(size for size in (128, 256, 512, 1024) if size <= widest)


def _candidates(kind: Pass, shapes: Shapes, widths: tuple[int, ...]) -> Iterator[Tiles]:
    for rows in _sizes(shapes.rows, (128, 256, 512, 1024), 16):
        for classes in _sizes(shapes.vocabulary, widths, LANES):
            for features in _divisors(shapes.features):
                yield tiles(kind, shapes, rows, classes, features)


def tiles(kind: Pass, shapes: Shapes, rows: int, classes: int, features: int) -> Tiles:
    """These sizes, with the vector memory that they need."""
    need = _vmem(kind, shapes, rows, classes, features)
    return Tiles(rows, classes, features, need)


def _sizes(length: int, sizes: tuple[int, ...], multiple: int) -> list[int]:
    """The sizes up to the length (rounded up); at least one."""
    whole = -(-length // multiple) * multiple
    return [*(size for size in sizes if size < whole), min(whole, sizes[-1])]


def _divisors(features: int) -> list[int]:
    """D itself and its divisors that are multiples of the lanes."""
    if features % LANES:
        return [features]
    count = features // LANES
    return [features // n for n in range(1, count + 1) if count % n == 0]


def _vmem(kind: Pass, shapes: Shapes, rows: int, classes: int, features: int) -> int:
    up = lambda n, m: -(-n // m) * m
    features_up = up(features, LANES)
    # Streamed arrays are double-buffered; a table is 128 lanes wide.
    tables = 2 * 4 * (rows * LANES * (2 + shapes.labels) + 8 * classes)
    divided = lambda size: 6 if size == 4 else 0  # three bfloat16 parts
    of_hidden = 2 * shapes.hidden_bytes + divided(shapes.hidden_bytes)
    of_weight = 2 * shapes.weight_bytes + divided(shapes.weight_bytes)
    streams = features_up * (rows * of_hidden + classes * of_weight)
    scratch = 4 * rows * (classes + LANES)
    if kind == "forward":
        return tables + streams + scratch
    widest = max(shapes.hidden_bytes, shapes.weight_bytes)
    scratch += (divided(widest) or 2) * rows * classes + 4 * rows * LANES
    whole = up(shapes.features, LANES)
    kept, size = (
        (rows, shapes.hidden_bytes)
        if kind == "hidden"
        else (classes, shapes.weight_bytes)
    )
    return tables + streams + scratch + kept * whole * (4 + 2 * size)


def seconds(kind: Pass, shapes: Shapes, tiles: Tiles, device: Tpu) -> float:
    """Estimated time of a pass with these tiles."""
    steps_rows = math.ceil(shapes.rows / tiles.rows)
    steps_classes = math.ceil(shapes.vocabulary / tiles.classes)
    splits = shapes.features // tiles.features
    padded = steps_rows * tiles.rows * steps_classes * tiles.classes * shapes.features
    counts = [
        3 if size == 4 else 1 for size in (shapes.hidden_bytes, shapes.weight_bytes)
    ]
    products = 2 * padded / device.flops * (1 if kind == "forward" else 2)
    products *= {1: 1, 3: 3, 9: 6}[math.prod(counts)]
    hidden = shapes.rows * shapes.features * shapes.hidden_bytes
    weight = shapes.vocabulary * shapes.features * shapes.weight_bytes
    # Split features are fetched once for the logits and once for the gradient.
    again = 2 if kind != "forward" and splits > 1 else 1
    if kind == "weight":
        moved = 2 * weight + hidden * steps_classes * again
        if splits > 1:
            moved += weight * steps_rows
    else:
        moved = 2 * hidden + weight * steps_rows * again
        if splits > 1:
            moved += hidden * steps_classes
    steps = steps_rows * steps_classes * splits * again
    return max(products, moved / device.bytes_per_second) + STEP * steps
