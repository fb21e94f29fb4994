"""Operands of the engine whose logits are computed block by block by a user's value.

The value declares which of its arrays have axes of rows, of classes, of both or none,
and computes the raw logits of its arrays sliced to any rows and classes. JAX
differentiates this computation, one block at a time.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from softlib._dtypes import accumulator_dtype
from softlib._sharding import match_varying
from softlib._symbolic import is_symbolic

from . import chunks as _chunks, slices, tile_gradient
from .chunks import Index, RowCut
from .operand import Copied, Write
from .tile import Modifiers, Options, Ranked
from .tile_gradient import RawCotangents

type Kind = Literal["row", "class", "entry", "shared"]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The axes of an array that are the rows and the classes of logits.

    Attributes:
        rows: Whether the first axes are the batch.
        class_axis: The axis of classes; None if there is none.
    """

    rows: bool = False
    class_axis: int | None = None

    @property
    def kind(self) -> Kind:
        """Kind of the array's numbers: per row, per class, per entry, or shared."""
        if self.class_axis is None:
            return "row" if self.rows else "shared"
        return "entry" if self.rows else "class"


def modifier_layout(modifiers: Modifiers) -> Modifiers:
    """The layout of each modifier."""

    def of(value: Array | None, *, rows: int, classes: int = 0) -> Any:
        """Layout of an array with rows, and classes, from these ranks on; 0: never."""
        if value is None:
            return None
        axis = -1 if classes and value.ndim >= classes else None
        return Layout(rows=bool(rows) and value.ndim >= rows, class_axis=axis)

    return Modifiers(
        of(modifiers.bias, rows=0, classes=1),
        of(modifiers.scale, rows=1),
        of(modifiers.temperature, rows=1),
        of(modifiers.class_where, rows=2, classes=1),
        of(modifiers.class_log_weights, rows=0, classes=1),
        of(modifiers.centre, rows=1),
    )


def arrays_of(value: Any) -> list[tuple[Layout, Array]]:
    """The arrays of a value with their layouts."""
    arrays, structure = jax.tree.flatten(value)
    return list(zip(structure.flatten_up_to(value.layout()), arrays, strict=True))


def with_layout(value: Any, function: Callable[[Layout, Array], Any]) -> Any:
    """The value with each array replaced by `function(layout, array)`."""
    structure = jax.tree.structure(value)
    return structure.unflatten(function(*pair) for pair in arrays_of(value))


class Value(Protocol):
    """A pytree of arrays that are slices of rows and classes.

    Attributes:
        numbers_per_class: How many a block makes of each class if its arrays hold
            fewer, as codes of few bits do; else None.
    """

    @property
    def numbers_per_class(self) -> int | None: ...

    def layout(self) -> Any:
        """The same tree with a `Layout` instead of each array."""
        ...

    def block(self) -> Array:
        """The raw logits (rows, classes) of these arrays."""
        ...


class BlockRowSums(NamedTuple):
    """Gradients per row, in the dtype of sums."""

    arrays: tuple[Array, ...]
    scale: Float[Array, " rows"] | None
    temperature: Float[Array, " rows"] | None


class BlockClassSums(NamedTuple):
    """Gradients per class, of shared arrays, and of arrays with rows and classes."""

    arrays: tuple[Array, ...]
    shared: tuple[Array, ...]
    entries: tuple[Array, ...]
    bias: Float[Array, " classes"] | None
    class_log_weights: Float[Array, " classes"] | None


class Blocks(NamedTuple):
    """The operands of a row-statistics operation on blocks; rows are one axis."""

    value: Any  # a Value, whose arrays have one axis of rows instead of the batch
    labels: Int[Array, "rows L"] | None  # -1 for a label outside the vocabulary
    modifiers: Modifiers
    ranked: Ranked | None = None
    # The group of rows to which arrays with rows and classes are not cut yet: they are
    # cut together with the classes, because cutting rows alone would copy all classes.
    deferred: tuple[RowCut, Index | None] | None = None
    # Static, hence in the tree's structure: None once the classes are cut.
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
        return self.like.shape[0]

    @property
    def features(self) -> int:
        """Numbers that a step reads per row, and per class: for the cost model."""
        if self.value.numbers_per_class is not None:
            return self.value.numbers_per_class
        sizes = [
            array.size // max(array.shape[layout.class_axis or 0], 1)
            for layout, array in arrays_of(self.value)
            if layout.kind == "class"
        ]
        return max([1, *filter(lambda size: not is_symbolic(size), sizes)])

    @property
    def like(self) -> Array:
        return next(a for layout, a in arrays_of(self.value) if layout.rows)

    def vocabulary(self, options: Options) -> int:
        sizes = (
            array.shape[layout.class_axis]
            for layout, array in arrays_of(self.value)
            if layout.class_axis is not None
        )
        return next(sizes)

    def is_one_tile(self, options: Options, rows: int) -> bool:
        """Whether all logits are few enough to be one tile."""
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
            late = layout.kind == "entry" and defers
            return take(array) if layout.rows and not late else array

        modifiers = self.modifiers.of_rows(take)
        if defers:
            modifiers = modifiers._replace(class_where=self.modifiers.class_where)
        return self._replace(
            value=with_layout(self.value, of),
            labels=take(self.labels),
            modifiers=modifiers,
            ranked=take(self.ranked),
            deferred=(cut, group) if defers else None,
        )

    def classes_of(self, start: Any, size: int, options: Options) -> "Blocks":
        def cut(array: Array, axis: int = 0) -> Array:
            return slices.slice_of(options, array, start, size, axis)

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
            value=with_layout(self.value, of),
            modifiers=modifiers,
            deferred=None,
            all_classes=None,
        )

    def raw(self, options: Options, class_axis: int = 1) -> Array:
        """The logits before modifiers are applied."""
        assert class_axis == 1
        return self.value.block().astype(self.dtype)

    # ----------------------------------------------------------------------- gradients
    def class_buffers(self) -> BlockClassSums:
        """Zero buffers of all gradients but those per row."""
        one_each = lambda x: None if x is None else jnp.zeros(x.shape, self.dtype)
        as_given = lambda kind: tuple(
            jnp.zeros(array.shape, array.dtype) for array in self._learned(kind)
        )
        shared = (jnp.zeros(a.shape, self.dtype) for a in self._learned("shared"))
        zeros = BlockClassSums(
            as_given("class"),
            tuple(shared),
            as_given("entry"),
            one_each(self.modifiers.bias),
            one_each(self.modifiers.class_log_weights),
        )
        return match_varying(zeros, self.like)

    def zeros(self, *shape: int) -> Array:
        return match_varying(jnp.zeros(shape, self.dtype), self.like)

    def no_row_sums(self, options: Options, rows: int, across: bool) -> BlockRowSums:
        """Zero sums per row of a group."""
        per_row = lambda operand: None if operand is None else self.zeros(rows)
        return BlockRowSums(
            tuple(self.zeros(rows, *a.shape[1:]) for a in self._learned("row")),
            per_row(self.modifiers.scale),
            per_row(self.modifiers.temperature),
        )

    def no_class_sums(self, options: Options, size: int) -> BlockClassSums:
        """Zero sums per class of a step."""

        def of_classes(layout: Layout, array: Array) -> Array:
            shape = list(array.shape)
            shape[layout.class_axis or 0] = size
            return self.zeros(*shape)

        one_each = lambda x: None if x is None else self.zeros(size)
        pairs = [pair for pair in self._floating if pair[0].kind == "class"]
        return BlockClassSums(
            tuple(of_classes(*pair) for pair in pairs),
            tuple(self.zeros(*a.shape) for a in self._learned("shared")),
            (),
            one_each(self.modifiers.bias),
            one_each(self.modifiers.class_log_weights),
        )

    def no_entries(self, rows: int) -> tuple[Array, ...]:
        """Zero gradients per entry, for the rows of a group and classes of a step."""
        entries = self._learned("entry")
        return tuple(self.zeros(rows, *entry.shape[1:]) for entry in entries)

    def pull(
        self,
        options: Options,
        found: RawCotangents,
        across: bool,
        copied: Copied,
    ) -> tuple[BlockRowSums, BlockClassSums, tuple[Array, ...]]:
        """Gradients of a block: its sums per row and per class, and its entries."""
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
            if layout.kind == kind
        )
        of_rows = BlockRowSums(of("row"), found.scale, found.temperature)
        of_classes = BlockClassSums(
            of("class"), of("shared"), (), found.bias, found.class_log_weights
        )
        return of_rows, of_classes, of("entry")

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
        """The buffers with the sums and entries of a step's classes written."""

        def all_written(kind: Kind, olds: Sequence[Array], news: Sequence[Array]):
            layouts = (each for each, _ in self._floating if each.kind == kind)
            axes = [layout.class_axis or 0 for layout in layouts]
            return tuple(
                write(old, new.astype(old.dtype), axis)
                for old, new, axis in zip(olds, news, axes, strict=True)
            )

        one = lambda old, new: None if old is None else write(old, new, 0)
        return BlockClassSums(
            all_written("class", buffers.arrays, found.arrays),
            jax.tree.map(jnp.add, buffers.shared, found.shared),
            all_written("entry", buffers.entries, entries),
            one(buffers.bias, found.bias),
            one(buffers.class_log_weights, found.class_log_weights),
        )

    def turned(self, sums: BlockRowSums) -> BlockRowSums:
        return sums

    def gradient(self, sums: BlockRowSums, classes: BlockClassSums) -> "Blocks":
        """The gradients in the shapes and dtypes of the operands."""
        found = {
            "row": iter(sums.arrays),
            "class": iter(classes.arrays),
            "shared": iter(classes.shared),
            "entry": iter(classes.entries),
        }

        def of(layout: Layout, array: Array) -> Array | None:
            if not _is_floating(array):
                return None
            return next(found[layout.kind]).astype(array.dtype)

        modifiers = tile_gradient.modifiers_like(
            self.modifiers,
            classes.bias,
            sums.scale,
            sums.temperature,
            classes.class_log_weights,
        )
        return Blocks(with_layout(self.value, of), None, modifiers)

    def as_operands(self) -> "Blocks":
        return self

    # ------------------------------------------------------------------------- fields
    @property
    def _floating(self) -> list[tuple[Layout, Array]]:
        return [pair for pair in arrays_of(self.value) if _is_floating(pair[1])]

    def _learned(self, kind: Kind) -> list[Array]:
        return [array for layout, array in self._floating if layout.kind == kind]


def _is_floating(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating)
