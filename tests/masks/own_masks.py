"""Masks that are written outside of the library, as its users would."""

from typing import Any

import numpy as np

from softlib import masks


class Neighbours(masks.Mask):
    """Pairs in the same chunk, and those whose key is in the chunk before."""

    size: int

    def attends(self, query_index, key_index):
        chunks = query_index // self.size - key_index // self.size
        return (chunks == 0) | (chunks == 1)

    def block_status(self, query_start, query_stop, key_start, key_stop):
        nearest = query_start // self.size - (key_stop - 1) // self.size
        farthest = (query_stop - 1) // self.size - key_start // self.size
        some, every = (nearest <= 1) & (farthest >= 0), (nearest >= 0) & (farthest <= 1)
        return masks.Block.of(some=some, every=every)


class Strided(masks.Mask):
    """Causal; of the keys those that `stride` divides."""

    stride: int = 4

    def attends(self, query_index, key_index):
        return (key_index <= query_index) & (key_index % self.stride == 0)

    def block_status(self, query_start, query_stop, key_start, key_stop):
        some = -(-key_start // self.stride) * self.stride < np.minimum(
            key_stop, query_stop
        )
        return np.where(some, masks.Block.SOME, masks.Block.NONE)

    def row_count(self, query_length, key_length: Any = None):
        return np.minimum(np.arange(query_length), key_length - 1) // self.stride + 1


class DocumentPrefix(masks.Mask):
    """Causal, but the first keys of each document are seen by all of its queries."""

    length: Any = masks.array_field(axes=0)

    def attends(self, query_index, key_index):
        return (key_index <= query_index) | (key_index < self.length)

    def block_status(self, query_start, query_stop, key_start, key_stop):
        return np.where(key_stop - 1 <= query_start, masks.Block.ALL, masks.Block.SOME)


class Visible(masks.Mask):
    """Keys that an array shows; a look-up, which no kernel can do."""

    keys: Any = masks.array_field(axes=1)

    def attends(self, query_index, key_index):
        return self.keys[key_index]
