"""The front door: what a public function is given for an array becomes one here.

Functions say in their annotations which arguments are arrays. Lists, Python numbers and
bools, and arrays of NumPy are taken for arrays in all of them; None only where the
annotation has it. A Python number stays one where the annotation has both. What is
annotated as a bool must be one. Messages call `__call__` and `__init__` by the name of
their class.
"""

import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import AbstractArray, Array

from ._ids import signed
from ._one_program import as_one_program, transfers_are_refused


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
    values that no signed one holds. A number of such a name is not looked at.
    """
    if function is None:
        return functools.partial(array_arguments, as_given=as_given)
    name = function.__qualname__.removesuffix(".__call__").removesuffix(".__init__")

    def converted(*args: Any, **options: Any) -> Any:
        kinds = argument_kinds(function)
        given = list(args)
        for place, kind in enumerate([*kinds.values()][: len(args)]):
            given[place] = _converted(name, kind, args[place], as_given)
        for key, value in options.items():
            options[key] = _converted(name, kinds.get(key), value, as_given)
        return function(*given, **options)

    is_method = "." in function.__qualname__.rpartition("<locals>.")[2]

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        # A module may have a state, which no program leaves behind.
        if not is_method and transfers_are_refused():
            return as_one_program(converted, args, options)
        return converted(*args, **options)

    return call


def as_array(function: str, name: str, value: Any, what: str = "an array") -> Array:
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
            f"{function}: `{name}` must be {what}, got {described}."
        ) from error


class _Flag(NamedTuple):
    """An argument that is a bool of Python."""

    name: str


class ArrayKind(NamedTuple):
    """What an annotation says of an argument that is an array."""

    name: str
    optional: bool
    integer: bool


class NumberKind(NamedTuple):
    """An argument that is a number or an array; numbers are static, also of NumPy."""

    name: str
    optional: bool


type _Kind = ArrayKind | NumberKind | _Flag | None


def _converted(
    function: str,
    kind: _Kind,
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
    if isinstance(kind, NumberKind):
        if kind.name in as_given:
            return value
        if isinstance(value, int | float | np.generic | np.ndarray):
            return value
        return as_array(function, kind.name, value, "a number or an array")
    array = as_array(function, kind.name, value)
    if kind.integer and kind.name not in as_given:
        return signed(array)
    return array


@functools.cache
def argument_kinds(function: Callable[..., Any]) -> dict[str, _Kind]:
    """In the order of the signature, and those of `**options` behind.

    None for what is neither an array nor a bool.
    """
    parameters = inspect.signature(function).parameters.values()
    kinds = {each.name: _kind(each.name, each.annotation) for each in parameters}
    for each in parameters:
        if typing.get_origin(each.annotation) is typing.Unpack:
            (options,) = typing.get_args(each.annotation)
            hints = typing.get_type_hints(options).items()
            kinds |= {name: _kind(name, hint) for name, hint in hints}
    return kinds


def _kind(name: str, annotation: Any) -> _Kind:
    if annotation is bool:
        return _Flag(name)
    members = list(_members(annotation))
    known = [each for each in members if each is not types.NoneType]
    optional = len(known) < len(members)
    arrays = [each for each in known if _is_array(each)]
    if not arrays:
        return None
    if len(arrays) == len(known):
        integer = any("int32" in getattr(each, "dtypes", ()) for each in arrays)
        return ArrayKind(name, optional, integer)
    numbers = all(_is_number(each) for each in known if not _is_array(each))
    return NumberKind(name, optional) if numbers else None


def _members(annotation: Any) -> Iterator[Any]:
    """The types that an annotation allows, those of aliases and unions within it."""
    if isinstance(annotation, typing.TypeAliasType):
        yield from _members(annotation.__value__)
    elif typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for each in typing.get_args(annotation):
            yield from _members(each)
    else:
        yield annotation


def _is_number(annotation: Any) -> bool:
    known = (int, float, complex, np.generic, np.ndarray)
    return isinstance(annotation, type) and issubclass(annotation, known)


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
