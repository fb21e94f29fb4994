"""Converts the array arguments of public functions to JAX arrays.

Annotations say which arguments are arrays. Lists, Python numbers and bools, and NumPy
arrays are converted; None is accepted only where the annotation has it. A Python number
stays one where the annotation has both. An argument annotated as a bool must be one.
Messages call `__call__` and `__init__` by the name of their class.
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
from ._unknown_arguments import unknown_argument


@overload
def array_arguments[**P, R](function: Callable[P, R]) -> Callable[P, R]: ...
@overload
def array_arguments[**P, R](
    *, as_given: tuple[str, ...] = (), gives_functions: bool = False
) -> Callable[[Callable[P, R]], Callable[P, R]]: ...
def array_arguments(
    function: Any = None,
    *,
    as_given: tuple[str, ...] = (),
    gives_functions: bool = False,
) -> Any:
    """Decorates a function so that arguments annotated as arrays become JAX arrays.

    Integers become int32 or int64 (`signed`), so the function never sees an unsigned or
    narrow dtype. Arguments named in `as_given` are not ids in a range (numbers, or ids
    that are only compared): they keep their dtype, which may hold values that no signed
    one does, and a number among them is passed on unchecked. One that `gives_functions`
    computes nothing itself and is never made a program.
    """
    if function is None:
        return functools.partial(
            array_arguments, as_given=as_given, gives_functions=gives_functions
        )
    name = function.__qualname__.removesuffix(".__call__").removesuffix(".__init__")

    def convert(args: Any, options: dict[str, Any]) -> list[Any]:
        kinds = argument_kinds(function)
        given = list(args)
        for place, kind in enumerate([*kinds.values()][: len(args)]):
            given[place] = _converted(name, kind, args[place], as_given)
        for key, value in options.items():
            options[key] = _converted(name, kinds.get(key), value, as_given)
        return given

    def require_known(options: dict[str, Any]) -> None:
        for key in options:
            if key not in argument_kinds(function) and not takes_any(function):
                raise unknown_argument(name, key, argument_kinds(function))

    def converted(*args: Any, **options: Any) -> Any:
        return function(*convert(args, options), **options)

    is_method = "." in function.__qualname__.rpartition("<locals>.")[2]
    is_program = not is_method and not gives_functions

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        require_known(options)
        # A module may change its own state, which must not happen inside a program.
        if is_program and transfers_are_refused():
            return as_one_program(converted, args, options)
        return function(*convert(args, options), **options)

    return call


def as_array(function: str, name: str, value: Any, what: str = "an array") -> Array:
    """The value as an array; an integer that JAX cannot hold becomes the nearest.

    So an id that is out of range stays out of range instead of wrapping around.
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
            f"{function}: `{name}` must be {what}, got {described}{_held_in(value)}."
        ) from error


def _held_in(value: Any) -> str:
    """Names the array in a layer or in the box of a partitioned parameter."""
    if hasattr(value, "unbox"):
        return "; its array is `.unbox()`"
    if hasattr(value, "kernel"):
        return ", a layer; its array is `.kernel`, of inputs by outputs (vocab_axis=1)"
    if hasattr(value, "embedding"):
        return ", a layer; its array is `.embedding`"
    return ""


class _Flag(NamedTuple):
    """An argument that is a bool of Python."""

    name: str


class ArrayKind(NamedTuple):
    """An argument that is an array."""

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
    """Kinds of the arguments in signature order, then of `**options`; None for others.

    Only arrays, numbers that may be arrays, and bools have a kind.
    """
    parameters = inspect.signature(function).parameters.values()
    kinds = {each.name: _kind(each.name, each.annotation) for each in parameters}
    for each in parameters:
        if typing.get_origin(each.annotation) is typing.Unpack:
            (options,) = typing.get_args(each.annotation)
            hints = typing.get_type_hints(options).items()
            kinds |= {name: _kind(name, hint) for name, hint in hints}
    return kinds


@functools.cache
def takes_any(function: Callable[..., Any]) -> bool:
    """Whether `**options` of the function are of any name."""
    return any(
        each.kind == each.VAR_KEYWORD
        and typing.get_origin(each.annotation) is not typing.Unpack
        for each in inspect.signature(function).parameters.values()
    )


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
    """Yields the types that an annotation allows; aliases and unions are expanded."""
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
    """Integers clipped to the range of the dtype that JAX gives them."""
    if not np.issubdtype(value.dtype, np.integer):
        return value
    limits = np.iinfo(jax.dtypes.canonicalize_dtype(value.dtype))
    return np.asarray(np.clip(value, limits.min, limits.max))
