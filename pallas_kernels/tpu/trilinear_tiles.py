"""Sizes of the tiles of trilinear attention, and their cost model.

Tiles of queries are short, because each visits its own length of keys beyond a window;
heads and keys of the first axis fill the rows of a product. Vector registers bound the
rows and lanes of a tile of scores: at these sizes compilers spill none, or few where
features are many. Blocks of keys have several tiles, so that a step of the grid takes
longer than starting it.
"""

import dataclasses
from typing import Literal, NamedTuple

from pallas_kernels._devices import MIB, Tpu

LANES = 128
# Most blocks of one call: four words each, half a megabyte of scalar memory.
MOST_ENTRIES = 1 << 15

type Pass = Literal["forward", "query", "first", "second"]

# Vector memory of a kernel on every TPU by default, less a reserve for the compiler.
_VMEM_BYTES = 12 * MIB
# Seconds that the pipeline of a grid adds to each step.
_STEP = 0.4e-6
# Fraction of the peak that such short products reach.
_EFFICIENCY = 0.5
# Products per pair, over the features of queries and of values.
_PRODUCTS = {"forward": (1, 1), "query": (2, 1), "first": (2, 2), "second": (2, 2)}


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes, all static.

    Attributes:
        query: Queries of a tile.
        groups: Query heads of a tile, a divisor of those that share a key head.
        combined: Keys of the first axis multiplied into the queries at once.
        keys: Keys of the second axis per product.
        first: Keys of the first axis in a block, a multiple of `combined`.
        second: Keys of the second axis in a block, a multiple of `keys`.
    """

    query: int
    groups: int
    combined: int
    keys: int
    first: int
    second: int

    @property
    def counts(self) -> tuple[int, int]:
        """Numbers of tiles of either key axis in a block."""
        return self.first // self.combined, self.second // self.keys

    @property
    def rows(self) -> int:
        """Number of rows of a tile of queries, of all its heads."""
        return self.groups * self.query

    @property
    def scores(self) -> int:
        """Number of rows of a tile of scores."""
        return self.rows * self.combined

    def __str__(self) -> str:
        return f"tiles of {self.query} queries x {self.combined} x {self.keys} keys"


class Problem(NamedTuple):
    """Sizes of a problem that determine the choice of tiles.

    Attributes:
        groups: Query heads per key head.
        lengths: Lengths of the queries and of both key axes.
        features: H and E.
        pieces: Numbers of bfloat16 pieces of a left and of a right operand.
        wide: Bytes per element of the widest array.
    """

    groups: int
    lengths: tuple[int, int, int]
    features: tuple[int, int]
    pieces: tuple[int, int]
    wide: int


def choose_tiles(which: Pass, problem: Problem, device: Tpu) -> Tiles | None:
    """Tiles of the forward pass or of a gradient; None if none fits vector memory."""
    query, groups = 16, problem.groups
    rows, keys = _limits(which, problem, device)
    own = max(n for n in range(1, rows // query + 1) if groups % n == 0)
    combined = 1 << ((rows // (query * own)).bit_length() - 1)
    length = problem.lengths[2]
    keys = min(keys, -(-length // LANES) * LANES)
    for second in (512, 256, 128):
        second = min(second, 4 * keys, -(-length // keys) * keys)
        tiles = Tiles(query, own, combined, keys, 8 * combined, second)
        if vmem_bytes(which, tiles, problem) <= _VMEM_BYTES:
            return tiles
    return None


def _limits(which: Pass, problem: Problem, device: Tpu) -> tuple[int, int]:
    """Most rows of a tile of scores, and most keys of the second axis."""
    divided = max(problem.pieces) > 1
    if which == "second":
        # Tiles are transposed: rows fill the lanes.
        return 128, 64 if divided else 128
    if divided and which == "first":
        # Masks at the ends of keys take registers, too.
        return 16 if any(n % 512 for n in problem.lengths[1:]) else 32, 128
    if divided or device.vmem_bytes <= 16 * MIB:  # v4 unpacks bfloat16 in registers
        return 64, 128
    if which == "first" and max(problem.features) > LANES:
        return 64, 128
    return 128 if which == "forward" else 64, 256


def vmem_bytes(which: Pass, tiles: Tiles, problem: Problem) -> int:
    """An upper estimate of the vector memory."""
    features, (left, right) = sum(problem.features), problem.pieces
    owned = {"first": tiles.first, "second": tiles.second}.get(which, tiles.rows)
    keys = tiles.first + tiles.second
    # Double buffers of inputs and outputs.
    blocks = 2 * problem.wide * features * (tiles.rows + keys + owned)
    scratch = features * (4 * tiles.first + 2 * right * tiles.second)
    scratch += features * (4 * (tiles.rows + owned) + (2 * left + 4) * tiles.scores)
    per_row = 4 * 4 * LANES * tiles.scores
    scores = 4 * tiles.scores * max(tiles.keys, LANES) * (3 + 3 * left)
    return blocks + scratch + per_row + scores


def seconds(
    which: Pass, tiles: Tiles, problem: Problem, device: Tpu, visited: int, blocks: int
) -> float:
    """Estimated time of `visited` tiles of pairs in `blocks` blocks, per key head."""
    products = sum(
        n * size for n, size in zip(_PRODUCTS[which], problem.features, strict=True)
    )
    left, right = problem.pieces
    passes = (left * right + max(left, right)) // 2
    head_groups = problem.groups // tiles.groups
    pairs = float(visited) * tiles.scores * tiles.keys * head_groups
    work = 2 * pairs * products * passes
    return work / (_EFFICIENCY * device.flops) + blocks * head_groups * _STEP
