"""Whether two calls are the same program, known before either is compiled."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from tests import example_calls


def assert_same(one: Callable[[], Any], other: Callable[[], Any]) -> None:
    """Asserts that calls without arguments do the same operations on the same numbers.

    They are traced. The numbers are the arrays that a call holds: two that are equal
    may be one.
    """
    (first, structure), (second, expected) = map(_traced, (one, other))
    assert structure == expected
    assert first.out_avals == second.out_avals
    assert list(_operations(first.jaxpr)) == list(_operations(second.jaxpr))
    assert _numbers(first) == _numbers(second)


def _traced(call: Callable[[], Any]) -> tuple[core.ClosedJaxpr, Any]:
    structures = []

    def arrays() -> list[Any]:
        leaves, structure = jax.tree.flatten(call())
        structures.append(structure)
        return list(filter(example_calls.is_array, leaves))

    return jax.make_jaxpr(arrays)(), structures[0]


def _operations(jaxpr: core.Jaxpr) -> Iterator[tuple[Any, ...]]:
    """Each with its results, and behind it those within it."""
    for equation in jaxpr.eqns:
        results = [str(variable.aval) for variable in equation.outvars]
        literals = [x.val for x in equation.invars if isinstance(x, core.Literal)]
        yield equation.primitive.name, results, list(map(str, literals))
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=_is_program
        ):
            if isinstance(inner, core.ClosedJaxpr):
                yield from _operations(inner.jaxpr)
            elif isinstance(inner, core.Jaxpr):
                yield from _operations(inner)


def _is_program(leaf: Any) -> bool:
    return isinstance(leaf, core.ClosedJaxpr | core.Jaxpr)


def _numbers(closed: core.ClosedJaxpr) -> set[tuple[Any, ...]]:
    found = set()
    for array in closed.consts:
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            array = jax.random.key_data(array)
        array = np.asarray(array)
        found.add((str(array.dtype), array.shape, array.tobytes()))
    return found
