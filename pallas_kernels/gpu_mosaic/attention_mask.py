"""A mask of attention as a function that a kernel for GPUs can compile.

Masks are arithmetic on indices, written for any array. A kernel traces them and runs
the operations one by one, replacing those that its compiler lacks.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from pallas_kernels import _mask_operations
from pallas_kernels._mask_operations import Mask, inner, traced

# Supported operations of integers and booleans; kernels were compiled with each.
_NAMES = """
    abs add and broadcast_in_dim clamp clz convert_element_type copy div eq ge gt le lt
    max min mul ne neg not or rem select_n shift_left shift_right_arithmetic sign square
    sub xor
"""
OPERATIONS = frozenset(_NAMES.split())

_COMPARISONS = {
    **dict.fromkeys((lax.eq_p, lax.le_p, lax.ge_p), True),
    **dict.fromkeys((lax.ne_p, lax.lt_p, lax.gt_p), False),
}


def missing(mask: Mask, scalars: int) -> list[str]:
    """Operations of the mask that kernels lack; `scalars` as in `Form`."""
    return _mask_operations.missing(mask, scalars, OPERATIONS)


def is_constant(mask: Mask, scalars: int) -> bool:
    """Whether the mask does not depend on its indices; arguments as in `missing`."""
    closed = traced(mask, scalars)
    return _live(closed.jaxpr).isdisjoint(closed.jaxpr.invars)


class Index(NamedTuple):
    """Indices that are created only if the mask uses them.

    The compiler does not terminate on unused values, for which it finds no layout.

    Attributes:
        shape: Shape of the indices.
        form: Function that returns them, int32.
    """

    shape: tuple[int, ...]
    form: Callable[[], Any]


def evaluate(mask: Mask, *arguments: Any) -> Any:
    """A function that evaluates the mask inside a kernel, on arrays or `Index`."""
    shapes = [
        jax.ShapeDtypeStruct(x.shape, jnp.int32) if isinstance(x, Index) else x
        for x in arguments
    ]
    closed = jax.make_jaxpr(mask)(*shapes)
    live = _live(closed.jaxpr)
    inputs = [
        x.form() if isinstance(x, Index) and var in live else x
        for var, x in zip(closed.jaxpr.invars, arguments, strict=True)
    ]
    (found,) = _run(closed.jaxpr, closed.consts, inputs)
    return found


def _live(jaxpr: Any) -> set[Any]:
    """The variables that the results depend on."""
    named = lambda found: {x for x in found if not isinstance(x, core.Literal)}
    live = named(jaxpr.outvars)
    for equation in reversed(jaxpr.eqns):
        if live.isdisjoint(equation.outvars) or _known(equation) is not None:
            continue
        body, used = inner(equation), equation.invars
        if body is not None:
            own = _live(body.jaxpr)
            pairs = zip(equation.invars, body.jaxpr.invars, strict=True)
            used = [x for x, var in pairs if var in own]
        live |= named(used)
    return live


def _known(equation: Any) -> bool | None:
    """The result of comparing an integer with itself; None for other equations."""
    primitive = equation.primitive
    if primitive in _COMPARISONS and len(set(map(id, equation.invars))) == 1:
        return _COMPARISONS[primitive]
    return None


def _run(jaxpr: Any, constants: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    values = dict(zip(jaxpr.constvars, constants, strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))
    live = _live(jaxpr)

    def read(x: Any) -> Any:
        return x.val if isinstance(x, core.Literal) else values.get(x)

    for equation in jaxpr.eqns:
        if live.isdisjoint(equation.outvars):
            continue
        inputs = [read(x) for x in equation.invars]
        body, known = inner(equation), _known(equation)
        if known is not None:
            found = [jnp.full(equation.outvars[0].aval.shape, known)]
        elif body is not None:
            found = _run(body.jaxpr, body.consts, inputs)
        elif equation.primitive is lax.not_p and inputs[0].dtype == jnp.bool_:
            # The compiler widens a boolean to invert it, and fails.
            found = [lax.bitwise_xor(inputs[0], jnp.ones_like(inputs[0]))]
        else:
            found = equation.primitive.bind(*inputs, **equation.params)
            found = found if equation.primitive.multiple_results else [found]
        values.update(zip(equation.outvars, found, strict=True))
    return [read(x) for x in jaxpr.outvars]
