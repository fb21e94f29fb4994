"""Masks that compare the positions of query and key."""

from typing import Any

import numpy as np

from ._blocks import Block, divide, require_at_least
from ._mask import Mask


class Causal(Mask):
    """Key at or before the query: `key <= query + offset`.

    Args:
        offset: Static. `key_length - query_length` lets the last query see every key;
            0 aligns the first query with the first key.

    Example:
        >>> print(softlib.masks.Causal().materialize(3, 3).astype(int))
        [[1 0 0]
         [1 1 0]
         [1 1 1]]
    """

    offset: int = 0

    def attends(self, query_index, key_index):
        return key_index <= query_index + self.offset

    def block_status(self, query_start, query_stop, key_start, key_stop):
        every = key_stop - 1 <= query_start + self.offset
        some = key_start <= query_stop - 1 + self.offset
        return Block.of(some=some, every=every)

    def row_count(self, query_length, key_length: Any = None):
        seen = np.arange(query_length) + self.offset + 1
        return np.clip(seen, 0, key_length)


class Window(Mask):
    """A band around the diagonal: `-left <= key - query <= right`, ends included.

    Args:
        left: Static, at least 0; keys before the query. None for no limit.
        right: Static, at least 0; keys after the query. None for no limit.

    Raises:
        ValueError: A width is negative.

    Example:
        >>> print(softlib.masks.Window(left=1, right=0).materialize(3).astype(int))
        [[1 0 0]
         [1 1 0]
         [0 1 1]]
    """

    left: int | None
    right: int | None

    def __post_init__(self):
        for width in (self.left, self.right):
            if width is not None and width < 0:
                raise ValueError(
                    "Window: `left` and `right` must be non-negative or None, got "
                    f"left={self.left}, right={self.right}."
                )

    def attends(self, query_index, key_index):
        # Bounds per query, not distances per pair.
        if self.left is None and self.right is None:
            return (query_index == query_index) & (key_index == key_index)
        if self.left is None:
            return key_index <= query_index + self.right
        if self.right is None:
            return key_index >= query_index - self.left
        above = key_index >= query_index - self.left
        return above & (key_index <= query_index + self.right)

    def block_status(self, query_start, query_stop, key_start, key_stop):
        nearest, farthest = key_start - (query_stop - 1), key_stop - 1 - query_start
        every = some = nearest <= farthest
        if self.left is not None:
            every = every & (nearest >= -self.left)
            some = some & (farthest >= -self.left)
        if self.right is not None:
            every, some = (
                every & (farthest <= self.right),
                some & (nearest <= self.right),
            )
        return Block.of(some=some, every=every)

    def row_count(self, query_length, key_length: Any = None):
        query = np.arange(query_length)
        first = 0 if self.left is None else np.maximum(query - self.left, 0)
        stop = key_length
        if self.right is not None:
            stop = np.minimum(query + self.right + 1, key_length)
        return np.maximum(stop - first, 0)


class Dilated(Mask):
    """Every `stride`-th key, counted from the query: `(key - query) % stride == 0`.

    Limit its reach by `Dilated(stride) & Window(left, right)`.

    Args:
        stride: Static, at least 1; 1 keeps every pair.

    Raises:
        ValueError: The stride is not positive.

    Example:
        >>> print(softlib.masks.Dilated(2).materialize(4).astype(int))
        [[1 0 1 0]
         [0 1 0 1]
         [1 0 1 0]
         [0 1 0 1]]
    """

    stride: int

    def __post_init__(self):
        require_at_least(1, "Dilated", "stride", self.stride)

    def attends(self, query_index, key_index):
        # Remainders of positions, not of pairs: one comparison per pair.
        return divide(query_index, self.stride)[1] == divide(key_index, self.stride)[1]

    def block_status(self, query_start, query_stop, key_start, key_stop):
        # The block holds every difference from `least` to `most`.
        least, most = key_start - (query_stop - 1), key_stop - 1 - query_start
        some = most // self.stride * self.stride >= least
        every = (least == most) | (self.stride == 1)
        return Block.of(some=some, every=every)

    def row_count(self, query_length, key_length: Any = None):
        remainder = np.arange(query_length) % self.stride
        return (key_length - remainder + self.stride - 1) // self.stride
