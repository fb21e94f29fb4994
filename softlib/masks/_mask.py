"""What a mask is: a small frozen value without a shape, composed with `& | ~`.

Index arithmetic only: a mask works alike on NumPy arrays (block maps on the host), on
tracers, and inside a kernel. Every mask is a pytree. Integers are static, so a mask
without arrays has no leaves and is a hashable compile-time constant; arrays are leaves
and become operands.
"""

import dataclasses
import enum
import functools
from collections.abc import Callable
from typing import Any, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np

from softlib import _checks as checks
from softlib._compiled_once import compiled_once

from . import _expression as expression


class Block(enum.IntEnum):
    """What a mask holds in one block of (query, key) pairs.

    Attributes:
        NONE: No pair attends; proved.
        SOME: Nothing is claimed. Always a sound answer.
        ALL: Every pair attends; proved.

    The order makes `&` the minimum, `|` the maximum and `~` `2 - status`.

    Args:
        *args, **kwds: The number, as for any enumeration.

    Example:
        >>> status = softlib.masks.Causal().block_status(0, 4, 4, 8)
        >>> print(softlib.masks.Block(int(status)).name)
        NONE
    """

    NONE = 0
    SOME = 1
    ALL = 2


@dataclass_transform(frozen_default=True)
def mask_value(*leaves: str) -> Callable[[type], type]:
    """Makes a frozen dataclass that is a pytree.

    `leaves` are the fields that hold arrays or masks, in order; the others are static:
    hashable, and part of the structure of the tree. `__repr__` is the class's own.
    """

    def register(cls: type) -> type:
        cls = dataclasses.dataclass(frozen=True, repr=False)(cls)
        static = [f.name for f in dataclasses.fields(cls) if f.name not in leaves]
        return jax.tree_util.register_dataclass(cls, leaves, static)

    return register


@dataclasses.dataclass(frozen=True, repr=False)
class Mask:
    """Which (query, key) pairs may attend: True means "attends".

    The base of all masks. A mask has no shape: it is a predicate on absolute positions.
    Combine masks with `&`, `|` and `~`. A mask without arrays is hashable and may be a
    static argument of `jax.jit`; one that holds arrays is an argument like any array,
    and each of its arrays may have a leading batch axis. It prints as the expression
    that made it, with dtype and shape in the place of an array.

    Example:
        >>> mask = softlib.masks.Causal() & softlib.masks.Window(left=1, right=0)
        >>> print(mask.materialize(3, 3).astype(int))
        [[1 0 0]
         [1 1 0]
         [0 1 1]]
    """

    def __repr__(self) -> str:
        return expression.call(self)

    def __call__(self, query_index: Any, key_index: Any) -> Any:
        """True where the pair attends.

        Args:
            query_index: Integer positions, NumPy or JAX; broadcasts with `key_index`.
            key_index: Integer positions.

        Returns:
            Booleans of the broadcast shape; with a leading batch axis if an array of
            the mask has one. NumPy for NumPy indices and a mask without arrays.

        Raises:
            ValueError: An array of the mask has another rank, its batch axis aside.
        """
        return evaluate(self, query_index, key_index)

    def block_status(
        self, query_start: Any, query_stop: Any, key_start: Any, key_stop: Any
    ) -> np.ndarray:
        """Classifies blocks of pairs without visiting tokens.

        Args:
            query_start: Integers, NumPy; all four broadcast, so that a map of millions
                of blocks is a few array operations.
            query_stop: Exclusive; above `query_start`.
            key_start: Integers.
            key_stop: Exclusive; above `key_start`.

        Returns:
            `Block` values as int8, of the broadcast shape. NONE and ALL are proofs,
            SOME claims nothing.
        """
        block = (query_start, query_stop, key_start, key_stop)
        return np.asarray(self._status(*map(np.asarray, block)), np.int8)

    def row_count(self, query_length: int, key_length: int | None = None) -> Any:
        """How many keys each query attends to.

        Args:
            query_length: Static number of queries.
            key_length: Static number of keys; None for as many as queries.

        Returns:
            int32 counts, shape `(query_length,)`, NumPy; JAX and perhaps with a leading
            batch axis for a mask that holds arrays.
        """
        query_length, key_length = _lengths("row_count", query_length, key_length)
        if jax.tree.leaves(self):
            return _traced_row_count(self, query_length, key_length)
        return self._row_count(query_length, key_length)

    def density(self, query_length: int, key_length: int | None = None) -> float:
        """The fraction of pairs that attend. For a mask without arrays.

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
        query_length, key_length = _lengths("density", query_length, key_length)
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
        query_length, key_length = _lengths("materialize", query_length, key_length)
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
            key_offset: Absolute position of key 0, likewise.
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

    # What subclasses, decorated with `mask_value`, define: the definition and, to be
    # sparse, `_status`. The arrays of the mask have no batch axis here.
    def _attends(self, query_index: Any, key_index: Any) -> Any:
        raise NotImplementedError

    def _status(
        self,
        query_start: np.ndarray,
        query_stop: np.ndarray,
        key_start: np.ndarray,
        key_stop: np.ndarray,
    ) -> np.ndarray:
        shapes = map(np.shape, (query_start, query_stop, key_start, key_stop))
        return np.full(np.broadcast_shapes(*shapes), Block.SOME, np.int8)

    def _leaf_ranks(self) -> tuple[int, ...]:
        """Of each array of the mask, in the order of its leaves: axes but the batch."""
        return ()

    def _is_arithmetic(self) -> bool:
        """Is `_attends` arithmetic on the indices, without a look into an array?

        Then it can be evaluated inside a kernel, which cannot gather.
        """
        return True

    def _within(self, query_length: int, key_length: int) -> "Mask":
        """A mask that agrees below these positions and may be cheaper per pair."""
        del query_length, key_length
        return self

    def _row_count(self, query_length: int, key_length: int) -> np.ndarray:
        return _blockwise_row_count(self, query_length, key_length)


@mask_value()
class All(Mask):
    """Every pair attends: the neutral element of `&`.

    Example:
        >>> print(softlib.masks.All().density(5))
        1.0
    """

    def _attends(self, query_index, key_index):
        return (query_index == query_index) & (key_index == key_index)

    def _status(self, query_start, query_stop, key_start, key_stop):
        shapes = map(np.shape, (query_start, query_stop, key_start, key_stop))
        return np.full(np.broadcast_shapes(*shapes), Block.ALL, np.int8)

    def _row_count(self, query_length, key_length):
        return np.full(query_length, key_length, np.int32)


@mask_value("left", "right")
class And(Mask):
    """Pairs in both masks; written `left & right`."""

    left: Mask
    right: Mask

    def __repr__(self) -> str:
        return f"{_operand(self.left, Or)} & {_operand(self.right, And | Or)}"

    def _attends(self, query_index, key_index):
        left = self.left._attends(query_index, key_index)
        return left & self.right._attends(query_index, key_index)

    def _status(self, query_start, query_stop, key_start, key_stop):
        block = (query_start, query_stop, key_start, key_stop)
        return np.minimum(self.left._status(*block), self.right._status(*block))

    def _leaf_ranks(self):
        return self.left._leaf_ranks() + self.right._leaf_ranks()

    def _within(self, query_length, key_length):
        lengths = (query_length, key_length)
        return And(self.left._within(*lengths), self.right._within(*lengths))

    def _is_arithmetic(self):
        return self.left._is_arithmetic() and self.right._is_arithmetic()


@mask_value("left", "right")
class Or(Mask):
    """Pairs in at least one mask; written `left | right`."""

    left: Mask
    right: Mask

    def __repr__(self) -> str:
        return f"{_operand(self.left, And)} | {_operand(self.right, And | Or)}"

    def _attends(self, query_index, key_index):
        left = self.left._attends(query_index, key_index)
        return left | self.right._attends(query_index, key_index)

    def _status(self, query_start, query_stop, key_start, key_stop):
        block = (query_start, query_stop, key_start, key_stop)
        return np.maximum(self.left._status(*block), self.right._status(*block))

    def _leaf_ranks(self):
        return self.left._leaf_ranks() + self.right._leaf_ranks()

    def _within(self, query_length, key_length):
        lengths = (query_length, key_length)
        return Or(self.left._within(*lengths), self.right._within(*lengths))

    def _is_arithmetic(self):
        return self.left._is_arithmetic() and self.right._is_arithmetic()


@mask_value("mask")
class Not(Mask):
    """Pairs that are not in the mask; written `~mask`."""

    mask: Mask

    def __repr__(self) -> str:
        return f"~{_operand(self.mask, And | Or)}"

    def _attends(self, query_index, key_index):
        return ~self.mask._attends(query_index, key_index)

    def _status(self, query_start, query_stop, key_start, key_stop):
        block = (query_start, query_stop, key_start, key_stop)
        return Block.ALL - self.mask._status(*block)

    def _leaf_ranks(self):
        return self.mask._leaf_ranks()

    def _within(self, query_length, key_length):
        return Not(self.mask._within(query_length, key_length))

    def _row_count(self, query_length, key_length):
        return key_length - self.mask._row_count(query_length, key_length)

    def _is_arithmetic(self):
        return self.mask._is_arithmetic()


@mask_value("mask")
class Shifted(Mask):
    """A mask of absolute positions, on the indices of a slice; see `Mask.shift`."""

    mask: Mask
    query_offset: int
    key_offset: int

    def __repr__(self) -> str:
        offsets = [self.query_offset, self.key_offset][: 1 + bool(self.key_offset)]
        return _shifted(self.mask, *offsets)

    def _attends(self, query_index, key_index):
        return self.mask._attends(
            query_index + self.query_offset, key_index + self.key_offset
        )

    def _status(self, query_start, query_stop, key_start, key_stop):
        q, k = self.query_offset, self.key_offset
        return self.mask._status(
            query_start + q, query_stop + q, key_start + k, key_stop + k
        )

    def _leaf_ranks(self):
        return self.mask._leaf_ranks()

    def _within(self, query_length, key_length):
        q, k = self.query_offset, self.key_offset
        if min(q, k) < 0:
            return self
        return Shifted(self.mask._within(query_length + q, key_length + k), q, k)

    def _is_arithmetic(self):
        return self.mask._is_arithmetic()


@mask_value("mask", "query_offset", "key_offset")
class ShiftedByArrays(Mask):
    """As `Shifted`, with offsets that are data: every block is SOME."""

    mask: Mask
    query_offset: Any
    key_offset: Any

    def __repr__(self) -> str:
        return _shifted(self.mask, self.query_offset, self.key_offset)

    def _attends(self, query_index, key_index):
        return self.mask._attends(
            query_index + self.query_offset, key_index + self.key_offset
        )

    def _leaf_ranks(self):
        return (*self.mask._leaf_ranks(), 0, 0)

    def _is_arithmetic(self):
        return self.mask._is_arithmetic()


def _operand(mask: Any, bracketed: Any) -> str:
    """As part of an expression. Python needs fewer brackets, readers do not."""
    return f"({mask!r})" if isinstance(mask, bracketed) else repr(mask)


def _shifted(mask: Any, *offsets: Any) -> str:
    arguments = ", ".join(map(expression.argument, offsets))
    return f"{_operand(mask, And | Or | Not)}.shift({arguments})"


def evaluate(mask: Any, *indices: Any) -> Any:
    """The mask on positions; for each batch entry where arrays of it have that axis."""
    indices = tuple(
        index if isinstance(index, jax.Array) else np.asarray(index)
        for index in indices
    )
    leaves, structure = jax.tree.flatten(mask)
    axes = [
        _batch_axis(leaf, rank)
        for leaf, rank in zip(leaves, mask._leaf_ranks(), strict=True)
    ]
    if all(axis is None for axis in axes):
        return mask._attends(*indices)

    def one(leaves, indices):
        return jax.tree.unflatten(structure, leaves)._attends(*indices)

    leaves = [jnp.asarray(leaf) for leaf in leaves]
    return jax.vmap(one, in_axes=(axes, None))(leaves, indices)


def divide(index: Any, size: int) -> tuple[Any, Any]:
    """Quotient, rounded down, and remainder of positions by a static size."""
    if not isinstance(index, jax.Array):
        return index // size, index % size
    if size & (size - 1) == 0:
        return jnp.right_shift(index, size.bit_length() - 1), index & (size - 1)
    # Not `//`, whose sign function kernels for TPUs cannot lower without a device.
    quotient = jax.lax.div(index, jax.lax.full_like(index, size))
    quotient -= (index < quotient * size).astype(index.dtype)
    return quotient, index - quotient * size


def require_at_least(least: int, mask: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"{mask}: `{name}` must be a Python int (it is static), got "
            f"{type(value).__name__}."
        )
    if value < least:
        raise ValueError(f"{mask}: `{name}` must be at least {least}, got {value}.")


def _batch_axis(leaf: Any, rank: int) -> int | None:
    """Where an array of a mask has its batch axis, if it has one."""
    axes = np.ndim(leaf) - rank
    if axes not in (0, 1):
        raise ValueError(
            f"Mask: an array of the mask must have {rank} axes, or {rank + 1} with a "
            f"leading batch axis, got shape {np.shape(leaf)}."
        )
    return 0 if axes else None


def status(every: Any, some: Any) -> np.ndarray:
    """NONE where not `some`, ALL where `every`, else SOME; a class's own two proofs."""
    return np.asarray(np.add(some, every & some, dtype=np.int8))


def edges(length: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """First and one past the last index of each block; the last may be short."""
    start = np.arange(0, length, size, dtype=np.int64)
    return start, np.minimum(start + size, length)


def block_map(
    mask: Mask, lengths: tuple[int, int], blocks: tuple[int, int]
) -> np.ndarray:
    """Classifies every block of a (query, key) grid.

    Args:
        mask: Any mask; one that holds arrays is SOME wherever they decide.
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
    """Whole blocks are counted, only the others are looked into."""
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
        looked_into = np.flatnonzero(kinds == Block.SOME)
        if len(looked_into):
            key = np.concatenate(
                [np.arange(key_start[c], key_stop[c]) for c in looked_into]
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


def _lengths(
    function: str, query_length: int, key_length: int | None
) -> tuple[int, int]:
    if key_length is None:
        key_length = query_length
    for name, value in (("query_length", query_length), ("key_length", key_length)):
        if value != 0:
            checks.require_positive_integer(function, name, value)
    return query_length, key_length
