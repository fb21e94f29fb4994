"""Errors name the function that was called, and one of its arguments."""

import re
from collections.abc import Iterator
from typing import Any

import jax
import pytest

from softlib._array_arguments import ArrayKind, NumberKind, argument_kinds
from tests import example_calls, public_names
from tests.example_calls import FUNCTIONS, Call
from tests.host import jnp

pytestmark = pytest.mark.usefixtures("untyped")

# "name: `argument` must ...", where a function of two heads says which of them.
MESSAGE = re.compile(
    r"(?P<function>[A-Za-z]\w*)(?P<second>, second \w+)?: (`(?P<argument>[^`]+)`)?"
)
# Arguments of `explain` are those of the function that it is given.
OTHERS = {"softlib.explain"}
# Fields of an argument, by the name of the field.
FIELDS = {"gate_weight": "gate"}


def bad_values(value: Any, kind: Any) -> Iterator[Any]:
    """Gives arguments of other kinds, dtypes and shapes than the example has."""
    yield "typo"
    yield None
    if not isinstance(kind, ArrayKind):
        yield from (-7, -7.5, {}, jax.ShapeDtypeStruct((2, 3, 5, 7), jnp.float32))
        return
    if not example_calls.is_array(value):
        return
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return
    yield jax.ShapeDtypeStruct(value.shape, jnp.complex64)
    yield jax.ShapeDtypeStruct((2, 3, 5, *value.shape), value.dtype)
    if value.ndim:
        yield jax.ShapeDtypeStruct((), value.dtype)
        first, *_, last = value.shape if value.ndim > 1 else (1, *value.shape)
        yield jax.ShapeDtypeStruct((*value.shape[:-1], last + 7), value.dtype)
        yield jax.ShapeDtypeStruct((first + 7, *value.shape[1:]), value.dtype)


def error(call: Call) -> Exception | None:
    """Returns what the call raises when it is traced, or None; computes nothing."""
    is_none = lambda leaf: leaf is None
    leaves, structure = jax.tree.flatten(call.arguments, is_leaf=is_none)
    is_array = lambda x: (
        isinstance(x, jax.ShapeDtypeStruct) or example_calls.is_array(x)
    )

    def function(arrays: list[Any]) -> list[Any]:
        rest = iter(arrays)
        whole = [next(rest) if is_array(leaf) else leaf for leaf in leaves]
        found = call(**jax.tree.unflatten(structure, whole))
        return list(filter(example_calls.is_array, jax.tree.leaves(found)))

    try:
        jax.eval_shape(function, list(filter(is_array, leaves)))
    except Exception as found:  # whatever it is, its words are looked at
        return found
    return None


def tried(name: public_names.PublicName) -> Iterator[tuple[str, Any, Any, str]]:
    """Argument, what the signature says of it, a bad value, and what the error says."""
    call = example_calls.of(name.address)
    kinds = argument_kinds(call.function)
    for argument in dict.fromkeys((*call.parameters, *call.arguments)):
        kind, value = kinds.get(argument), call.arguments.get(argument)
        for bad in bad_values(value, kind):
            found = error(call.replaced(**{argument: bad}))
            yield argument, kind, bad, "" if found is None else str(found)


@pytest.mark.parametrize(
    "name",
    [name for name in FUNCTIONS if name.address not in OTHERS],
    ids=lambda name: name.address,
)
def test_errors_name_the_function_that_was_called(name: public_names.PublicName):
    own = name.value.__name__
    known = {*argument_kinds(name.value), *FIELDS}
    for argument, kind, bad, message in tried(name):
        said = MESSAGE.match(message)
        if bad == "typo" and isinstance(kind, ArrayKind | NumberKind):
            assert re.match(f"{own}: `{argument}` must .* got str", message), message
        if said:
            assert said["function"] == own, message
            base = re.split(r"[\[(.]", said["argument"] or argument)[0]
            assert base in known or said["second"] or "(" in message, message
