"""The operands of logits that are made block by block, and their part in the loops.

Any value that says which of its arrays belong to rows, to classes, to both or to all,
and how to compute the raw logits of whatever rows and classes it is cut down to. JAX
differentiates that computation, one block at a time.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from softlib._dtypes import accumulator_dtype
from softlib._sharding import match_varying
from softlib._symbolic import is_symbolic

from . import chunks as _chunks, tile_gradient
from .chunks import Index, RowCut
from .operand import Copied, Write
from .tile import Modifiers, Options, Ranked
from .tile_gradient import RawCotangents


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which axes of an array are the rows and the classes of logits.

    Attributes:
        rows: Whether the first axes are the batch.
        class_axis: The axis that is the classes; None: there is none.
    """

    rows: bool = False
    class_axis: int | None = None

    @property
    def is_entry(self) -> bool:
        """One number, or more, for each pair of a row and a class."""
        return self.rows and self.class_axis is not None


class Value(Protocol):
    """A pytree of arrays that are slices of rows and classes."""

    def layout(self) -> Any:
        """The same tree with a `Layout` in the place of each array."""
        ...

    def block(self) -> Array:
        """The raw logits (rows, classes) of these arrays."""
        ...


class BlockRowSums(NamedTuple):
    """What the backward pass adds up per row."""

    arrays: tuple[Array, ...]
    logit_scale: Float[Array, " rows"] | None
    temperature: Float[Array, " rows"] | None


class BlockClassSums(NamedTuple):
    """What it adds up per class, for all classes alike, and writes per entry."""

    arrays: tuple[Array, ...]
    shared: tuple[Array, ...]
    entries: tuple[Array, ...]
    bias: Float[Array, " classes"] | None
    class_log_weights: Float[Array, " classes"] | None


class Blocks(NamedTuple):
    """The operands of a row-statistics operation on blocks; rows are one axis."""

    value: Any  # a Value, whose arrays have rows in the place of the batch
    labels: Int[Array, "rows L"] | None  # -1 for a label outside the vocabulary
    modifiers: Modifiers
    ranked: Ranked | None = None
    # The group of rows that entries are still to be cut down to, together with a slice
    # of the classes: the rows of a group with all classes would be a copy of its size.
    deferred: tuple[RowCut, Index | None] | None = None
    # In the structure, because it is static: None of a slice of the classes.
    all_classes: tuple[()] | None = ()

    @property
    def dtype(self) -> Any:
        floating = [a for a in jax.tree.leaves(self.value) if _is_floating(a)]
        return accumulator_dtype(*floating, *self.modifiers.floating)

    @property
    def rows(self) -> int:
        if self.deferred is not None:
            cut, group = self.deferred
            return cut.rest if group is None else cut.size
        return self._first(lambda layout: layout.rows)[1].shape[0]

    @property
    def features(self) -> int:
        """Numbers per row, and per class, that a step reads: for the cost model."""
        sizes = [
            array.size // max(array.shape[layout.class_axis], 1)
            for layout, array in self._arrays
            if layout.class_axis is not None and not layout.rows
        ]
        return max([1, *filter(lambda size: not is_symbolic(size), sizes)])

    @property
    def like(self) -> Array:
        return self._first(lambda layout: layout.rows)[1]

    def vocabulary(self, options: Options) -> int:
        layout, array = self._first(lambda layout: layout.class_axis is not None)
        return array.shape[layout.class_axis or 0]

    def is_one_tile(self, options: Options, rows: int) -> bool:
        """Whether the logits are few."""
        if is_symbolic(rows):
            return False
        return rows * self.vocabulary(options) <= _chunks.WHOLE

    def lies_across(self, options: Options) -> bool:
        return False

    # ------------------------------------------------------------------------- slices
    def rows_of(self, cut: RowCut, group: Index | None) -> "Blocks":
        if cut.whole:
            return self
        take = lambda tree: cut.take(tree, group)
        defers = self.all_classes is not None

        def of(layout: Layout, array: Array) -> Array:
            late = layout.is_entry and defers
            return take(array) if layout.rows and not late else array

        modifiers = self.modifiers.of_rows(take)
        if defers:
            modifiers = modifiers._replace(class_where=self.modifiers.class_where)
        return self._replace(
            value=self._with(of),
            labels=take(self.labels),
            modifiers=modifiers,
            ranked=take(self.ranked),
            deferred=(cut, group) if defers else None,
        )

    def classes_of(self, start: Any, size: int, options: Options) -> "Blocks":
        def cut(array: Array, axis: int = 0) -> Array:
            return _chunks.slice_of(array, start, size, axis)

        def rows_of_entries(array: Array) -> Array:
            if self.deferred is None:
                return array
            rows, group = self.deferred
            return rows.take(array, group)

        def of(layout: Layout, array: Array) -> Array:
            axis = layout.class_axis
            if axis is None:
                return array
            array = cut(array, axis)
            return rows_of_entries(array) if layout.rows else array

        modifiers = self.modifiers.of_classes(cut)
        where = modifiers.class_where
        if where is not None and where.ndim > 1:
            modifiers = modifiers._replace(class_where=rows_of_entries(where))
        return self._replace(
            value=self._with(of),
            modifiers=modifiers,
            deferred=None,
            all_classes=None,
        )

    def raw(self, options: Options, class_axis: int = 1) -> Array:
        """The logits before what modifies them."""
        assert class_axis == 1
        return self.value.block().astype(self.dtype)

    # ----------------------------------------------------------------------- gradients
    def class_buffers(self, weight_dtype: Any = None) -> BlockClassSums:
        """The gradients of all but rows, before any row has added to them."""
        one_each = lambda x: None if x is None else jnp.zeros(x.shape, self.dtype)
        as_given = lambda kind: tuple(
            jnp.zeros(array.shape, array.dtype) for array in self._learned(kind)
        )
        shared = (jnp.zeros(a.shape, self.dtype) for a in self._learned(_is_shared))
        zeros = BlockClassSums(
            as_given(_is_class),
            tuple(shared),
            as_given(_is_entry),
            one_each(self.modifiers.bias),
            one_each(self.modifiers.class_log_weights),
        )
        return match_varying(zeros, self.like)

    def zeros(self, *shape: int) -> Array:
        return match_varying(jnp.zeros(shape, self.dtype), self.like)

    def no_row_sums(self, options: Options, rows: int, across: bool) -> BlockRowSums:
        """Nothing yet per row of a group."""
        per_row = lambda operand: None if operand is None else self.zeros(rows)
        return BlockRowSums(
            tuple(self.zeros(rows, *a.shape[1:]) for a in self._learned(_is_row)),
            per_row(self.modifiers.logit_scale),
            per_row(self.modifiers.temperature),
        )

    def no_class_sums(self, size: int) -> BlockClassSums:
        """Nothing yet per class of a step."""

        def of_classes(layout: Layout, array: Array) -> Array:
            shape = list(array.shape)
            shape[layout.class_axis or 0] = size
            return self.zeros(*shape)

        one_each = lambda x: None if x is None else self.zeros(size)
        pairs = [(l, a) for l, a in self._floating if _is_class(l)]
        return BlockClassSums(
            tuple(of_classes(*pair) for pair in pairs),
            tuple(self.zeros(*a.shape) for a in self._learned(_is_shared)),
            (),
            one_each(self.modifiers.bias),
            one_each(self.modifiers.class_log_weights),
        )

    def no_entries(self, rows: int) -> tuple[Array, ...]:
        """Nothing yet for each row of a group and class of a step."""
        entries = self._learned(_is_entry)
        return tuple(self.zeros(rows, *entry.shape[1:]) for entry in entries)

    def pull(
        self,
        options: Options,
        found: RawCotangents,
        across: bool,
        copied: Copied,
    ) -> tuple[BlockRowSums, BlockClassSums, tuple[Array, ...]]:
        """What a block adds to the sums per row and per class, and its own entries."""
        leaves, structure = jax.tree.flatten(self.value)
        learned = [_is_floating(leaf) for leaf in leaves]

        def block(floating: Sequence[Array]) -> Array:
            given = iter(floating)
            every = [
                next(given) if is_learned else leaf
                for is_learned, leaf in zip(learned, leaves, strict=True)
            ]
            return structure.unflatten(every).block().astype(self.dtype)

        floating = [leaf for leaf, of in zip(leaves, learned, strict=True) if of]
        _, pull = jax.vjp(block, floating)
        (gradients,) = pull(found.raw)
        layouts = [layout for layout, _ in self._floating]
        of = lambda kind: tuple(
            gradient.astype(self.dtype)
            for layout, gradient in zip(layouts, gradients, strict=True)
            if kind(layout)
        )
        of_rows = BlockRowSums(of(_is_row), found.logit_scale, found.temperature)
        of_classes = BlockClassSums(
            of(_is_class), of(_is_shared), (), found.bias, found.class_log_weights
        )
        return of_rows, of_classes, of(_is_entry)

    def written(
        self,
        options: Options,
        buffers: BlockClassSums,
        found: BlockClassSums,
        entries: tuple[Array, ...],
        write: Write,
        across: bool,
        copied: Copied,
    ) -> BlockClassSums:
        """The buffers with the sums of a step's classes, and its entries."""

        def all_written(kind: Any, olds: Sequence[Array], news: Sequence[Array]):
            layouts = (layout for layout, _ in self._floating if kind(layout))
            axes = [layout.class_axis or 0 for layout in layouts]
            return tuple(
                write(old, new.astype(old.dtype), axis)
                for old, new, axis in zip(olds, news, axes, strict=True)
            )

        one = lambda old, new: None if old is None else write(old, new, 0)
        return BlockClassSums(
            all_written(_is_class, buffers.arrays, found.arrays),
            jax.tree.map(jnp.add, buffers.shared, found.shared),
            all_written(_is_entry, buffers.entries, entries),
            one(buffers.bias, found.bias),
            one(buffers.class_log_weights, found.class_log_weights),
        )

    def turned(self, sums: BlockRowSums) -> BlockRowSums:
        return sums

    def gradient(self, sums: BlockRowSums, classes: BlockClassSums) -> "Blocks":
        """The sums in the dtypes and shapes of the operands."""
        found = {
            _is_row: iter(sums.arrays),
            _is_class: iter(classes.arrays),
            _is_shared: iter(classes.shared),
            _is_entry: iter(classes.entries),
        }

        def of(layout: Layout, array: Array) -> Array | None:
            if not _is_floating(array):
                return None
            (mine,) = (given for kind, given in found.items() if kind(layout))
            return next(mine).astype(array.dtype)

        modifiers = tile_gradient.modifiers_like(
            self.modifiers,
            classes.bias,
            sums.logit_scale,
            sums.temperature,
            classes.class_log_weights,
        )
        return Blocks(self._with(of), None, modifiers)

    def as_operands(self) -> "Blocks":
        return self

    # ------------------------------------------------------------------------- fields
    @property
    def _arrays(self) -> list[tuple[Layout, Array]]:
        arrays, structure = jax.tree.flatten(self.value)
        layouts = structure.flatten_up_to(self.value.layout())
        return list(zip(layouts, arrays, strict=True))

    @property
    def _floating(self) -> list[tuple[Layout, Array]]:
        return [pair for pair in self._arrays if _is_floating(pair[1])]

    def _learned(self, kind: Callable[[Layout], bool]) -> list[Array]:
        return [array for layout, array in self._floating if kind(layout)]

    def _first(self, kind: Callable[[Layout], bool]) -> tuple[Layout, Array]:
        return next(pair for pair in self._arrays if kind(pair[0]))

    def _with(self, function: Callable[[Layout, Array], Any]) -> Any:
        structure = jax.tree.structure(self.value)
        return structure.unflatten([function(*pair) for pair in self._arrays])


def _is_floating(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating)


def _is_row(layout: Layout) -> bool:
    return layout.rows and layout.class_axis is None


def _is_class(layout: Layout) -> bool:
    return not layout.rows and layout.class_axis is not None


def _is_shared(layout: Layout) -> bool:
    return not layout.rows and layout.class_axis is None


def _is_entry(layout: Layout) -> bool:
    return layout.is_entry
