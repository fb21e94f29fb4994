"""The operands of a linear head, and its part in the loops over rows and classes.

The loops of `stream` ask an operand for a slice of itself, for the raw logits of a
slice, and for what the cotangent of these adds to its gradient. `blocks` answers the
same questions for logits of any other kind.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from softlib._dtypes import accumulator_dtype, common_dtype
from softlib._sharding import match_varying
from softlib._symbolic import is_symbolic

from . import chunks as _chunks, tile_gradient
from .chunks import Index, RowCut
from .operand import Copied, Write
from .tile import Modifiers, Options, Ranked
from .tile_gradient import RawCotangents


class HeadGradient(NamedTuple):
    """The gradient of a head in the dtypes of its operands."""

    hidden: Array
    weight: Array
    modifiers: Modifiers  # without class_where

    def added_to(self, weight: Array | None) -> "HeadGradient":
        """With a gradient of the weight that exists already."""
        return self if weight is None else self._replace(weight=weight + self.weight)

    def as_operands(self) -> "Head":
        """In the structure of what it is the gradient of."""
        return Head(self.hidden, self.weight, None, self.modifiers)


class RowSums(NamedTuple):
    """Sums of the backward pass, one per row."""

    hidden: Float[Array, "rows D"] | Float[Array, "D rows"]
    scale: Float[Array, " rows"] | None
    # None also where it follows from the gradient of hidden.
    temperature: Float[Array, " rows"] | None


class ClassSums(NamedTuple):
    """Sums of the backward pass, one per class."""

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
        """Numbers per row, and per class, that a step reads: for the cost model."""
        return self.hidden.shape[1]

    @property
    def like(self) -> Array:
        """An array that varies over as many mesh axes as all others do."""
        return self.hidden

    def vocabulary(self, options: Options) -> int:
        return self.weight.shape[options.vocab_axis]

    def is_one_tile(self, options: Options, rows: int) -> bool:
        """Whether logits, and the weight's gradient before it is rounded, are small."""
        if is_symbolic(rows):
            return False
        rounded = self.weight.dtype != self.dtype
        of_class = max(rows, self.hidden.shape[1] if rounded else 1)
        return of_class * self.vocabulary(options) <= _chunks.WHOLE

    def lies_across(self, options: Options) -> bool:
        """Whether tiles of many rows are best laid out as (classes, rows)."""
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
            return _chunks.slice_of(array, start, size, axis)

        return self._replace(
            weight=cut(self.weight, options.vocab_axis),
            modifiers=self.modifiers.of_classes(cut),
        )

    def raw(self, options: Options, class_axis: int = 1) -> Array:
        """The products of hidden and the weight."""
        operands = (self.hidden, self.weight)
        contract = (1, 1 - options.vocab_axis)
        if class_axis == 0:
            operands, contract = operands[::-1], contract[::-1]
        return product(*operands, contract, options, self.dtype)

    # ----------------------------------------------------------------------- gradients
    def class_buffers(self, weight_dtype: DTypeLike | None = None) -> ClassSums:
        """The gradients per class, before any row has added to them."""
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
        """Nothing yet per row of a group."""
        features = self.hidden.shape[1]
        per_row = lambda operand: None if operand is None else self.zeros(rows)
        temperature = self.modifiers.temperature
        return RowSums(
            self.zeros(features, rows) if across else self.zeros(rows, features),
            per_row(self.modifiers.scale),
            None if self._follows(options) else per_row(temperature),
        )

    def no_class_sums(self, size: int) -> ClassSums:
        """Nothing yet per class of a step."""
        one_each = lambda x: None if x is None else self.zeros(size)
        return ClassSums(
            self.zeros(self.hidden.shape[1], size),
            one_each(self.modifiers.bias),
            one_each(self.modifiers.class_log_weights),
        )

    def no_entries(self, rows: int) -> tuple[()]:
        """Nothing yet for each row of a group and class of a step."""
        return ()

    def pull(
        self,
        options: Options,
        found: RawCotangents,
        across: bool,
        copied: Copied,
    ) -> tuple[RowSums, ClassSums, tuple[()]]:
        """The share of a tile in the sums per row and per class; it has no entries."""
        # Products in the dtype of the operands, as forward; their sums are wider.
        draw = found.raw.astype(self._product_dtype)
        if across:
            columns = copied(self.weight.T)
            dhidden = product(columns, draw, (1, 0), options, self.dtype)
            dweight = product(draw, self.hidden, (1, 0), options, self.dtype)
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
        """The buffers with the sums of a step's classes."""
        slice_ = found.weight.astype(buffers.weight.dtype)
        if options.vocab_axis == 0 and not across:
            slice_ = copied(slice_).T
        one: Any = lambda old, new: None if old is None else write(old, new, 0)
        per_class = map(one, buffers[1:], found[1:])
        return ClassSums(write(buffers.weight, slice_, options.vocab_axis), *per_class)

    def turned(self, sums: RowSums) -> RowSums:
        """Sums of tiles that lay across, with rows first."""
        return sums._replace(hidden=sums.hidden.T)

    def gradient(self, sums: RowSums, classes: ClassSums) -> HeadGradient:
        """The sums in the dtypes and shapes of the operands."""
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

        From tiles it takes a sum over each, which keeps one or two more of them at a
        time. It needs that where the gradient of `hidden` is of rounded tiles, or not
        of all, or would be another product that nobody asks for.
        """
        return (
            options.hidden_is_learned
            and self.modifiers.bias is None
            and options.softcap is None
            and options.gradient_filter_eps is None
            and self._product_dtype == self.dtype
        )


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
