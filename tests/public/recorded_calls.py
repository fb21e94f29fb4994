"""One call of each public function, taken from the example in its docstring."""

import collections
import dataclasses
import doctest
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import softlib
from tests import public_names

FUNCTIONS = [
    name
    for name in public_names.public_names()
    if inspect.isfunction(name.value) and name.package != "softlib.testing"
]


@dataclasses.dataclass(frozen=True)
class Call:
    """Arguments by name, as in `inspect.BoundArguments`."""

    function: Callable[..., Any]
    arguments: dict[str, Any]

    @classmethod
    def of(cls, function: Callable[..., Any], *args: Any, **options: Any) -> "Call":
        bound = inspect.signature(function).bind(*args, **options)
        return cls(function, dict(bound.arguments))

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        return dict(inspect.signature(self.function).parameters)

    def result(self) -> Any:
        # In the order of the signature; what follows *args goes by name.
        ordered = collections.OrderedDict(
            (name, self.arguments[name])
            for name in self.parameters
            if name in self.arguments
        )
        bound = inspect.BoundArguments(inspect.signature(self.function), ordered)
        return self.function(*bound.args, **bound.kwargs)

    def replaced(self, **arguments: Any) -> "Call":
        return Call(self.function, {**self.arguments, **arguments})

    def cast(self, *dtypes: Any, numbers: bool = False) -> "Call":
        """The floating arguments in these dtypes, in turn; all arrays of one alike.

        With `numbers` those that may be traced become arrays, defaults included.
        """
        turn = 0
        arguments = dict(self.arguments)
        for name, parameter in self.parameters.items():
            value = arguments.get(name, parameter.default)
            if numbers and _is_traceable_number(parameter, value):
                value = jnp.asarray(value, jnp.float32)
            leaves = jax.tree.leaves(value)
            if any(map(is_floating, leaves)):
                to = functools.partial(_cast, dtype=dtypes[turn % len(dtypes)])
                arguments[name] = jax.tree.map(to, value)
                turn += 1
        return self.replaced(**arguments)

    def split(self) -> tuple[Callable[[list[Any]], list[jax.Array]], list[Any]]:
        """A function of the arrays, and these; its results are arrays, too."""
        leaves, structure = jax.tree.flatten(self.arguments)
        arrays = [leaf for leaf in leaves if is_array(leaf)]

        def function(arrays: list[Any]) -> list[jax.Array]:
            rest = iter(arrays)
            whole = [next(rest) if is_array(leaf) else leaf for leaf in leaves]
            found = self.replaced(**jax.tree.unflatten(structure, whole)).result()
            return list(filter(is_array, jax.tree.leaves(found)))

        return function, arrays


def is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def is_floating(leaf: Any) -> bool:
    return is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)


def _cast(leaf: Any, dtype: Any) -> Any:
    return jnp.asarray(leaf, dtype) if is_floating(leaf) else leaf


def _is_traceable_number(parameter: inspect.Parameter, value: Any) -> bool:
    kind = getattr(parameter.annotation, "__name__", str(parameter.annotation))
    return kind.split(" ")[0] in ("Scalar", "PerRow") and isinstance(value, float)


class _Reached(BaseException):
    """The example has come to the call that was waited for."""


@functools.cache
def recorded(name: public_names.PublicName) -> Call:
    """The first call of the function in its example; the rest is not run."""
    module = importlib.import_module(name.package)
    calls: list[Call] = []

    @functools.wraps(name.value)
    def reached(*args: Any, **options: Any) -> None:
        args, options = jax.tree.map(_without_trace, (args, options))
        calls.append(Call.of(name.value, *args, **options))
        raise _Reached

    with mock.patch.object(module, name.name, reached):
        names = {"jax": jax, "jnp": jnp, "np": np, "softlib": softlib}
        names |= vars(sys.modules[name.value.__module__])
        names |= {name.value.__name__: reached}
        try:
            for source in sources(name.value):
                exec(compile(source, name.address, "exec"), names)
        except _Reached:
            pass
    assert calls, f"the example of {name.address} does not call it"
    return calls[0]


def sources(value: Any) -> Iterator[str]:
    """The lines of the examples in a docstring."""
    for test in doctest.DocTestFinder(recurse=False).find(value, globs={}):
        for example in test.examples:
            yield example.source


def _without_trace(leaf: Any) -> Any:
    # Of the shape of the whole call: values are never looked at.
    if isinstance(leaf, jax.core.Tracer):
        return np.zeros(leaf.shape, leaf.dtype)
    return leaf
