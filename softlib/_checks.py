"""Argument checks at trace time, one line at each call.

Every message has the form "function: `argument` must <condition>, got <value>."
Only static facts are checked (shapes, dtypes, Python values); a bad value inside an
array, which a trace cannot see, gives NaN in the rows it touches.
"""

import contextlib
import math
from collections.abc import Collection, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array

from ._dispatch import Operation
from .typing import Implementations


@contextlib.contextmanager
def under_name(function: str, called: str) -> Iterator[None]:
    """Lets messages of the function `called` within begin with the caller's name.

    For a public function of another package: its user knows the caller only.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        message = str(error)
        if not message.startswith(f"{called}: "):
            raise
        raise type(error)(function + message.removeprefix(called)) from None


def require_floating(function: str, **arrays: Array | None) -> None:
    for name, array in arrays.items():
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(
                f"{function}: `{name}` must have a floating dtype, got {array.dtype}."
            )


def require_integer(function: str, **arrays: Array | None) -> None:
    for name, array in arrays.items():
        if array is not None and not jnp.issubdtype(array.dtype, jnp.integer):
            raise TypeError(
                f"{function}: `{name}` must have an integer dtype (class ids), "
                f"got {array.dtype}."
            )


def require_boolean(function: str, **arrays: Array | None) -> None:
    for name, array in arrays.items():
        if array is not None and array.dtype != jnp.bool_:
            raise TypeError(
                f"{function}: `{name}` must have dtype bool (True for what counts), "
                f"got {array.dtype}."
            )


def require_rank(function: str, name: str, array: Array, least: int, axes: str) -> None:
    if array.ndim < least:
        raise ValueError(
            f"{function}: `{name}` must have at least {least} "
            f"{'axis' if least == 1 else 'axes'} {axes}, got shape {array.shape}."
        )


def require_shape(
    function: str, name: str, array: Array | None, shape: tuple[int, ...], why: str
) -> None:
    if array is not None and array.shape != shape:
        raise ValueError(
            f"{function}: `{name}` must have shape {shape} ({why}), got {array.shape}."
        )


def require_shape_in(
    function: str,
    name: str,
    array: Array | None,
    shapes: Sequence[tuple[int, ...]],
    why: str,
) -> None:
    if array is not None and array.shape not in shapes:
        known = " or ".join(str(shape) for shape in dict.fromkeys(shapes))
        raise ValueError(
            f"{function}: `{name}` must have shape {known} ({why}), got {array.shape}."
        )


def require_broadcastable(
    function: str, name: str, array: Array | None, shape: tuple[int, ...], why: str
) -> None:
    if array is None:
        return
    padded = (1,) * (len(shape) - array.ndim) + array.shape
    fits = len(padded) == len(shape) and all(
        own in (1, full) for own, full in zip(padded, shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"{function}: `{name}` must broadcast to shape {shape} ({why}), "
            f"got {array.shape}."
        )


def checked_where(
    function: str, where: ArrayLike | None, shape: tuple[int, ...], why: str
) -> Array:
    """`where` broadcast to `shape`; None is True everywhere."""
    where = jnp.asarray(True if where is None else where)
    require_boolean(function, where=where)
    require_broadcastable(function, "where", where, shape, why)
    return jnp.broadcast_to(where, shape)


def require_instance(
    function: str, name: str, value: object, kind: type, what: str
) -> None:
    """Requires a value of a class, which the error calls `what`."""
    if not isinstance(value, kind):
        raise TypeError(
            f"{function}: `{name}` must be {what}, got {type(value).__name__}."
        )


def require_known_below(
    function: str, name: str, array: Array, stop: int, what: str
) -> None:
    """Requires entries in [0, stop), which the error calls `what`, if they are known.

    Those of a traced array are not.
    """
    if isinstance(array, jax.core.Tracer) or not array.size:
        return
    values = np.asarray(array)
    least, most = int(values.min()), int(values.max())
    if least < 0 or most >= stop:
        raise ValueError(
            f"{function}: `{name}` must hold {what} in [0, {stop}), got "
            f"{least if least < 0 else most}."
        )


def require_number(function: str, name: str, value: object) -> None:
    """Requires a Python number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(
            f"{function}: `{name}` must be a Python number (it is static), "
            f"got {type(value).__name__}."
        )


def require_positive_number(function: str, name: str, value: object) -> None:
    """Requires a finite Python number above 0."""
    require_number(function, name, value)
    assert isinstance(value, int | float)
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(
            f"{function}: `{name}` must be positive and finite, got {value}."
        )


def require_positive_integer(function: str, name: str, value: object) -> None:
    require_integer_from(function, name, value, 1)


def require_integer_from(function: str, name: str, value: object, least: int) -> None:
    """Requires a Python int that is not below `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"{function}: `{name}` must be a Python int (it is static), "
            f"got {type(value).__name__}."
        )
    if value < least:
        raise ValueError(f"{function}: `{name}` must be at least {least}, got {value}.")


def require_below(function: str, name: str, value: float, bound: float) -> None:
    if not -math.inf < value < bound:
        raise ValueError(
            f"{function}: `{name}` must be finite and below {bound}, got {value}."
        )


def require_scalar(
    function: str, name: str, value: ArrayLike, least: float, most: float
) -> None:
    """Requires a number or a scalar array; only a Python number's range is checked."""
    shape = jnp.shape(value)
    if shape != ():
        raise ValueError(
            f"{function}: `{name}` must be a number or a scalar array, "
            f"got shape {shape}."
        )
    if isinstance(value, int | float) and not least <= value <= most:
        bounds = f"in [{least:g}, {most:g}]" if most < math.inf else f">= {least:g}"
        raise ValueError(f"{function}: `{name}` must be {bounds}, got {value}.")


def require_positive_scalars(function: str, **values: ArrayLike) -> None:
    """Requires finite numbers above 0, or scalar arrays of any value."""
    for name, value in values.items():
        if isinstance(value, int | float):
            require_positive_number(function, name, value)
        else:
            require_scalar(function, name, value, 0, math.inf)


def require_axes(
    function: str, name: str, value: int | tuple[int, ...] | None, ndim: int
) -> None:
    if value is None:
        return
    if not isinstance(value, int | tuple | list):
        raise TypeError(
            f"{function}: `{name}` must be an int or a tuple of ints (it is static), "
            f"got {value!r}; other options are given by their names."
        )
    axes = (value,) if isinstance(value, int) else tuple(value)
    if not all(isinstance(axis, int) and -ndim <= axis < ndim for axis in axes):
        raise ValueError(
            f"{function}: `{name}` must hold axes of an array with {ndim} axes, "
            f"got {value!r}."
        )
    if len({axis % ndim for axis in axes}) < len(axes):
        raise ValueError(
            f"{function}: `{name}` must name no axis twice, got {value!r}."
        )


def require_one_of(
    function: str, name: str, value: object, choices: Collection[object]
) -> None:
    if value not in choices:
        known = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{function}: `{name}` must be one of {known}, got {value!r}.")


def require_names(
    function: str, name: str, value: object, choices: Collection[str]
) -> None:
    """Requires a sequence of distinct, known names."""
    known = ", ".join(choices)
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(
            f"{function}: `{name}` must be a tuple of names out of {known}, "
            f"got {value!r}."
        )
    for item in value:
        if item not in choices:
            raise ValueError(
                f"{function}: `{name}` must only hold names out of {known}, "
                f"got {item!r}."
            )
    if not value or len(set(value)) < len(value):
        raise ValueError(
            f"{function}: `{name}` must hold at least one name and none twice, "
            f"got {tuple(value)!r}."
        )


def require_implementation(
    function: str, operation: Operation, names: Implementations
) -> None:
    """Requires known implementation names, also where no implementation is chosen."""
    try:
        operation.candidates(names)
    except ValueError as error:
        message = str(error).removeprefix(f"{operation.name}: ")
        raise ValueError(f"{function}: {message}") from None
