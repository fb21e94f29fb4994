"""The base of masks: a small frozen value without a shape, composed with `& | ~`.

A mask is index arithmetic only, so that it works on NumPy arrays (block maps on the
host), on tracers, and inside a kernel. Every mask is a pytree. Integers are static: a
mask without arrays has no leaves and is a hashable compile-time constant. Arrays are
leaves and become operands.
"""

import dataclasses
import functools
from typing import Any, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np

from softlib._compiled_once import compiled_once

from . import _expression as expression
from ._blocks import Block, edges
from ._html import picture
from ._protocol import (
    array_field,
    checked_lengths,
    checked_row_count,
    checked_status,
    define_mask,
    evaluate,
    is_arithmetic,
    leaf_ranks,
    mask_field,
)


@dataclass_transform(frozen_default=True, field_specifiers=(array_field, mask_field))
@dataclasses.dataclass(frozen=True, repr=False)
class Mask:
    """A predicate on (query, key) pairs of positions: True means "attends".

    The base class of all masks. A mask has no shape; its positions are absolute.
    Combine masks with `&`, `|` and `~`. A mask without arrays is hashable and may be a
    static argument of `jax.jit`. A mask that holds arrays is passed like an array, and
    each of its arrays may have a leading batch axis. A mask prints as the expression
    that made it, with dtype and shape instead of each array; notebooks add a picture.

    Example:
        >>> mask = softlib.masks.Causal() & softlib.masks.Window(left=1, right=0)
        >>> print(mask.materialize(3, 3).astype(int))
        [[1 0 0]
         [1 1 0]
         [0 1 1]]
    """

    def __repr__(self) -> str:
        return expression.call(self)

    def _repr_html_(self) -> str | None:
        return picture(self)

    def __call__(self, query_index: Any, key_index: Any) -> Any:
        """True where the pair attends.

        Args:
            query_index: Integer positions, NumPy or JAX; broadcasts with `key_index`.
            key_index: Integer positions.

        Returns:
            Booleans of the broadcast shape; with a leading batch axis if an array of
            the mask has one. NumPy for NumPy indices and a mask without arrays.

        Raises:
            ValueError: An array of the mask has another rank than its class declares,
                not counting the batch axis.
        """
        return evaluate(_attends, self, query_index, key_index)

    def attends(self, query_index: Any, key_index: Any) -> Any:
        """Defines the mask: True where the pair attends. Every subclass writes it.

        To use a mask, call it. The call handles batch axes; here the arrays of the
        mask have none.

        Args:
            query_index: Integer positions: NumPy on the host, traced in a program or
                in a kernel. Comparisons and arithmetic work for all of them.
            key_index: Integer positions that broadcast with `query_index`.

        Returns:
            Booleans that broadcast to the shape of both.

        Raises:
            NotImplementedError: The class does not define it.
        """
        raise NotImplementedError

    @checked_status
    def block_status(
        self, query_start: Any, query_stop: Any, key_start: Any, key_stop: Any
    ) -> np.ndarray:
        """Classifies blocks of pairs without visiting tokens.

        Attention skips the blocks that are proved to be NONE. A class that does not
        write this method proves nothing: every block is SOME. A class that writes it
        may read static fields only: arrays are replaced by others without content.

        Args:
            query_start: Integers, NumPy; all four broadcast, so that a map of millions
                of blocks is a few array operations.
            query_stop: Exclusive; above `query_start`.
            key_start: Integers.
            key_stop: Exclusive; above `key_start`.

        Returns:
            `Block` values as int8, of the broadcast shape. NONE and ALL are proofs,
            SOME claims nothing. A class may return any integers that broadcast.
        """
        del query_start, query_stop, key_start, key_stop
        return np.asarray(Block.SOME, np.int8)

    @checked_row_count
    def row_count(self, query_length: int, key_length: int | None = None) -> Any:
        """Number of keys that each query attends to.

        By default, blocks that are ALL are counted whole, and blocks that are SOME
        pair by pair. A class may write a formula instead; it gets two integers.

        Args:
            query_length: Static number of queries.
            key_length: Static number of keys; None for as many as queries.

        Returns:
            int32 counts, shape `(query_length,)`, NumPy; JAX and perhaps with a leading
            batch axis for a mask that holds arrays.
        """
        assert key_length is not None
        count = _traced_row_count if jax.tree.leaves(self) else _blockwise_row_count
        return count(self, query_length, key_length)

    def density(self, query_length: int, key_length: int | None = None) -> float:
        """The fraction of pairs that attend, of a mask without arrays.

        Args:
            query_length: Number of queries.
            key_length: Number of keys; None for as many as queries.

        Raises:
            TypeError: The mask holds arrays, so that its density is data.
        """
        if jax.tree.leaves(self):
            raise TypeError(
                "density: the mask must hold no arrays, because its density is then "
                f"a property of the data, got {type(self).__name__}; average "
                "`row_count` instead."
            )
        query_length, key_length = checked_lengths("density", query_length, key_length)
        count = self.row_count(query_length, key_length).sum(dtype=np.int64)
        return float(count) / max(query_length * key_length, 1)

    def materialize(self, query_length: int, key_length: int | None = None) -> Any:
        """The mask as a boolean array; for tests, pictures and small cases.

        Args:
            query_length: Number of queries.
            key_length: Number of keys; None for as many as queries.

        Returns:
            Shape `(query_length, key_length)`, NumPy; JAX and perhaps with a leading
            batch axis for a mask that holds arrays.
        """
        query_length, key_length = checked_lengths(
            "materialize", query_length, key_length
        )
        query, key = np.arange(query_length)[:, None], np.arange(key_length)[None, :]
        attends = self(query, key)
        shape = (*attends.shape[:-2], query_length, key_length)
        if isinstance(attends, jax.Array):
            return jnp.broadcast_to(attends, shape)
        return np.broadcast_to(attends, shape)

    def shift(self, query_offset: Any, key_offset: Any = 0) -> "Mask":
        """The mask seen from a slice of the sequence.

        Args:
            query_offset: Absolute position of query 0: an int, or an integer array,
                scalar or one per batch entry (traced; then no block is skipped).
            key_offset: Absolute position of key 0: of the same kinds.
        """
        if isinstance(query_offset, int) and isinstance(key_offset, int):
            if query_offset == key_offset == 0:
                return self
            return Shifted(self, query_offset, key_offset)
        return ShiftedByArrays(self, jnp.asarray(query_offset), jnp.asarray(key_offset))

    def __and__(self, other: "Mask") -> "Mask":
        return And(self, other) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: "Mask") -> "Mask":
        return Or(self, other) if isinstance(other, Mask) else NotImplemented

    def __invert__(self) -> "Mask":
        return self.mask if isinstance(self, Not) else Not(self)

    def __bool__(self) -> bool:
        raise TypeError(
            "Mask: the truth value is undefined; use `&`, `|`, `~` instead of "
            "`and`, `or`, `not`, and `mask is not None` to test for presence."
        )

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        define_mask(cls)

    def _leaf_ranks(self) -> tuple[int, ...]:
        """Number of axes of each array but the batch axis, in the order of leaves."""
        return leaf_ranks(self)

    def _is_arithmetic(self) -> bool:
        """Whether a kernel, which cannot gather, can evaluate `attends`."""
        return is_arithmetic(self)

    def _within(self, query_length: int, key_length: int) -> "Mask":
        """A mask equal to this one below these lengths, perhaps cheaper per pair."""
        del query_length, key_length
        return self

    def _parts(self) -> "tuple[Mask, ...]":
        """The masks of which all must hold, of a conjunction."""
        return (self,)


def _attends(mask: Any, *indices: Any) -> Any:
    return mask.attends(*indices)


class All(Mask):
    """Every pair attends: the neutral element of `&`.

    Example:
        >>> print(softlib.masks.All().density(5))
        1.0
    """

    def attends(self, query_index, key_index):
        return (query_index == query_index) & (key_index == key_index)

    def block_status(self, query_start, query_stop, key_start, key_stop):
        return np.asarray(Block.ALL)

    def row_count(self, query_length, key_length: Any = None):
        return key_length


class And(Mask):
    """Pairs in both masks; written `left & right`."""

    left: Mask = mask_field()
    right: Mask = mask_field()

    def __repr__(self) -> str:
        return f"{_operand(self.left, Or)} & {_operand(self.right, And | Or)}"

    def attends(self, query_index, key_index):
        left = self.left.attends(query_index, key_index)
        return left & self.right.attends(query_index, key_index)

    def block_status(self, query_start, query_stop, key_start, key_stop):
        block = (query_start, query_stop, key_start, key_stop)
        return np.minimum(
            self.left.block_status(*block), self.right.block_status(*block)
        )

    def _within(self, query_length, key_length):
        lengths = (query_length, key_length)
        return And(self.left._within(*lengths), self.right._within(*lengths))

    def _parts(self):
        return (*self.left._parts(), *self.right._parts())


class Or(Mask):
    """Pairs in at least one mask; written `left | right`."""

    left: Mask = mask_field()
    right: Mask = mask_field()

    def __repr__(self) -> str:
        return f"{_operand(self.left, And)} | {_operand(self.right, And | Or)}"

    def attends(self, query_index, key_index):
        left = self.left.attends(query_index, key_index)
        return left | self.right.attends(query_index, key_index)

    def block_status(self, query_start, query_stop, key_start, key_stop):
        block = (query_start, query_stop, key_start, key_stop)
        return np.maximum(
            self.left.block_status(*block), self.right.block_status(*block)
        )

    def _within(self, query_length, key_length):
        lengths = (query_length, key_length)
        return Or(self.left._within(*lengths), self.right._within(*lengths))


class Not(Mask):
    """Pairs that are not in the mask; written `~mask`."""

    mask: Mask = mask_field()

    def __repr__(self) -> str:
        return f"~{_operand(self.mask, And | Or)}"

    def attends(self, query_index, key_index):
        return ~self.mask.attends(query_index, key_index)

    def block_status(self, query_start, query_stop, key_start, key_stop):
        block = (query_start, query_stop, key_start, key_stop)
        return Block.ALL - self.mask.block_status(*block)

    def _within(self, query_length, key_length):
        return Not(self.mask._within(query_length, key_length))

    def row_count(self, query_length, key_length: Any = None):
        return key_length - self.mask.row_count(query_length, key_length)


class Shifted(Mask):
    """A mask of absolute positions, evaluated at indices of a slice: `Mask.shift`."""

    mask: Mask = mask_field()
    query_offset: int
    key_offset: int

    def __repr__(self) -> str:
        offsets = [self.query_offset, self.key_offset][: 1 + bool(self.key_offset)]
        return _shifted(self.mask, *offsets)

    def attends(self, query_index, key_index):
        return self.mask.attends(
            query_index + self.query_offset, key_index + self.key_offset
        )

    def block_status(self, query_start, query_stop, key_start, key_stop):
        q, k = self.query_offset, self.key_offset
        return self.mask.block_status(
            query_start + q, query_stop + q, key_start + k, key_stop + k
        )

    def _within(self, query_length, key_length):
        q, k = self.query_offset, self.key_offset
        if min(q, k) < 0:
            return self
        return Shifted(self.mask._within(query_length + q, key_length + k), q, k)


class ShiftedByArrays(Mask):
    """A `Shifted` mask whose offsets are arrays, so that every block is SOME."""

    mask: Mask = mask_field()
    query_offset: Any = array_field(axes=0)
    key_offset: Any = array_field(axes=0)

    def __repr__(self) -> str:
        return _shifted(self.mask, self.query_offset, self.key_offset)

    def attends(self, query_index, key_index):
        return self.mask.attends(
            query_index + self.query_offset, key_index + self.key_offset
        )


def _operand(mask: Any, bracketed: Any) -> str:
    """The mask as an operand; bracketed for the reader even where Python needs none."""
    return f"({mask!r})" if isinstance(mask, bracketed) else repr(mask)


def _shifted(mask: Any, *offsets: Any) -> str:
    arguments = ", ".join(map(expression.argument, offsets))
    return f"{_operand(mask, And | Or | Not)}.shift({arguments})"


def block_map(
    mask: Mask, lengths: tuple[int, int], blocks: tuple[int, int]
) -> np.ndarray:
    """Classifies every block of a (query, key) grid.

    Args:
        mask: Any mask. Blocks that depend on its arrays are SOME.
        lengths: Static numbers of queries and keys.
        blocks: Static sizes of a block; the last of each axis may be short.

    Returns:
        `Block` values, int8, shape `(ceil(T / block_query), ceil(S / block_key))`.

    Raises:
        ValueError: A block size is not positive, or a length is negative.

    Example:
        >>> print(softlib.masks.block_map(softlib.masks.Causal(), (6, 6), (2, 3)))
        [[1 0]
         [2 1]
         [2 1]]
    """
    for name, pair, least in (("lengths", lengths, 0), ("blocks", blocks, 1)):
        if min(pair) < least:
            raise ValueError(
                f"block_map: `{name}` must be at least {least}, got {tuple(pair)}."
            )
    (query_start, query_stop), (key_start, key_stop) = map(edges, lengths, blocks)
    found = np.empty((len(query_start), len(key_start)), np.int8)
    # A few rows at a time: masks make temporaries of several int64 per block.
    rows = max(1, _BLOCKS_AT_ONCE // max(1, len(key_start)))
    for first in range(0, len(query_start), rows):
        some = slice(first, first + rows)
        found[some] = np.broadcast_to(
            mask.block_status(
                query_start[some, None],
                query_stop[some, None],
                key_start[None, :],
                key_stop[None, :],
            ),
            found[some].shape,
        )
    return found


_BLOCKS_AT_ONCE = 1 << 20
_COUNT_BLOCK = 128


@functools.lru_cache(maxsize=64)
def _blockwise_row_count(mask: Mask, query_length: int, key_length: int) -> np.ndarray:
    """Number of keys per query; pairs are visited only in blocks that are SOME."""
    blocks = block_map(mask, (query_length, key_length), (_COUNT_BLOCK, _COUNT_BLOCK))
    (query_start, query_stop), (key_start, key_stop) = (
        edges(query_length, _COUNT_BLOCK),
        edges(key_length, _COUNT_BLOCK),
    )
    count = np.zeros(query_length, np.int32)
    for row, kinds in enumerate(blocks):
        query = np.arange(query_start[row], query_stop[row])
        whole = kinds == Block.ALL
        found = np.full(len(query), (key_stop - key_start)[whole].sum(), np.int32)
        visited = np.flatnonzero(kinds == Block.SOME)
        if len(visited):
            key = np.concatenate(
                [np.arange(key_start[c], key_stop[c]) for c in visited]
            )
            attends = mask(query[:, None], key[None, :])
            shape = (len(query), len(key))
            found += np.broadcast_to(attends, shape).sum(1, dtype=np.int32)
        count[query] = found
    count.flags.writeable = False
    return count


@compiled_once(1, 2)
def _traced_row_count(mask: Mask, query_length: int, key_length: int) -> jax.Array:
    key = jnp.arange(key_length)[None, :]

    def of_block(start):
        query = (start + jnp.arange(_COUNT_BLOCK))[:, None]
        attends = mask(query, key)
        shape = (*attends.shape[:-2], _COUNT_BLOCK, key_length)
        return jnp.broadcast_to(attends, shape).sum(-1, dtype=jnp.int32)

    # One block of queries at a time, so that no (T, S) array exists.
    starts = jnp.arange(0, query_length, _COUNT_BLOCK)
    count = jnp.moveaxis(jax.lax.map(of_block, starts), 0, -2)
    return count.reshape(*count.shape[:-2], -1)[..., :query_length]
