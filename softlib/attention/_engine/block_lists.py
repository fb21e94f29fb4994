"""Lists of the blocks that a mask leaves, at the block sizes that cost least."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from softlib import masks
from softlib.masks import Block, PerAxis

from .host import has_few_cores


class _Price(NamedTuple):
    """Relative time per pair in a block of some size; 1 in a large block.

    Attributes:
        rate: Time without a mask: small blocks cost more, for steps of the loop and
            for narrow products.
        mask: Additional time for evaluating the mask.
    """

    rate: float
    mask: float


# Measured on CPUs with d = 64.
_PRICES = {512: _Price(1.0, 0.3), 256: _Price(1.1, 0.33), 128: _Price(1.5, 0.45)}
# On 2 cores, where every step is one batch head (`batch_heads`): tiles of 128 stay in
# the private cache, and masks cost more in them. Tiles of 64 gained nothing.
_PRICES_ON_FEW_CORES = {
    512: _Price(1.0, 0.15),
    256: _Price(1.1, 0.4),
    128: _Price(1.02, 0.6),
}
# With several key axes all but the last have small blocks, because every combination of
# their keys is a set of rows of a tile.
_QUERIES, _KEYS, _COMBINATIONS = (256, 128, 64, 32, 16), (512, 256, 128), (16, 8)
# With several key axes, evaluating the mask costs this fraction of a block's products.
_PARTIAL = 0.3
# Scores of one step beyond this leave the caches of most CPUs.
_SCORES = 1 << 20
_BLOCKS_AT_ONCE = 1 << 20
# Sizes are chosen from this number of rows of blocks, evenly spaced.
_SAMPLE = 64


@runtime_checkable
class Sizes(Protocol):
    """Sizes of blocks for some machine, hashable and equal by value."""

    def candidates(
        self, lengths: tuple[int, ...], blocks: tuple[int | None, ...]
    ) -> list[tuple[int, ...]]:
        """Sizes to choose from, the largest first; `blocks` are the given ones."""
        ...

    def cost(self, sizes: tuple[int, ...], visited: float, whole: float) -> float:
        """Time of so many visited blocks; no mask is evaluated in the whole ones."""
        ...


@functools.lru_cache(maxsize=128)
def lists(
    skeleton: Any,
    lengths: tuple[int, ...],
    blocks: tuple[int | None, ...],
    all_partial: bool,
    sizes: Sizes,
) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    """Blocks that are ALL, blocks that are SOME, and the sizes that cost least.

    `skeleton` is a mask without its arrays, `blocks` the sizes that are given.
    """
    _, chosen = cheapest(skeleton, lengths, blocks, sizes)
    found, whole = _listed(skeleton.mask, lengths, chosen)
    if all_partial:
        whole = np.zeros_like(whole)
    whole, partial = found[:, whole], found[:, ~whole]
    whole.flags.writeable = partial.flags.writeable = False
    return whole, partial, chosen


@functools.lru_cache(maxsize=128)
def cheapest(
    skeleton: Any,
    lengths: tuple[int, ...],
    blocks: tuple[int | None, ...],
    sizes: Sizes,
) -> tuple[float, tuple[int, ...]]:
    """The cost of the block sizes that cost least, and these.

    Joint masks of several key axes do not take part in the choice.
    """
    costs = {}
    for candidate in sizes.candidates(lengths, blocks):
        rows = -(-lengths[0] // candidate[0])
        sample = np.unique(np.linspace(0, rows - 1, min(rows, _SAMPLE), dtype=int))
        maps = _maps(skeleton.mask, lengths, candidate, sample)
        of_sample = rows / max(len(sample), 1)
        visited, whole = (
            _count(maps, least) * of_sample for least in (Block.SOME, Block.ALL)
        )
        costs[candidate] = sizes.cost(candidate, visited, whole)
    best = min(costs, key=lambda sizes: costs[sizes])
    return costs[best], best


@dataclasses.dataclass(frozen=True)
class CpuSizes:
    """Blocks whose scores stay in the caches of a CPU, with costs measured on CPUs.

    The cost is in pairs of large blocks. `groups` are the query heads whose scores
    exist together.
    """

    groups: int

    def candidates(
        self, lengths: tuple[int, ...], blocks: tuple[int | None, ...]
    ) -> list[tuple[int, ...]]:
        def fitted(wanted: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(
                _short(size, length) if given is None else given
                for size, length, given in zip(wanted, lengths, blocks, strict=True)
            )

        every = list(dict.fromkeys(map(fitted, _wanted(len(lengths)))))
        # Too many scores for one step: the smallest blocks.
        fits = lambda sizes: self.groups * math.prod(sizes) <= _SCORES
        return list(filter(fits, every)) or every[-1:]

    def cost(self, sizes: tuple[int, ...], visited: float, whole: float) -> float:
        rate, mask = self._price(sizes)
        return math.prod(sizes) * (rate * visited + mask * (visited - whole))

    def _price(self, sizes: tuple[int, ...]) -> _Price:
        if len(sizes) == 2:
            prices, smallest = _prices(), min(sizes)
            fitting = (n for n in sorted(prices) if smallest <= n)
            return prices[next(fitting, max(prices))]
        rows = self.groups * math.prod(sizes[:-1])
        rate = 0.85 + 57 / sizes[-1] + 40 / rows
        return _Price(rate, _PARTIAL * rate)


def _prices() -> dict[int, _Price]:
    return _PRICES_ON_FEW_CORES if has_few_cores() else _PRICES


def _wanted(axes: int) -> Iterator[tuple[int, ...]]:
    if axes == 2:
        for size in _prices():
            yield size, size
        return
    # About `combinations` in all, spread over the key axes before the last.
    for query, key, combinations in itertools.product(_QUERIES, _KEYS, _COMBINATIONS):
        each = max(2, round(combinations ** (1 / (axes - 2))))
        yield (query, *(each,) * (axes - 2), key)


def _short(size: int, length: int) -> int:
    # A short axis is one block, padded to whole vector registers.
    return min(size, max(8, -(-length // 8) * 8))


def _maps(
    mask: Any, lengths: tuple[int, ...], sizes: tuple[int, ...], rows: np.ndarray
) -> list[np.ndarray]:
    """Block status under the mask of each key axis, in these rows of blocks.

    A block with padding is never ALL.
    """
    axes = mask.axes if isinstance(mask, PerAxis) else (mask,)
    query = _edges(rows[:, None], lengths[0], sizes[0])
    found = []
    for axis, length, size in zip(axes, lengths[1:], sizes[1:], strict=True):
        columns = np.arange(-(-length // size))[None, :]
        axis = masks.All() if axis is None else axis
        kinds = axis.block_status(*query, *_edges(columns, length, size))
        kinds = np.broadcast_to(kinds, (len(rows), columns.size))
        if length % size:  # the last keys are padding
            last = columns == columns.size - 1
            kinds = np.where(last, np.minimum(kinds, Block.SOME), kinds)
        found.append(kinds)
    return found


def _edges(block: np.ndarray, length: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    return block * size, np.minimum((block + 1) * size, length)


def _count(maps: Sequence[np.ndarray], least: Block) -> int:
    """Number of blocks whose status is at least `least` on every key axis."""
    per_row = [(kinds >= least).sum(1, dtype=np.int64) for kinds in maps]
    return int(functools.reduce(np.multiply, per_row).sum())


def _listed(
    mask: Any, lengths: tuple[int, ...], sizes: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the blocks that are not NONE, row by row, and True for ALL."""
    rows, *columns = (
        -(-length // size) for length, size in zip(lengths, sizes, strict=True)
    )
    # A few rows at a time: masks make temporaries of several int64 per block.
    step = max(1, _BLOCKS_AT_ONCE // max(1, *columns))
    indices = [np.zeros((len(sizes), 0), np.int32)]
    kinds = [np.zeros(0, np.int8)]
    for first in range(0, rows, step):
        some = np.arange(first, min(first + step, rows))
        maps = _maps(mask, lengths, sizes, some)
        found = np.stack(np.nonzero(maps[0])) if len(maps) == 1 else _products(maps)
        kind = np.full(found.shape[1], Block.ALL, np.int8)
        for axis, column in zip(maps, found[1:], strict=True):
            kind = np.minimum(kind, axis[found[0], column])
        found[0] += first
        if isinstance(mask, PerAxis) and mask.joint:
            edges = tuple(itertools.chain(*map(_edges, found, lengths, sizes)))
            for joint in mask.joint:
                kind = np.minimum(kind, joint._status(*edges))
            found, kind = found[:, kind != Block.NONE], kind[kind != Block.NONE]
        indices.append(found.astype(np.int32))
        kinds.append(kind)
    return np.concatenate(indices, 1), np.concatenate(kinds) == Block.ALL


def _products(maps: Sequence[np.ndarray]) -> np.ndarray:
    """Indices (row, *columns) of all combinations of columns that the maps leave."""
    indices = [np.zeros((1 + len(maps), 0), np.int64)]
    for row in range(len(maps[0])):
        left = (np.flatnonzero(kinds[row]) for kinds in maps)
        columns = [column.ravel() for column in np.meshgrid(*left, indexing="ij")]
        indices.append(np.stack([np.full(columns[0].shape, row), *columns]))
    return np.concatenate(indices, axis=1)
