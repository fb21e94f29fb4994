"""The front door: what a public function is given for an array becomes one here.

Functions say in their annotations which arguments are arrays. Lists, Python numbers and
bools, and arrays of NumPy are taken for arrays in all of them; None only where the
annotation has it. What is annotated as a bool must be one.
"""

import functools
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import AbstractArray, Array

from ._ids import signed


@overload
def array_arguments[**P, R](function: Callable[P, R]) -> Callable[P, R]: ...
@overload
def array_arguments[**P, R](
    *, as_given: tuple[str, ...]
) -> Callable[[Callable[P, R]], Callable[P, R]]: ...
def array_arguments(function: Any = None, *, as_given: tuple[str, ...] = ()) -> Any:
    """Makes arrays of the arguments that are annotated as arrays.

    Integers come out as int32 or int64 (`signed`), so that no function behind this
    meets an unsigned or narrow one. `as_given` names arguments that are no ids in a
    range, numbers or ids that are only compared: they keep their dtype, and with it
    values that no signed one holds.
    """
    if function is None:
        return functools.partial(array_arguments, as_given=as_given)
    name = function.__name__

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        kinds = argument_kinds(function)
        given = list(args)
        for place, kind in enumerate([*kinds.values()][: len(args)]):
            given[place] = _converted(name, kind, args[place], as_given)
        for key, value in options.items():
            options[key] = _converted(name, kinds.get(key), value, as_given)
        return function(*given, **options)

    return call


def as_array(function: str, name: str, value: Any) -> Array:
    """The value as an array; an integer that JAX cannot hold becomes the nearest.

    As an id it so stays out of range, and does not wrap into it.
    """
    if isinstance(value, jax.Array):
        return value
    try:
        if isinstance(value, np.ndarray | np.generic | int):
            return jnp.asarray(_held(np.asarray(value)))
        return jnp.asarray(value)
    except OverflowError:
        return jnp.asarray(_held(np.asarray(value)))
    except (TypeError, ValueError) as error:
        described = "None" if value is None else type(value).__name__
        raise TypeError(
            f"{function}: `{name}` must be an array, got {described}."
        ) from error


class _Flag(NamedTuple):
    """An argument that is a bool of Python."""

    name: str


class ArrayKind(NamedTuple):
    """What an annotation says of an argument that is an array."""

    name: str
    optional: bool
    integer: bool


def _converted(
    function: str,
    kind: "ArrayKind | _Flag | None",
    value: Any,
    as_given: tuple[str, ...],
) -> Any:
    if isinstance(kind, _Flag):
        if not isinstance(value, bool | np.bool_):
            raise TypeError(
                f"{function}: `{kind.name}` must be True or False, got {value!r}."
            )
        return value
    if kind is None or (value is None and kind.optional):
        return value
    array = as_array(function, kind.name, value)
    if kind.integer and kind.name not in as_given:
        return signed(array)
    return array


@functools.cache
def argument_kinds(function: Callable[..., Any]) -> dict[str, ArrayKind | _Flag | None]:
    """In the order of the signature; None for what is neither an array nor a bool."""
    parameters = inspect.signature(function).parameters.values()
    return {each.name: _kind(each.name, each.annotation) for each in parameters}


def _kind(name: str, annotation: Any) -> ArrayKind | _Flag | None:
    if annotation is bool:
        return _Flag(name)
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    members = typing.get_args(annotation) if union else (annotation,)
    arrays = [each for each in members if each is not types.NoneType]
    if not arrays or not all(map(_is_array, arrays)):
        return None
    integer = any("int32" in getattr(each, "dtypes", ()) for each in arrays)
    return ArrayKind(name, len(arrays) < len(members), integer)


def _is_array(annotation: Any) -> bool:
    if not isinstance(annotation, type):
        return False
    return annotation is jax.Array or issubclass(annotation, AbstractArray)


def _held(value: np.ndarray) -> np.ndarray:
    """Integers within those of the dtype that JAX has for them."""
    if not np.issubdtype(value.dtype, np.integer):
        return value
    limits = np.iinfo(jax.dtypes.canonicalize_dtype(value.dtype))
    return np.asarray(np.clip(value, limits.min, limits.max))
