"""A mask of attention as a function that a kernel for GPUs can compile.

Masks are arithmetic on indices, written for any array. A kernel traces them and runs
the operations one by one, those that its compiler lacks in other words.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

type Mask = Callable[..., Any]

# Of integers and booleans. What is missing here no kernel was compiled with.
_OPERATIONS = """
    abs add and broadcast_in_dim clamp clz convert_element_type copy div eq ge gt le lt
    max min mul ne neg not or rem select_n shift_left shift_right_arithmetic sign square
    sub xor
"""


def missing(mask: Mask, scalars: int) -> list[str]:
    """Operations of the mask that kernels lack; `scalars` as in `Form`."""
    index = jax.ShapeDtypeStruct((64, 64), jnp.int32)
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    closed = jax.make_jaxpr(mask)(index, index, *[scalar] * scalars)
    return sorted(_names(closed.jaxpr) - set(_OPERATIONS.split()))


def evaluate(mask: Mask, *arguments: Any) -> Any:
    """`mask(*arguments)`, inside a kernel."""
    closed = jax.make_jaxpr(mask)(*arguments)
    (found,) = _run(closed.jaxpr, closed.consts, arguments)
    return found


def _names(jaxpr: Any) -> set[str]:
    found = set()
    for equation in jaxpr.eqns:
        inner = _inner(equation)
        found |= {equation.primitive.name} if inner is None else _names(inner.jaxpr)
    return found


def _inner(equation: Any) -> Any:
    """The body of a compiled function, such as those of jax.numpy."""
    return equation.params.get("jaxpr")


def _run(jaxpr: Any, constants: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    values = dict(zip(jaxpr.constvars, constants, strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))
    read = lambda x: x.val if isinstance(x, core.Literal) else values[x]
    for equation in jaxpr.eqns:
        inputs = [read(x) for x in equation.invars]
        inner = _inner(equation)
        if inner is not None:
            found = _run(inner.jaxpr, inner.consts, inputs)
        elif equation.primitive is lax.not_p and inputs[0].dtype == jnp.bool_:
            # The compiler widens a boolean to invert it, and fails.
            found = [lax.bitwise_xor(inputs[0], jnp.ones_like(inputs[0]))]
        else:
            found = equation.primitive.bind(*inputs, **equation.params)
            found = found if equation.primitive.multiple_results else [found]
        values.update(zip(equation.outvars, found, strict=True))
    return [read(x) for x in jaxpr.outvars]
