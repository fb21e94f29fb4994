"""User-defined logits, computed for some rows and some classes at a time."""

import abc
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from softlib import _checks as checks
from softlib._array_arguments import as_array
from softlib._dtypes import accumulator_dtype
from softlib._sharding import in_auto_mode, match_varying
from softlib.typing import Implementations, PerRow

from ._engine import operations
from ._engine.blocks import Blocks, Layout, modifier_layout, with_layout
from ._engine.tile import NO_MODIFIERS, RowStatistics
from ._modified import ModifiedLogits, blocks_of
from ._modifiers import (
    checked_implementation,
    checked_modifiers,
    checked_options,
    require_classes,
    shown_modifiers,
)
from ._source_rows import Shape, final_logits, masked_modifiers, row_specs, shaped


class BlockwiseLogits(ModifiedLogits):
    r"""Base of user-defined logits, which are computed block by block.

    A subclass declares which of its arrays have rows, classes, both or none. Its
    `block` computes the logits of arrays that are sliced to some rows and classes. It
    is then a value like `LinearLogits`: every loss that streams and every function of
    `softlib.logits` takes it, no array of rows x classes is formed, and every floating
    array in it has a gradient. JAX differentiates `block`, one block at a time.

    A subclass sets the attributes below, writes `block`, and overrides `class_axis` if
    the classes are not the first axis of an array.

    Rows that do not count become rows of ones (0 in arrays of integers) before any
    arithmetic. Logits of a block must be finite: exclude a class by `class_where`.

    Args:
        bias: Added to the scaled logits, one number per class; -inf is legal.
        scale: Multiplies the logits; a number, or an array that is a scalar or one
            value per row, differentiable.
        softcap: Static positive number $c$: logits become $c\tanh(u / c)$.
        temperature: Divides the capped logits; positive, as `scale` otherwise.
        class_where: True for the classes that exist; the others leave every sum and
            maximum.
        vocab_chunk: Static number of classes per step; None chooses from the shapes.
        token_chunk: Static number of rows per step; None chooses from the shapes.
        implementation: Static; see `softlib.explain`.
        **fields: The arrays and static fields by name.

    Raises:
        TypeError: A field is missing or unknown, or an argument has the wrong kind.
        ValueError: Shapes do not fit together, or an option is out of range.

    Attributes:
        of_rows: Names of arrays (*batch, features), one entry per row.
        of_classes: Names of arrays (V, ...), one entry per class.
        of_entries: Names of arrays (*batch, V), one number for each row and class.
        of_all: Names of arrays without rows and classes.
        static_fields: Names of the other fields, which are static and hashable.

    Derivatives: as `row_statistics`, with respect to every floating array.
    Cost: that of `block` once per visit of a row and class, and once more with its
        gradient; memory of a few blocks. Plain JAX on all platforms.
    Source: softlib.

    Example:
        >>> class Squares(softlib.logits.BlockwiseLogits):
        ...     of_rows, of_classes = ("points",), ("centres",)
        ...     def block(self):
        ...         return -(self.points - self.centres.T) ** 2
        >>> logits = Squares(points=jnp.zeros((1, 1)), centres=jnp.ones((2, 1)))
        >>> print(softlib.losses.softmax_cross_entropy(logits, jnp.array([1])).round(4))
        [0.6931]
    """

    of_rows: ClassVar[tuple[str, ...]] = ()
    of_classes: ClassVar[tuple[str, ...]] = ()
    of_entries: ClassVar[tuple[str, ...]] = ()
    of_all: ClassVar[tuple[str, ...]] = ()

    implementation: Implementations

    def __init_subclass__(cls, **options: Any) -> None:
        own = (*cls.of_rows, *cls.of_classes, *cls.of_entries, *cls.of_all)
        if own:
            cls.array_fields = (*own, "modifiers")
            static = [n for n in cls.static_fields if n not in _STATIC]
            cls.static_fields = (*static, *_STATIC)
        super().__init_subclass__(**options)

    def __init__(
        self,
        *,
        bias: Float[Array, " V"] | None = None,
        scale: PerRow | None = None,
        softcap: float | None = None,
        temperature: PerRow | None = None,
        class_where: Bool[Array, " V"] | None = None,
        vocab_chunk: int | None = None,
        token_chunk: int | None = None,
        implementation: Implementations = None,
        **fields: Any,
    ) -> None:
        name = type(self).__name__
        vars(self).update(_checked_fields(name, type(self), fields))
        self.function = name
        _require_shapes(name, self)
        chunks = {"vocab_chunk": vocab_chunk, "token_chunk": token_chunk}
        for option, size in chunks.items():
            if size is not None:
                checks.require_positive_integer(name, option, size)
        self.options = dataclasses.replace(checked_options(name, softcap), **chunks)
        self.implementation = checked_implementation(
            name, operations.BLOCKWISE, implementation
        )
        self.modifiers = NO_MODIFIERS
        dtype, classes = self.dtype, (self.num_classes,)
        self.modifiers = checked_modifiers(
            name,
            self.batch_shape,
            self.num_classes,
            dtype,
            classes,
            bias=bias,
            scale=scale,
            temperature=temperature,
            class_where=class_where,
        )

    @abc.abstractmethod
    def block(self) -> Float[Array, "rows classes"]:
        """Computes the logits of the rows and classes that the fields hold.

        Here the batch is one axis of rows. Arrays of `of_rows` hold some rows, those of
        `of_classes` some classes, and those of `of_entries` both. Accumulate products
        of narrow arrays in `self.dtype`.
        """

    def class_axis(self, name: str) -> int:
        """The axis of classes of the named array of `of_classes`."""
        return 0

    def prepared(self) -> Any:
        """The value whose blocks are visited; this value by default.

        Override it to compute numbers per row once that `block` would otherwise compute
        for every block of classes. JAX differentiates it as a whole.
        """
        return self

    @property
    def batch_shape(self) -> Shape:
        return getattr(self, (*self.of_rows, *self.of_entries)[0]).shape[:-1]

    @property
    def num_classes(self) -> int:
        if self.of_classes:
            first = self.of_classes[0]
            return getattr(self, first).shape[self.class_axis(first)]
        return getattr(self, self.of_entries[0]).shape[-1]

    @property
    def dtype(self) -> jnp.dtype:
        leaves = jax.tree.leaves([getattr(self, n) for n in self.array_fields[:-1]])
        floating = [a for a in leaves if jnp.issubdtype(a.dtype, jnp.floating)]
        return accumulator_dtype(*floating, *self.modifiers.floating)

    def layout(self) -> "BlockwiseLogits":
        layouts = {
            **dict.fromkeys(self.of_rows, Layout(rows=True)),
            **{n: Layout(class_axis=self.class_axis(n)) for n in self.of_classes},
            **dict.fromkeys(self.of_entries, Layout(rows=True, class_axis=-1)),
            **dict.fromkeys(self.of_all, Layout()),
        }
        of = lambda name, layout: jax.tree.map(lambda _: layout, getattr(self, name))
        return self.replaced(
            **{name: of(name, layout) for name, layout in layouts.items()},
            modifiers=modifier_layout(self.modifiers),
        )

    def operand(
        self, labels: Array | None = None, label_logits: Array | None = None
    ) -> Blocks:
        return blocks_of(self, labels, label_logits)

    def shown(self) -> dict[str, Any]:
        names = (*self.array_fields[:-1], *self.static_fields)
        own = {name: getattr(self, name) for name in names if name not in _STATIC}
        options = ("vocab_chunk", "token_chunk")
        own |= {name: getattr(self.options, name) for name in options}
        own["implementation"] = self.implementation
        return {**own, **shown_modifiers(self.modifiers, self.options)}

    def masked(self, where: Bool[Array, "*batch"] | None) -> "BlockwiseLogits":
        if where is None:
            return self
        batch = len(self.batch_shape)

        def of(layout: Layout, array: Array) -> Array:
            if not layout.rows:
                return array
            kept = where.reshape(*where.shape, *(1,) * (array.ndim - batch))
            neutral = int(jnp.issubdtype(array.dtype, jnp.floating))
            return jnp.where(kept, array, jnp.asarray(neutral, array.dtype))

        bare = self.replaced(modifiers=NO_MODIFIERS)
        modifiers = masked_modifiers(self.modifiers, where)
        return with_layout(bare, of).replaced(modifiers=modifiers)

    def statistics(
        self,
        names: Sequence[str],
        labels: Array | None = None,
        label_logits: Array | None = None,
    ) -> RowStatistics:
        options = self.options.including(*names)
        value = self.prepared()
        batch = value.batch_shape

        def engine(_, value, labels, label_logits):
            operand = match_varying(value.operand(labels, label_logits))
            found = operations.blockwise(self.implementation, options, operand)
            return shaped(found, batch, labels)

        specs = functools.partial(row_specs, options, batch, labels)
        return in_auto_mode(engine, specs, value.per_row, value, labels, label_logits)

    def materialize(self) -> Array:
        """Computes the final logits: rows x classes numbers in memory."""
        value = self.prepared()
        raw = value.operand().raw(self.options)
        shape = (*value.batch_shape, raw.shape[-1])
        raw = raw.reshape(shape)
        return final_logits(raw, value.batch_shape, self.options, value.modifiers)


_STATIC = ("function", "options", "implementation")


def _checked_fields(name: str, cls: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a value, arrays as arrays of JAX."""
    arrays = cls.array_fields[:-1]
    names = (*arrays, *(n for n in cls.static_fields if n not in _STATIC))
    for field in fields:
        if field not in names:
            raise TypeError(f"{name}: `{field}` must be one of {names}.")
    missing = [field for field in names if field not in fields]
    if missing:
        raise TypeError(f"{name}: `{missing[0]}` must be given.")
    as_arrays = lambda field, tree: jax.tree.map(
        lambda leaf: as_array(name, field, leaf, "an array"), tree
    )
    return {
        field: as_arrays(field, value) if field in arrays else value
        for field, value in fields.items()
    }


def _require_shapes(name: str, value: BlockwiseLogits) -> None:
    """Requires one batch shape, and one number of classes, of all arrays."""
    if not (value.of_rows or value.of_entries):
        raise TypeError(f"{name}: `of_rows` must name an array.")
    if not (value.of_classes or value.of_entries):
        raise TypeError(f"{name}: `of_classes` must name an array.")
    for field in (*value.of_rows, *value.of_entries, *value.of_classes):
        for array in jax.tree.leaves(getattr(value, field)):
            checks.require_rank(name, field, array, 1, "(..., features)")
    batch, classes = value.batch_shape, value.num_classes
    first = (*value.of_classes, *value.of_entries)[0]
    require_classes(name, first, classes, getattr(value, first).shape)
    for field in value.of_rows:
        array = getattr(value, field)
        if array.shape[:-1] != batch:
            raise ValueError(
                f"{name}: `{field}` must have the batch shape {batch} and one more "
                f"axis, got {array.shape}."
            )
    for field in value.of_entries:
        shape, why = (*batch, classes), "one number per row and class"
        checks.require_shape(name, field, getattr(value, field), shape, why)
    for field in value.of_classes:
        array, axis = getattr(value, field), value.class_axis(field)
        if array.shape[axis] != classes:
            raise ValueError(
                f"{name}: `{field}` must have {classes} classes along axis {axis}, "
                f"got shape {array.shape}."
            )
