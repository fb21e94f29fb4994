"""Masks of attention to tuples of keys: one mask per key axis, and joint masks."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from softlib import _checks as checks

from . import _expression as expression
from ._blocks import Block, require_at_least
from ._mask import Mask
from ._protocol import evaluate, mask_field, mask_value


@mask_value
class Between:
    """A mask between two of the axes of (query, key 1, key 2, ...).

    It is for the argument `joint` of `PerAxis` and relates keys of a tuple to each
    other. `Between(2, 1, Causal(-1))` uses key 2 as the query of `Causal(-1)` and key
    1 as its key: it holds where key 1 comes before key 2, so for every unordered pair
    once. `Between(1, 2, ~Window(0, 0))` holds where the two keys are different.

    Args:
        first: Static axis that is the query of the mask: 0 for the query, 1 for the
            first key, and so on.
        second: Static axis that is the key of the mask.
        mask: The mask on these two positions.

    Raises:
        TypeError: An axis is not a Python int, or `mask` not a mask value.
        ValueError: The two axes are the same, or one is negative.

    Example:
        >>> before = softlib.masks.Between(2, 1, softlib.masks.Causal(-1))
        >>> pairs = softlib.masks.PerAxis(None, None, joint=before)
        >>> print(pairs.materialize(1, 3, 3)[0].astype(int))
        [[0 1 1]
         [0 0 1]
         [0 0 0]]
    """

    first: int
    second: int
    mask: Mask = mask_field()

    def __post_init__(self):
        for name in ("first", "second"):
            require_at_least(0, "Between", name, getattr(self, name))
        if self.first == self.second:
            raise ValueError(
                f"Between: `second` must be another axis than `first`, got "
                f"{self.second} for both."
            )
        # Transformations rebuild it with other objects in the field of its mask.
        if self.mask is None or (
            callable(self.mask) and not isinstance(self.mask, Mask)
        ):
            raise TypeError(
                f"Between: `mask` must be a mask value, got {type(self.mask).__name__}."
            )

    def __repr__(self) -> str:
        return expression.call(self)

    def _attends(self, *indices):
        self._require_axes(len(indices))
        return self.mask.attends(indices[self.first], indices[self.second])

    def _status(self, *edges):
        self._require_axes(len(edges) // 2)
        starts, stops = edges[::2], edges[1::2]
        return self.mask.block_status(
            *(starts[self.first], stops[self.first]),
            *(starts[self.second], stops[self.second]),
        )

    def _shift(self, *offsets):
        self._require_axes(len(offsets))
        mask = self.mask.shift(offsets[self.first], offsets[self.second])
        return Between(self.first, self.second, mask)

    def _permuted(self, order):
        self._require_axes(len(order) + 1)
        moved = lambda axis: order.index(axis - 1) + 1 if axis else 0
        return Between(moved(self.first), moved(self.second), self.mask)

    def _leaf_ranks(self):
        return self.mask._leaf_ranks()

    def _is_arithmetic(self):
        return self.mask._is_arithmetic()

    def _within(self, *lengths):
        self._require_axes(len(lengths))
        mask = self.mask._within(lengths[self.first], lengths[self.second])
        return Between(self.first, self.second, mask)

    def _require_axes(self, count: int) -> None:
        if max(self.first, self.second) >= count:
            raise ValueError(
                f"Between: `first` and `second` must be below {count}, the number of "
                f"axes with that of the queries, got {self.first} and {self.second}."
            )


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class PerAxis:
    """A mask of tuples of keys: one mask per key axis, and joint masks.

    A query at i attends to the keys (j, k, ...) if the mask of the first axis holds for
    (i, j), that of the second for (i, k), and so on, and if every joint mask holds.
    Like any mask it has no shape; without arrays it is hashable, with arrays it is
    passed like an array. A query is empty if one axis leaves it no key.

    Args:
        *axes: A mask value for each key axis; None where the axis is not restricted.
        joint: A mask of several keys at once: `Between`; or a function
            `joint(query_index, key_index_1, ...)` that returns booleans for NumPy and
            for JAX integers that broadcast; or a tuple of these, of which all must
            hold. A function is static and hashable: define it in a module, not as a
            lambda. If it has an attribute `block_status`, a function with the
            arguments of that method, attention skips blocks by it too.

    Raises:
        TypeError: An axis is neither a mask value nor None, or `joint` cannot be
            called.
        ValueError: No axis is given.

    Example:
        >>> near = softlib.masks.Window(left=1, right=0)
        >>> mask = softlib.masks.PerAxis(softlib.masks.Causal(), near)
        >>> print(mask.materialize(3, 3, 3)[2].astype(int))
        [[0 1 1]
         [0 1 1]
         [0 1 1]]
    """

    axes: tuple[Any, ...]
    joint: tuple[Any, ...]

    def __init__(self, *axes: Mask | None, joint: Any = None):
        if not axes:
            raise ValueError("PerAxis: `axes` must hold a mask per key axis, got none.")
        for axis in axes:
            if axis is not None and not isinstance(axis, Mask):
                raise TypeError(
                    "PerAxis: `axes` must hold mask values or None, got "
                    f"{type(axis).__name__}."
                )
        values = joint if isinstance(joint, tuple) else (joint,)
        values = tuple(_joint_value(value) for value in values if value is not None)
        object.__setattr__(self, "axes", axes)
        object.__setattr__(self, "joint", values)

    def __repr__(self) -> str:
        arguments = [*map(repr, self.axes)]
        if self.joint:
            joint = self.joint if len(self.joint) > 1 else self.joint[0]
            arguments.append(f"joint={joint!r}")
        return f"PerAxis({', '.join(arguments)})"

    def __call__(self, query_index: Any, *key_indices: Any) -> Any:
        """True where the query attends to the tuple of keys.

        Args:
            query_index: Integer positions, NumPy or JAX; broadcasts with the others.
            *key_indices: Integer positions, one array per key axis.

        Returns:
            Booleans of the broadcast shape; with a leading batch axis if an array of
            a mask has one.

        Raises:
            ValueError: There are not as many arrays as axes.
        """
        self._require_axes("PerAxis", "key_indices", len(key_indices))
        return evaluate(PerAxis._attends, self, query_index, *key_indices)

    def block_status(self, *edges: Any) -> np.ndarray:
        """Classifies blocks of (query, key, ...) tuples without visiting tokens.

        Args:
            *edges: Start and exclusive stop of the queries, then those of each key
                axis: integers, NumPy, that broadcast.

        Returns:
            `Block` values as int8, of the broadcast shape. NONE and ALL are proofs,
            SOME claims nothing.

        Raises:
            ValueError: There are not two numbers per axis.
        """
        if len(edges) != 2 * len(self.axes) + 2:
            raise ValueError(
                f"PerAxis: `edges` must be {2 * len(self.axes) + 2} arrays, start and "
                f"stop of the queries and of {len(self.axes)} key axes, got "
                f"{len(edges)}."
            )
        return np.asarray(self._status(*map(np.asarray, edges)), np.int8)

    def row_count(self, query_length: int, *key_lengths: int) -> Any:
        """Number of tuples of keys that each query attends to.

        Args:
            query_length: Static number of queries.
            *key_lengths: Static number of keys of each axis; one for all, or none for
                as many as queries.

        Returns:
            Integer counts, shape `(query_length,)`: NumPy, int64. For a mask that holds
            arrays: JAX, its default integer, perhaps with a leading batch axis.
        """
        lengths = self._lengths("row_count", query_length, key_lengths)
        if not self.joint:
            counts = [
                length if axis is None else axis.row_count(query_length, length)
                for axis, length in zip(self.axes, lengths, strict=True)
            ]
            found: Any = np.ones((1, query_length), int)
            for count in counts:
                if isinstance(count, int):
                    found = found * count
                else:
                    rows = count.astype(int)
                    found = found * (rows[None] if rows.ndim == 1 else rows)
            return found if any(np.ndim(count) == 2 for count in counts) else found[0]
        # A few queries at a time: the counted array holds all tuples.
        step = max(1, _TUPLES_AT_ONCE // max(1, np.prod(lengths)))
        starts = range(0, query_length, step)
        queries = [np.arange(i, min(i + step, query_length)) for i in starts]
        rows = [self._attended(query, lengths) for query in queries]
        if not rows:
            return np.zeros(0, int)
        xp: Any = jnp if isinstance(rows[0], jax.Array) else np
        axes = tuple(range(-len(lengths), 0))
        return xp.concatenate([row.sum(axes, dtype=int) for row in rows], axis=-1)

    def density(self, query_length: int, *key_lengths: int) -> float:
        """The fraction of (query, key, ...) tuples that attend, without arrays.

        Args:
            query_length: Number of queries.
            *key_lengths: Number of keys of each axis, as for `row_count`.

        Raises:
            TypeError: The mask holds arrays, so that its density is data.
        """
        if jax.tree.leaves(self):
            raise TypeError(
                "density: the mask must hold no arrays, because its density is then "
                "a property of the data; average `row_count` instead."
            )
        lengths = self._lengths("density", query_length, key_lengths)
        count = self.row_count(query_length, *lengths).sum()
        return float(count) / max(query_length * np.prod(lengths, dtype=float), 1)

    def materialize(self, query_length: int, *key_lengths: int) -> Any:
        """The mask as a boolean array; for tests, pictures and small cases.

        Args:
            query_length: Number of queries.
            *key_lengths: Number of keys of each axis, as for `row_count`.

        Returns:
            Shape `(query_length, *key_lengths)`, NumPy; JAX and perhaps with a leading
            batch axis for a mask that holds arrays.
        """
        lengths = self._lengths("materialize", query_length, key_lengths)
        return self._attended(np.arange(query_length), lengths)

    def shift(self, query_offset: int, *key_offsets: int) -> "PerAxis":
        """The mask seen from a slice of the sequences.

        Args:
            query_offset: Static absolute position of query 0.
            *key_offsets: Static absolute position of key 0 of each axis; none for 0.
        """
        offsets = key_offsets or (0,) * len(self.axes)
        self._require_axes("PerAxis", "key_offsets", len(offsets))
        if not any((query_offset, *offsets)):
            return self
        axes = [
            None if axis is None else axis.shift(query_offset, offset)
            for axis, offset in zip(self.axes, offsets, strict=True)
        ]
        joint = tuple(mask._shift(query_offset, *offsets) for mask in self.joint)
        return PerAxis(*axes, joint=joint)

    def __bool__(self) -> bool:
        raise TypeError(
            "PerAxis: the truth value is undefined; use `mask is not None` to test for "
            "presence."
        )

    def _permuted(self, order: tuple[int, ...]) -> "PerAxis":
        """The mask of the same key axes in another order."""
        if order == tuple(range(len(self.axes))):
            return self
        joint = tuple(mask._permuted(order) for mask in self.joint)
        return PerAxis(*(self.axes[i] for i in order), joint=joint)

    def _attended(self, query_index: np.ndarray, lengths: tuple[int, ...]) -> Any:
        indices = [query_index, *map(np.arange, lengths)]
        return self(*np.ix_(*indices))

    # The protocol of `Mask`, with one index per axis.
    def _attends(self, query_index, *key_indices):
        found = [
            axis.attends(query_index, index)
            for axis, index in zip(self.axes, key_indices, strict=True)
            if axis is not None
        ]
        found += [mask._attends(query_index, *key_indices) for mask in self.joint]
        if not found:
            return functools.reduce(
                lambda a, b: a & b, [i == i for i in (query_index, *key_indices)]
            )
        return functools.reduce(lambda a, b: a & b, found)

    def _status(self, *edges):
        found = [
            axis.block_status(*edges[:2], *edges[2 * i + 2 : 2 * i + 4])
            for i, axis in enumerate(self.axes)
            if axis is not None
        ]
        found += [mask._status(*edges) for mask in self.joint]
        shape = np.broadcast_shapes(*map(np.shape, edges))
        return functools.reduce(np.minimum, found, np.full(shape, Block.ALL, np.int8))

    def _leaf_ranks(self):
        masks = [*(axis for axis in self.axes if axis is not None), *self.joint]
        return tuple(rank for mask in masks for rank in mask._leaf_ranks())

    def _is_arithmetic(self):
        masks = [*(axis for axis in self.axes if axis is not None), *self.joint]
        return all(mask._is_arithmetic() for mask in masks)

    def _within(self, query_length, *key_lengths):
        axes = [
            None if axis is None else axis._within(query_length, length)
            for axis, length in zip(self.axes, key_lengths, strict=True)
        ]
        joint = tuple(mask._within(query_length, *key_lengths) for mask in self.joint)
        return _rebuilt(None, (tuple(axes), joint))

    def _lengths(
        self, function: str, query_length: int, key_lengths: tuple[int, ...]
    ) -> tuple[int, ...]:
        if len(key_lengths) <= 1:
            key_lengths = (key_lengths or (query_length,)) * len(self.axes)
        self._require_axes(function, "key_lengths", len(key_lengths))
        named = {"query_length": (query_length,), "key_lengths": key_lengths}
        for name, lengths in named.items():
            for length in lengths:
                if length != 0:
                    checks.require_positive_integer(function, name, length)
        return key_lengths

    def _require_axes(self, function: str, name: str, count: int) -> None:
        if count != len(self.axes):
            raise ValueError(
                f"{function}: `{name}` must be as many as the mask has key axes, "
                f"{len(self.axes)}, got {count}."
            )


def _rebuilt(structure: None, children: Any) -> PerAxis:
    """A `PerAxis` without checks: transformations put other objects for its arrays."""
    del structure
    value = object.__new__(PerAxis)
    for name, child in zip(("axes", "joint"), children, strict=True):
        object.__setattr__(value, name, child)
    return value


jax.tree_util.register_pytree_node(
    PerAxis, lambda mask: ((mask.axes, mask.joint), None), _rebuilt
)


_TUPLES_AT_ONCE = 1 << 24


@mask_value
class _Called:
    """A joint mask that is a user's function of all indices."""

    call: Any = mask_field()
    # For each argument of the call: the axis of its positions, and their offset.
    order: tuple[int, ...] = ()
    offsets: tuple[int, ...] = ()

    def __repr__(self) -> str:
        moved = self.order or self.offsets
        return expression.call(self) if moved else repr(self.call)

    def _attends(self, *indices):
        return self._function(*self._absolute(indices))

    def _status(self, *edges):
        proof = getattr(self._function, "block_status", None)
        if proof is None:
            shape = np.broadcast_shapes(*map(np.shape, edges))
            return np.full(shape, Block.SOME, np.int8)
        pairs = zip(
            self._absolute(edges[::2]), self._absolute(edges[1::2]), strict=True
        )
        return proof(*itertools.chain(*pairs))

    @property
    def _function(self):
        return self.call.function if isinstance(self.call, _Static) else self.call

    def _absolute(self, positions):
        order = self.order or range(len(positions))
        offsets = self.offsets or (0,) * len(positions)
        return [positions[i] + n for i, n in zip(order, offsets, strict=True)]

    def _shift(self, *offsets):
        order = self.order or range(len(offsets))
        before = self.offsets or (0,) * len(offsets)
        moved = [n + offsets[i] for i, n in zip(order, before, strict=True)]
        return _Called(self.call, self.order, tuple(moved))

    def _permuted(self, order):
        # Key axis i moves to its index in the new order.
        moved = lambda axis: order.index(axis - 1) + 1 if axis else 0
        before = self.order or range(len(order) + 1)
        return _Called(self.call, tuple(map(moved, before)), self.offsets)

    def _leaf_ranks(self):
        return tuple(map(np.ndim, jax.tree.leaves(self.call)))

    def _is_arithmetic(self):
        return not jax.tree.leaves(self.call)

    def _within(self, *lengths):
        del lengths
        return self


@mask_value
class _Static:
    """A function as a node of a pytree, without leaves."""

    function: Callable[..., Any]

    def __repr__(self) -> str:
        return getattr(self.function, "__name__", None) or repr(self.function)


def _joint_value(joint: Any) -> Any:
    if isinstance(joint, Between | _Called):
        return joint
    if isinstance(joint, Mask) or not callable(joint):
        raise TypeError(
            "PerAxis: `joint` must be Between, a function of all indices or a tuple of "
            f"these, got {type(joint).__name__}."
        )
    # A function is a leaf to JAX; a value with arrays in it is a tree of its own.
    leaves = jax.tree.leaves(joint)
    if len(leaves) == 1 and leaves[0] is joint:
        joint = _Static(joint)
    return _Called(joint)
