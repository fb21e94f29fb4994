"""Checks of the arguments of all sources that turn raw logits into final ones."""

from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array

from softlib import _checks as checks
from softlib._dispatch import Operation
from softlib.typing import Implementations

from ._engine.tile import Modifiers, Options
from ._source_rows import Shape


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
    scale: ArrayLike | None = None,
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
        per_row("scale", scale),
        per_row("temperature", temperature),
        where,
    )


def checked_per_row(
    function: str, name: str, value: ArrayLike | None, batch: Shape, dtype: Any
) -> Array | None:
    """A checked number for all rows, or one for each; a temperature is positive."""
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


def checked_options(function: str, softcap: float | None) -> Options:
    if softcap is not None:
        checks.require_positive_number(function, "softcap", softcap)
        softcap = float(softcap)
    return Options((), softcap)


def shown_modifiers(modifiers: Modifiers, options: Options) -> dict[str, Any]:
    """The modifiers by the names of the arguments."""
    return {
        "bias": modifiers.bias,
        "scale": modifiers.scale,
        "softcap": options.softcap,
        "temperature": modifiers.temperature,
        "class_where": modifiers.class_where,
    }
