"""The operands of a linear head, as the loops over rows and classes use them.

The loops of `stream` slice an operand, compute the raw logits of a slice, and add their
pulled-back cotangents to gradients. `blocks` does the same for all other logits.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from softlib._dtypes import accumulator_dtype, common_dtype
from softlib._sharding import match_varying
from softlib._symbolic import is_symbolic

from . import chunks as _chunks, slices, tile_gradient
from .chunks import Index, RowCut
from .operand import Copied, Write
from .tile import Modifiers, Options, Ranked
from .tile_gradient import RawCotangents


class HeadGradient(NamedTuple):
    """The gradient of a head, in the dtypes of its operands."""

    hidden: Array
    weight: Array
    modifiers: Modifiers  # without class_where

    def added_to(self, weight: Array | None) -> "HeadGradient":
        """The gradient plus an existing gradient of the weight."""
        return self if weight is None else self._replace(weight=weight + self.weight)

    def as_operands(self) -> "Head":
        """The gradient in the structure of the operands."""
        return Head(self.hidden, self.weight, None, self.modifiers)


class RowSums(NamedTuple):
    """Gradients per row, in the dtype of sums."""

    hidden: Float[Array, "rows D"] | Float[Array, "D rows"]
    scale: Float[Array, " rows"] | None
    # None also if it follows from the gradient of hidden.
    temperature: Float[Array, " rows"] | None


class ClassSums(NamedTuple):
    """Gradients per class, in the dtype of sums."""

    weight: Array
    bias: Float[Array, " classes"] | None
    class_log_weights: Float[Array, " classes"] | None = None


class Head(NamedTuple):
    """The operands of a linear row-statistics operation; rows are one axis."""

    hidden: Float[Array, "rows D"]
    weight: Float[Array, "V D"] | Float[Array, "D V"]
    labels: Int[Array, "rows L"] | None  # -1 for a label outside the vocabulary
    modifiers: Modifiers
    ranked: Ranked | None = None

    @property
    def dtype(self) -> Any:
        return accumulator_dtype(self.hidden, self.weight, *self.modifiers.floating)

    @property
    def rows(self) -> int:
        return self.hidden.shape[0]

    @property
    def features(self) -> int:
        """Numbers that a step reads per row, and per class: for the cost model."""
        return self.hidden.shape[1]

    @property
    def like(self) -> Array:
        """An array that varies over the same mesh axes as all others."""
        return self.hidden

    def vocabulary(self, options: Options) -> int:
        return self.weight.shape[options.vocab_axis]

    def is_one_tile(self, options: Options, rows: int) -> bool:
        """Whether all logits, and the unrounded gradient of the weight, are small."""
        if is_symbolic(rows):
            return False
        rounded = self.weight.dtype != self.dtype
        of_class = max(rows, self.hidden.shape[1] if rounded else 1)
        return of_class * self.vocabulary(options) <= _chunks.WHOLE

    def lies_across(self, options: Options) -> bool:
        """Whether tiles of many rows are fastest in the layout (classes, rows)."""
        return options.vocab_axis == 0

    # ------------------------------------------------------------------------- slices
    def rows_of(self, cut: RowCut, group: Index | None) -> "Head":
        take = lambda tree: cut.take(tree, group)
        return self._replace(
            hidden=take(self.hidden),
            labels=take(self.labels),
            ranked=take(self.ranked),
            modifiers=self.modifiers.of_rows(take),
        )

    def classes_of(self, start: Any, size: int, options: Options) -> "Head":
        def cut(array: Array, axis: int = 0) -> Array:
            return slices.slice_of(options, array, start, size, axis)

        return self._replace(
            weight=cut(self.weight, options.vocab_axis),
            modifiers=self.modifiers.of_classes(cut),
        )

    def raw(self, options: Options, class_axis: int = 1) -> Array:
        """The product of hidden and the weight."""
        operands = (self.hidden, self.weight)
        contract = (1, 1 - options.vocab_axis)
        if class_axis == 0:
            operands, contract = operands[::-1], contract[::-1]
        return product(*operands, contract, options, self.dtype)

    # ----------------------------------------------------------------------- gradients
    def class_buffers(self, weight_dtype: DTypeLike | None = None) -> ClassSums:
        """Zero buffers of the gradients per class."""
        one_each = lambda x: None if x is None else jnp.zeros(x.shape, self.dtype)
        zeros = ClassSums(
            jnp.zeros(self.weight.shape, weight_dtype or self.weight.dtype),
            one_each(self.modifiers.bias),
            one_each(self.modifiers.class_log_weights),
        )
        return match_varying(zeros, self.hidden)

    def zeros(self, *shape: int) -> Array:
        return match_varying(jnp.zeros(shape, self.dtype), self.hidden)

    def no_row_sums(self, options: Options, rows: int, across: bool) -> RowSums:
        """Zero sums per row of a group."""
        features = self.hidden.shape[1]
        per_row = lambda operand: None if operand is None else self.zeros(rows)
        temperature = self.modifiers.temperature
        return RowSums(
            self.zeros(features, rows) if across else self.zeros(rows, features),
            per_row(self.modifiers.scale),
            None if self._follows(options) else per_row(temperature),
        )

    def no_class_sums(self, options: Options, size: int) -> ClassSums:
        """Zero sums per class of a step of one of several groups of rows."""
        one_each = lambda x: None if x is None else self.zeros(size)
        features = self.hidden.shape[1]
        classes_first = _classes_first(options, False)
        return ClassSums(
            self.zeros(size, features) if classes_first else self.zeros(features, size),
            one_each(self.modifiers.bias),
            one_each(self.modifiers.class_log_weights),
        )

    def no_entries(self, rows: int) -> tuple[()]:
        """An empty tuple: a head has no array with both rows and classes."""
        return ()

    def pull(
        self,
        options: Options,
        found: RawCotangents,
        across: bool,
        copied: Copied,
    ) -> tuple[RowSums, ClassSums, tuple[()]]:
        """Gradients of a tile: its sums per row and per class; there are no entries."""
        # Products in the dtype of the operands, as forward; sums are wider.
        draw = found.raw.astype(self._product_dtype)
        if across:
            columns = copied(self.weight.T)
            dhidden = product(columns, draw, (1, 0), options, self.dtype)
            dweight = product(draw, self.hidden, (1, 0), options, self.dtype)
        elif _classes_first(options, across):
            dhidden = product(draw, self.weight, (1, 0), options, self.dtype)
            dweight = product(draw, self.hidden, (0, 0), options, self.dtype)
        else:
            columns = copied(self.hidden.T)
            contract = (1, options.vocab_axis)
            dhidden = product(draw, self.weight, contract, options, self.dtype)
            dweight = product(columns, draw, (1, 0), options, self.dtype)
        dtemperature = None if self._follows(options) else found.temperature
        of_rows = RowSums(dhidden, found.scale, dtemperature)
        return of_rows, ClassSums(dweight, found.bias, found.class_log_weights), ()

    def written(
        self,
        options: Options,
        buffers: ClassSums,
        found: ClassSums,
        entries: tuple[()],
        write: Write,
        across: bool,
        copied: Copied,
    ) -> ClassSums:
        """The buffers with the sums of a step's classes written."""
        slice_ = found.weight.astype(buffers.weight.dtype)
        if options.vocab_axis == 0 and not _classes_first(options, across):
            slice_ = copied(slice_).T
        one: Any = lambda old, new: None if old is None else write(old, new, 0)
        per_class = map(one, buffers[1:], found[1:])
        return ClassSums(write(buffers.weight, slice_, options.vocab_axis), *per_class)

    def turned(self, sums: RowSums) -> RowSums:
        """Sums of tiles (classes, rows), transposed to rows first."""
        return sums._replace(hidden=sums.hidden.T)

    def gradient(self, sums: RowSums, classes: ClassSums) -> HeadGradient:
        """The gradients in the shapes and dtypes of the operands."""
        temperature = self.modifiers.temperature
        dtemperature = sums.temperature
        if temperature is not None and dtemperature is None:
            # z = s h W / T: by Euler's theorem of homogeneous functions.
            of_hidden = (self.hidden.astype(self.dtype) * sums.hidden).sum(1)
            dtemperature = 0 - of_hidden / temperature.astype(self.dtype)
        return HeadGradient(
            sums.hidden.astype(self.hidden.dtype),
            classes.weight.astype(self.weight.dtype),
            tile_gradient.modifiers_like(
                self.modifiers,
                classes.bias,
                sums.scale,
                dtemperature,
                classes.class_log_weights,
            ),
        )

    @property
    def _product_dtype(self) -> Any:
        return common_dtype(self.hidden.dtype, self.weight.dtype)

    def _follows(self, options: Options) -> bool:
        """Whether the gradient of the temperature follows from that of `hidden`.

        Otherwise it is summed over every tile, which keeps one or two more tiles. The
        sums are needed if the gradient of `hidden` is that of rounded or filtered
        tiles, or is not computed.
        """
        return (
            options.hidden_is_learned
            and self.modifiers.bias is None
            and options.softcap is None
            and options.gradient_filter_eps is None
            and self._product_dtype == self.dtype
        )


def _classes_first(options: Options, across: bool) -> bool:
    """Whether the sums of the weight of a step are (classes, D), not (D, classes).

    A CPU multiplies fastest if only the smaller operand is transposed.
    """
    on_accelerator = options.accelerator is not None
    return across or (on_accelerator and options.vocab_axis == 0)


def product(
    a: Array, b: Array, contract: tuple[int, int], options: Options, dtype: Any
) -> Array:
    common = common_dtype(a.dtype, b.dtype)
    return lax.dot_general(
        a.astype(common),
        b.astype(common),
        (((contract[0],), (contract[1],)), ((), ())),
        precision=options.precision,
        preferred_element_type=dtype,
    )
