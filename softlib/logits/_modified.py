"""The base of values that hold raw logits and modifiers of them."""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from softlib._sharding import in_auto_mode, match_varying
from softlib.typing import AxisName, Implementations

from ._engine import stream
from ._engine.blocks import Blocks, arrays_of, with_layout
from ._engine.tile import NO_MODIFIERS, Modifiers, Options, RowStatistics
from ._source_rows import (
    collapsed,
    collapsed_modifiers,
    label_rows,
    ranked_rows,
)
from ._value import AbstractLogits


class ModifiedLogits(AbstractLogits):
    """Raw logits, and modifiers that turn them into final logits."""

    function: str
    modifiers: Modifiers
    options: Options
    implementation: Implementations
    axis_name: AxisName | None = None  # over which the classes are divided

    @property
    def numbers_per_class(self) -> int | None:
        """Numbers that a block makes of each class; None if as many as it is given."""
        return None

    @abc.abstractmethod
    def layout(self) -> Any:
        """The same tree with a `Layout` instead of each array."""

    @abc.abstractmethod
    def block(self) -> Array:
        """The raw logits, of a value whose batch is one axis."""

    def prepared(self) -> Any:
        """The value whose blocks are visited."""
        return self

    @abc.abstractmethod
    def operand(
        self, labels: Array | None = None, label_logits: Array | None = None
    ) -> Any:
        """The operands of the engine, whose rows are one axis."""

    @property
    def own_classes(self) -> int:
        """Number of classes on this device."""
        return self.num_classes

    @property
    def per_row(self) -> Array:
        """An array whose first axes are the batch."""
        return next(a for layout, a in arrays_of(self) if layout.rows)

    def over_rows[L](self: L, function: Callable[[Array], Array]) -> L:
        return _over_rows(self, function)

    def batch_axes[L](self: L, of_rows: Any = 0, of_all: Any = None) -> L:
        return _batch_axes(self, of_rows, of_all)

    def chained_statistics[L](
        self: L, names: Sequence[str], labels: Array | None = None
    ) -> tuple[RowStatistics, L]:
        """The statistics, and the logits for the next term of a loss.

        Terms that are chained in this way add to one gradient of the weight.
        """
        return _statistics_and_value(self, names, labels)

    def top_classes(self, count: int) -> tuple[Array, Array]:
        """The greatest logits of this device's classes, and their ids; no gradient."""

        def engine(_, value):
            operand = match_varying(value.operand())
            found = stream.top_classes(self.options, operand, count)
            return tuple(array.reshape(*self.batch_shape, count) for array in found)

        batch = len(self.batch_shape)
        rows = lambda spec: PartitionSpec(*spec[:batch], None)
        specs = lambda spec: (rows(spec), rows(spec))
        constant = lax.stop_gradient(self.prepared())
        return in_auto_mode(engine, specs, constant.per_row, constant)

    @property
    def bias(self) -> Float[Array, " V"] | None:
        """The numbers added to the scaled logits, one per class."""
        return self.modifiers.bias

    @property
    def scale(self) -> Float[Array, "..."] | None:
        """The factor of raw logits, a scalar or one number per row."""
        return self.modifiers.scale

    @property
    def softcap(self) -> float | None:
        """The bound of the logits before the temperature."""
        return self.options.softcap

    @property
    def temperature(self) -> Float[Array, "..."] | None:
        """The divisor of the capped logits, a scalar or one number per row."""
        return self.modifiers.temperature

    @property
    def class_where(self) -> Bool[Array, "..."] | None:
        return self.modifiers.class_where

    def finite_classes(self) -> Bool[Array, "..."] | None:
        """The classes whose final logit is not -inf for a known reason; None: all.

        Of a head that is the bias, and not after a softcap.
        """
        if self.bias is None or self.softcap is not None:
            return None
        return self.bias != -jnp.inf

    def without_labels[L](self: L) -> L:
        """The logits with lse, mean_logit and sum_softplus that leave labels out."""
        return _without_labels(self)


def _without_labels(value: Any) -> Any:
    options = dataclasses.replace(value.options, exclude_labels=True)
    return value.replaced(options=options)


def _statistics_and_value(value: Any, names: Sequence[str], labels: Any) -> Any:
    return value.statistics(names, labels), value


def _over_rows(value: Any, function: Callable[[Array], Array]) -> Any:
    where = value.modifiers.class_where
    if where is not None and where.ndim > 1:
        where = jnp.broadcast_to(where, value.shape)
        value = value.replaced(modifiers=value.modifiers._replace(class_where=where))
    of = lambda layout, array: function(array) if layout.rows else array
    return with_layout(value, of)


def _batch_axes(value: Any, of_rows: Any, of_all: Any) -> Any:
    return with_layout(value, lambda layout, array: of_rows if layout.rows else of_all)


def blocks_of(value: Any, labels: Array | None, label_logits: Array | None) -> Blocks:
    """The operands of a value that computes its logits block by block."""
    batch, shape = value.batch_shape, value.shape
    # Fields that do not change a block are left out of the keys of compiled programs.
    bare = value.replaced(
        function="", modifiers=NO_MODIFIERS, options=Options(()), implementation=None
    )
    rows = with_layout(
        bare, lambda layout, array: collapsed(array, batch) if layout.rows else array
    )
    return Blocks(
        rows,
        label_rows(labels, batch),
        collapsed_modifiers(value.modifiers, shape),
        ranked_rows(labels, label_logits, batch),
    )
