"""Entries of an array at places along one of its axes, with a product as transpose.

The transpose of `jnp.take` is a scatter, which adds in any order on a GPU; a product
with the places as one-hot rows has one order. JAX knows no function whose transpose is
given and that can be mapped as well, so both are primitives, transposes of each other.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Integer

from ._dtypes import accumulator_dtype
from ._primitive import type_of
from ._sharding import match_varying


def look_up(array: Array, places: Integer[Array, " P"], axis: int) -> Array:
    """The entries of `array` at places in range, in the place of `axis`."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return jnp.take(array, places, axis=axis)
    array, places = match_varying((array, places))
    return _look_up_p.bind(array, places, axis=axis, size=array.shape[axis])


def _take(array: Array, places: Array, *, axis: int, size: int) -> Array:
    return jnp.take(array, places, axis=axis, mode="clip")


def _collect(entries: Array, places: Array, *, axis: int, size: int) -> Array:
    """The sum of the entries of each place, 0 where no entry belongs."""
    is_place = jax.nn.one_hot(places, size, dtype=entries.dtype)
    rows = jnp.moveaxis(entries, axis, 0)
    wide = accumulator_dtype(entries)
    found = jnp.tensordot(is_place.T, rows, 1, preferred_element_type=wide)
    return jnp.moveaxis(found, 0, axis).astype(entries.dtype)


def _primitive(name: str, plain: Callable[..., Array]) -> Primitive:
    """A function that is linear in its first operand."""
    primitive = Primitive(name)
    static = ("axis", "size")
    traced = jax.jit(plain, static_argnames=static)  # remembers the types of results

    def result(*avals: Any, **options: Any) -> Any:
        (found,) = traced.trace(*map(type_of, avals), **options).jaxpr.out_avals
        return found

    def mapped(operands: Any, axes: Any, *, axis: int, size: int) -> Any:
        (array, places), (of_array, of_places) = operands, axes
        if of_places is None:
            array = jnp.moveaxis(array, of_array, 0)
            return primitive.bind(array, places, axis=axis + 1, size=size), 0
        places = jnp.moveaxis(places, of_places, 0)
        if of_array is None and primitive is _look_up_p:
            found = primitive.bind(array, places.reshape(-1), axis=axis, size=size)
            shape = found.shape[:axis], places.shape, found.shape[axis + 1 :]
            return found.reshape(sum(shape, ())), axis
        one = functools.partial(primitive.bind, axis=axis, size=size)
        if of_array is None:
            return lax.map(lambda places: one(array, places), places), 0
        array = jnp.moveaxis(array, of_array, 0)
        return lax.map(lambda pair: one(*pair), (array, places)), 0

    def derivative(primals: Any, tangents: Any, **options: Any) -> Any:
        array, places = primals
        # The rule is not called without a tangent, and integers have none.
        bind = functools.partial(primitive.bind, **options)
        return bind(array, places), bind(tangents[0], places)

    primitive.def_abstract_eval(result)
    primitive.def_impl(traced)
    ad.primitive_jvps[primitive] = derivative
    batching.primitive_batchers[primitive] = mapped
    mlir.register_lowering(primitive, mlir.lower_fun(plain, multiple_results=False))
    return primitive


_look_up_p = _primitive("softlib_look_up", _take)
_collect_p = _primitive("softlib_collect", _collect)


def _transpose(other: Primitive) -> Callable[..., Any]:
    def rule(cotangent: Any, _: Any, places: Any, **options: Any) -> Any:
        return other.bind(cotangent, places, **options), None

    return rule


ad.primitive_transposes[_look_up_p] = _transpose(_collect_p)
ad.primitive_transposes[_collect_p] = _transpose(_look_up_p)
