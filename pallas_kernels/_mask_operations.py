"""The operations of a mask, of which each kind of kernel supports some.

Masks are arithmetic on indices, written for any array: by this library or its users.
"""

from collections.abc import Callable, Set as AbstractSet
from typing import Any

import jax
import jax.numpy as jnp

type Mask = Callable[..., Any]


def missing(mask: Mask, scalars: int, operations: AbstractSet[str]) -> list[str]:
    """Names of the operations of the mask that are not among those given.

    `mask` takes two arrays of indices and some `scalars`. A choice between booleans is
    called `select_n of booleans`.
    """
    return sorted(_names(traced(mask, scalars).jaxpr) - operations)


def traced(mask: Mask, scalars: int) -> Any:
    """The mask as a program of whole tiles."""
    index = jax.ShapeDtypeStruct((64, 64), jnp.int32)
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    return jax.make_jaxpr(mask)(index, index, *[scalar] * scalars)


def inner(equation: Any) -> Any:
    """The body of a compiled function, such as those of jax.numpy; None of others."""
    is_call = equation.primitive.name in ("jit", "pjit", "closed_call")
    return equation.params["jaxpr"] if is_call else None


def name_of(equation: Any) -> str:
    """The name of an operation, as in `missing`."""
    name = equation.primitive.name
    of_booleans = name == "select_n" and equation.outvars[0].aval.dtype == jnp.bool_
    return f"{name} of booleans" if of_booleans else name


def _names(jaxpr: Any) -> set[str]:
    found = set()
    for equation in jaxpr.eqns:
        body = inner(equation)
        found |= {name_of(equation)} if body is None else _names(body.jaxpr)
    return found
