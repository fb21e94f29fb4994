"""Masks of fixed regions: chunks, a prefix, global tokens, an explicit block mask."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from . import _expression as expression
from ._blocks import Block, divide, require_at_least
from ._mask import Mask


class Chunked(Mask):
    """Pairs in the same chunk of the sequence: `query // size == key // size`.

    Local attention without overlap; `Chunked(size) & Causal()` is its causal form.

    Args:
        size: Static, at least 1; positions per chunk.

    Raises:
        ValueError: The size is not positive.

    Example:
        >>> print(softlib.masks.Chunked(2).materialize(4).astype(int))
        [[1 1 0 0]
         [1 1 0 0]
         [0 0 1 1]
         [0 0 1 1]]
    """

    size: int

    def __post_init__(self):
        require_at_least(1, "Chunked", "size", self.size)

    def attends(self, query_index, key_index):
        return divide(query_index, self.size)[0] == divide(key_index, self.size)[0]

    def block_status(self, query_start, query_stop, key_start, key_stop):
        query_first, query_last = (
            query_start // self.size,
            (query_stop - 1) // self.size,
        )
        key_first, key_last = key_start // self.size, (key_stop - 1) // self.size
        some = (query_first <= key_last) & (key_first <= query_last)
        # Some chunk is common to both, so that all four are equal.
        every = some & (query_first == query_last) & (key_first == key_last)
        return Block.of(some=some, every=every)

    def row_count(self, query_length, key_length: Any = None):
        start = np.arange(query_length) // self.size * self.size
        return np.clip(key_length - start, 0, self.size).astype(np.int32)


class Prefix(Mask):
    """The first `length` keys, for every query.

    `Causal() | Prefix(length)` is the mask of a prefix language model: the prefix sees
    itself in both directions, the rest is causal. For lengths that are data, one per
    sequence, write `Padding(key=lengths)` instead.

    Args:
        length: Static, at least 0.

    Raises:
        ValueError: The length is negative.

    Example:
        >>> mask = softlib.masks.Causal() | softlib.masks.Prefix(2)
        >>> print(mask.materialize(4).astype(int))
        [[1 1 0 0]
         [1 1 0 0]
         [1 1 1 0]
         [1 1 1 1]]
    """

    length: int

    def __post_init__(self):
        require_at_least(0, "Prefix", "length", self.length)

    def attends(self, query_index, key_index):
        inside = (key_index >= 0) & (key_index < self.length)
        return inside & (query_index == query_index)

    def block_status(self, query_start, query_stop, key_start, key_stop):
        some, every = _meets(key_start, key_stop, 0, self.length)
        whole = query_start < query_stop
        return Block.of(some=some & whole, every=every)

    def row_count(self, query_length, key_length: Any = None):
        return min(self.length, key_length)


class GlobalTokens(Mask):
    """Pairs whose query or key is one of the positions `[start, stop)`.

    These tokens see everything and are seen by everything: text beside a video, summary
    tokens. `Window(w, w) | GlobalTokens(0, 4)` has four of them at the start;
    `(mask & ~GlobalTokens(n)) | GlobalTokens(n)` confines `mask` to the first `n`.

    Args:
        start: Static, at least 0; the first global position.
        stop: Static; one past the last. None for all from `start` on.

    Raises:
        ValueError: The start is negative, or the stop lies before it.

    Example:
        >>> print(softlib.masks.GlobalTokens(1, 2).materialize(3).astype(int))
        [[0 1 0]
         [1 1 1]
         [0 1 0]]
    """

    start: int
    stop: int | None = None

    def __post_init__(self):
        require_at_least(0, "GlobalTokens", "start", self.start)
        if self.stop is not None and self.stop < self.start:
            raise ValueError(
                "GlobalTokens: `stop` must be None or at least `start`, got "
                f"start={self.start}, stop={self.stop}."
            )

    def attends(self, query_index, key_index):
        return self._is_global(query_index) | self._is_global(key_index)

    def _is_global(self, index):
        if self.stop is None:
            return index >= self.start
        return (index >= self.start) & (index < self.stop)

    def block_status(self, query_start, query_stop, key_start, key_stop):
        query_some, query_every = _meets(query_start, query_stop, self.start, self.stop)
        key_some, key_every = _meets(key_start, key_stop, self.start, self.stop)
        # A pair is missing as soon as one query and one key are not global.
        return Block.of(some=query_some | key_some, every=query_every | key_every)

    def row_count(self, query_length, key_length: Any = None):
        stop = key_length if self.stop is None else min(self.stop, key_length)
        count = np.full(query_length, max(stop - self.start, 0), np.int32)
        count[self.start : self.stop] = key_length
        return count


class BlockArray:
    """A read-only boolean array with equality and hash by content."""

    def __init__(self, array: np.ndarray):
        self.array = np.array(array, bool)
        self.array.flags.writeable = False

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.array, dtype) if copy or dtype else self.array

    def __repr__(self) -> str:
        return expression.argument(self.array)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockArray):
            return NotImplemented
        return self is other or np.array_equal(self.array, other.array)

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.array.shape, np.packbits(self.array).tobytes()))

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """counts[i, j] is the number of True in array[:i, :j]."""
        rows, columns = self.array.shape
        # int32 holds any count below 2**31 blocks; int64 would double the memory.
        counts = np.zeros((rows + 1, columns + 1), np.int32)
        np.cumsum(self.array, 0, np.int32, counts[1:, 1:])
        np.cumsum(counts, 1, np.int32, counts)
        return counts


class Blocks(Mask):
    """An explicit block mask: `array[query // block_query, key // block_key]`.

    A position outside the array attends to nothing and is attended by nothing. Masks
    with equal content are equal and have equal hashes.

    Args:
        array: NumPy booleans, static, True for the blocks that attend. Copied.
        block: Static, at least 1: block size of both axes, or a pair (queries, keys).

    Raises:
        TypeError: The array does not hold booleans, or is traced.
        ValueError: It does not have two axes, or a block size is not positive.

    Cost: the status of any range of positions is exact and takes four reads of a
        summed-area table, 4 bytes per block. If a block of the computation covers
        blocks of the mask that differ, the array becomes a constant of the program and
        is gathered from per pair, which no kernel can do.

    Example:
        >>> mask = softlib.masks.Blocks(np.eye(2, dtype=bool), 2)
        >>> print(mask.materialize(4).astype(int))
        [[1 1 0 0]
         [1 1 0 0]
         [0 0 1 1]
         [0 0 1 1]]
    """

    array: Any
    block: int | tuple[int, int]

    def __post_init__(self):
        block = self.block if isinstance(self.block, tuple) else (self.block,) * 2
        if len(block) != 2:
            raise ValueError(
                "Blocks: `block` must be one size or a pair (queries, keys), got "
                f"{self.block}."
            )
        for size in block:
            require_at_least(1, "Blocks", "block", size)
        object.__setattr__(self, "block", block)
        if isinstance(self.array, BlockArray):
            return
        if not isinstance(self.array, np.ndarray) or self.array.dtype != np.bool_:
            kind = getattr(self.array, "dtype", type(self.array).__name__)
            raise TypeError(
                "Blocks: `array` must be a NumPy array of booleans (it is static), got "
                f"{type(self.array).__name__} of {kind}."
            )
        if self.array.ndim != 2:
            raise ValueError(
                "Blocks: `array` must have two axes (queries, keys), got shape "
                f"{self.array.shape}."
            )
        object.__setattr__(self, "array", BlockArray(self.array))

    def attends(self, query_index, key_index):
        array: Any = self.array.array
        if 0 in array.shape:
            return (query_index != query_index) & (key_index != key_index)
        (row, row_known), (column, column_known) = (
            _block_of(index, size, length)
            for index, size, length in zip(
                (query_index, key_index), self._sizes(), array.shape, strict=True
            )
        )
        if not (_is_numpy(row) and _is_numpy(column)):
            array = jnp.asarray(array)
        return array[row, column] & row_known & column_known

    def _sizes(self) -> tuple[int, int]:
        assert isinstance(self.block, tuple)
        return self.block

    def block_status(self, query_start, query_stop, key_start, key_stop):
        (block_query, block_key), (rows, columns) = (
            self._sizes(),
            self.array.array.shape,
        )
        top, bottom = query_start // block_query, (query_stop - 1) // block_query + 1
        left, right = key_start // block_key, (key_stop - 1) // block_key + 1
        touched = (bottom - top) * (right - left)
        top, bottom = np.clip(top, 0, rows), np.clip(bottom, 0, rows)
        left, right = np.clip(left, 0, columns), np.clip(right, 0, columns)
        counts = self.array.counts
        found = (counts[bottom, right] - counts[top, right]) - (
            counts[bottom, left] - counts[top, left]
        )
        # Blocks outside the array count as touched, never as found.
        return Block.of(some=found > 0, every=found == touched)

    def row_count(self, query_length, key_length: Any = None):
        (block_query, block_key), (rows, columns) = (
            self._sizes(),
            self.array.array.shape,
        )
        start = np.arange(columns) * block_key
        widths = np.clip(key_length - start, 0, block_key)
        per_row = np.zeros(max(rows, -(-query_length // block_query)), np.int64)
        per_row[:rows] = self.array.array @ widths
        return np.repeat(per_row, block_query)[:query_length].astype(np.int32)


def _meets(start: Any, stop: Any, first: int, last: int | None) -> tuple[Any, Any]:
    """Whether some, and whether all positions [start, stop) lie in [first, last)."""
    if last is None:
        return stop > first, start >= first
    some = (start < last) & (stop > first) & (first < last)
    return some, (start >= first) & (stop <= last)


def _is_numpy(index: Any) -> bool:
    return isinstance(index, np.ndarray | np.integer)


def _block_of(index: Any, size: int, blocks: int) -> tuple[Any, Any]:
    """Index of the block of each position, clipped, and whether there is one."""
    block, _ = divide(index, size)
    known = (block >= 0) & (block < blocks)
    return block.clip(0, blocks - 1), known
