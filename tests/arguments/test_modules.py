"""Modules take lists for their arrays, and name themselves where something is none."""

import contextlib
import functools
import inspect
import io
import sys
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
from flax import linen, nnx

import softlib
from softlib import losses
from softlib._array_arguments import ArrayKind, argument_kinds
from tests import example_calls, programs, public_names
from tests.host import jnp


def module_classes() -> dict[str, type]:
    """The public modules that are called with arrays."""
    return {
        each.name: each.value
        for each in public_names.public_names()
        if each.package == "softlib.nn"
        and isinstance(each.value, type)
        and "__call__" in vars(each.value)
        and required(each.value)
    }


def required(cls: type) -> list[str]:
    kinds = argument_kinds(vars(cls)["__call__"]).values()
    found = (kind for kind in kinds if isinstance(kind, ArrayKind))
    return [kind.name for kind in found if not kind.optional]


class _Reached(BaseException):
    """The example has come to the call of its module."""


@functools.cache
def example(cls: type) -> tuple[Any, dict[str, Any]]:
    """The module of the class' example and the arrays that it is called with."""
    original = vars(cls)["__call__"]
    calls: list[tuple[Any, dict[str, Any]]] = []

    @functools.wraps(original)
    def recording(self: Any, *args: Any, **options: Any) -> Any:
        bound = inspect.signature(original).bind(self, *args, **options)
        arguments = dict(bound.arguments)
        calls.append((arguments.pop("self"), arguments))
        raise _Reached

    names = {"jax": jax, "jnp": jnp, "np": np, "softlib": softlib}
    names |= vars(sys.modules[cls.__module__])
    with (
        mock.patch.object(cls, "__call__", recording),
        contextlib.suppress(_Reached),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        for source in example_calls.sources(cls):
            exec(compile(source, cls.__name__, "exec"), names)
    assert calls, f"the example of {cls.__name__} does not call it"
    return calls[0]


NNX = [
    name for name, cls in module_classes().items() if not issubclass(cls, linen.Module)
]


def test_all_modules_are_found():
    assert {"OutputHead", "LinenOutputHead", "MixtureOfExperts"} <= {*module_classes()}
    assert len(NNX) >= 12


@pytest.mark.parametrize("name", NNX)
def test_lists_are_arrays(name):
    module, arguments = example(module_classes()[name])
    lists = {
        key: value.tolist() if isinstance(value, jax.Array) else value
        for key, value in arguments.items()
    }
    programs.assert_same(lambda: module(**lists), lambda: module(**arguments))


@pytest.mark.parametrize("name", NNX)
def test_none_is_no_array(name):
    cls = module_classes()[name]
    module, arguments = example(cls)
    for argument in required(cls):
        known = rf"^{name}: `{argument}` must be an array, got None\.$"
        with pytest.raises(TypeError, match=known):
            module(**arguments | {argument: None})


def test_modules_of_linen():
    head = softlib.nn.LinenOutputHead(features=2, num_classes=3)
    hidden, labels = jnp.eye(2), jnp.array([1, 2])
    variables = head.init(jax.random.key(0), hidden)
    call: Any = head.apply
    wanted, found = (
        losses.softmax_cross_entropy(call(variables, rows), labels)
        for rows in (hidden, hidden.tolist())
    )
    np.testing.assert_array_equal(found, wanted)
    with pytest.raises(TypeError, match=r"^LinenOutputHead: `hidden` must be an array"):
        head.apply(variables, None)


def methods() -> dict[str, Any]:
    """The other public methods of modules that take arrays, by `Class.method`."""
    found = {}
    for each in public_names.public_names():
        cls = each.value
        # (flax wraps the methods of linen's.)
        if not isinstance(cls, type) or not issubclass(cls, nnx.Module):
            continue
        for name, value in vars(cls).items():
            if name.startswith("_") or not inspect.isfunction(value):
                continue
            kinds = argument_kinds(inspect.unwrap(value)).values()
            if any(isinstance(kind, ArrayKind) for kind in kinds):
                found[f"{each.name}.{name}"] = value
    return found


def test_methods_name_what_is_no_array():
    found = methods()
    assert {"VQLogitsHead.sample", "FourierHead.density"} <= {*found}
    for name, method in found.items():
        for kind in argument_kinds(inspect.unwrap(method)).values():
            if isinstance(kind, ArrayKind) and not kind.optional:
                known = rf"^{name}: `{kind.name}` must be an array, got None\.$"
                with pytest.raises(TypeError, match=known):
                    method(None, **{kind.name: None})
