"""Arguments that turn raw logits into final ones: checked, whatever the source is."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from softlib import _checks as checks
from softlib._dispatch import Operation
from softlib.typing import Implementations

from ._engine.tile import Modifiers, Options, RowStatistics, only
from ._source_rows import Shape, of_rows_with_classes
from ._value import AbstractLogits

VALUES = ("LinearLogits", "StoredLogits")


class ModifiedLogits(AbstractLogits):
    """Raw logits and what turns them into final ones."""

    function: str
    modifiers: Modifiers
    options: Options

    @property
    def bias(self) -> Float[Array, " V"] | None:
        """The numbers added to the scaled logits, one per class."""
        return self.modifiers.bias

    @property
    def scale(self) -> Float[Array, "..."] | None:
        """The factor of raw logits, a scalar or one number per row."""
        return self.modifiers.logit_scale

    @property
    def softcap(self) -> float | None:
        """The bound of the logits before the temperature."""
        return self.options.logit_softcap

    @property
    def temperature(self) -> Float[Array, "..."] | None:
        """The divisor of the capped logits, a scalar or one number per row."""
        return self.modifiers.temperature

    @property
    def class_where(self) -> Bool[Array, "..."] | None:
        return self.modifiers.class_where

    def without_labels[L](self: L) -> L:
        """The same, but lse, mean_logit and sum_softplus leave the labels out."""
        return _without_labels(self)

    def statistics_by(
        self,
        stream: Callable[[Sequence[str], Array | None, Array | None], RowStatistics],
        names: Sequence[str],
        labels: Array | None,
    ) -> RowStatistics:
        """Asks `stream` for the statistics: twice if the rank of a label is among them.

        `stream` takes names, labels and, for ranks, the logits of these.
        """
        labels = of_rows_with_classes(
            labels, self.count_classes(), self.batch_shape, self.num_classes
        )
        if "label_rank" not in names:
            return stream(names, labels, None)
        # To count what comes before a label, a second stream must know its logit.
        assert labels is not None
        others = [name for name in names if name != "label_rank"]
        found = stream([*others, "label_logits"], labels, None)
        assert found.label_logits is not None
        logits = lax.stop_gradient(found.label_logits)
        rank = stream(["label_rank"], labels, logits).label_rank
        assert rank is not None
        selected = labels >= 0
        if self.modifiers.class_where is not None:
            at = self.at_labels(self.modifiers.class_where, labels) != 0
            selected = selected & at
        found = found._replace(label_rank=jnp.where(selected, rank, self.num_classes))
        return only(found, self.options.including(*names))


def _without_labels(value: Any) -> Any:
    options = dataclasses.replace(value.options, exclude_labels=True)
    return value.replaced(options=options)


def require_classes(function: str, name: str, vocabulary: int, shape: Shape) -> None:
    if vocabulary == 0:
        raise ValueError(
            f"{function}: `{name}` must have at least one class, got shape {shape}."
        )


def checked_modifiers(
    function: str,
    batch: Shape,
    vocabulary: int,
    dtype: Any,
    classes: Shape,
    *,
    bias: ArrayLike | None = None,
    logit_scale: ArrayLike | None = None,
    temperature: ArrayLike | None = None,
    class_where: ArrayLike | None = None,
) -> Modifiers:
    bias = None if bias is None else jnp.asarray(bias)
    checks.require_floating(function, bias=bias)
    checks.require_shape(function, "bias", bias, (vocabulary,), "one per class")

    where = None if class_where is None else jnp.asarray(class_where)
    checks.require_boolean(function, class_where=where)
    if len(classes) == 1:
        checks.require_shape(function, "class_where", where, classes, "one per class")
    else:
        why = "the shape of `logits`"
        checks.require_broadcastable(function, "class_where", where, classes, why)
        if where is not None and where.ndim <= 1:
            where = jnp.broadcast_to(where, (vocabulary,))
    per_row = lambda name, value: checked_per_row(function, name, value, batch, dtype)
    return Modifiers(
        bias,
        per_row(_name("logit_scale", function), logit_scale),
        per_row("temperature", temperature),
        where,
    )


def checked_per_row(
    function: str, name: str, value: ArrayLike | None, batch: Shape, dtype: Any
) -> Array | None:
    """A number for all rows, or one for each; a temperature is positive."""
    if value is None:
        return None
    if isinstance(value, bool):
        raise TypeError(
            f"{function}: `{name}` must be a number or a floating array, got bool."
        )
    if isinstance(value, int | float):
        if name == "temperature" and not value > 0:
            raise ValueError(
                f"{function}: `temperature` must be positive, got {value}."
            )
        return jnp.asarray(value, dtype)
    value = jnp.asarray(value)
    checks.require_floating(function, **{name: value})
    why = "a scalar, or one per row"
    checks.require_shape_in(function, name, value, ((), batch), why)
    return value


def checked_implementation(
    function: str, operation: Operation, implementation: Implementations
) -> Implementations:
    """Names as a tuple, which compares by value and is hashable."""
    checks.require_implementation(function, operation, implementation)
    if implementation is None or isinstance(implementation, str):
        return implementation
    return tuple(implementation)


def checked_options(function: str, logit_softcap: float | None) -> Options:
    if logit_softcap is not None:
        name = _name("logit_softcap", function)
        checks.require_positive_number(function, name, logit_softcap)
        logit_softcap = float(logit_softcap)
    return Options((), logit_softcap)


def _name(name: str, function: str) -> str:
    """A modifier as the constructor of a value calls it, or a function of arrays."""
    return name.removeprefix("logit_") if function in VALUES else name


def modifier_axes(modifiers: Modifiers, of_rows: Any, of_all: Any) -> Modifiers:
    """`of_rows` in the place of numbers per row, `of_all` in that of all others."""

    def axis(value: Array | None, per_row: int) -> Any:
        if value is None:
            return None
        return of_rows if value.ndim >= per_row else of_all

    return Modifiers(
        axis(modifiers.bias, 2),
        axis(modifiers.logit_scale, 1),
        axis(modifiers.temperature, 1),
        axis(modifiers.class_where, 2),
        axis(modifiers.class_log_weights, 2),
        axis(modifiers.centre, 1),
    )


def shown_modifiers(modifiers: Modifiers, options: Options) -> dict[str, Any]:
    """By the names under which a value is given them."""
    return {
        "bias": modifiers.bias,
        "scale": modifiers.logit_scale,
        "softcap": options.logit_softcap,
        "temperature": modifiers.temperature,
        "class_where": modifiers.class_where,
    }
