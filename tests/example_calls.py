"""One call of every public function: the one that its docstring's example makes."""

import contextlib
import dataclasses
import doctest
import functools
import importlib
import inspect
import io
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
    if inspect.isfunction(name.value)
    and name.package != "softlib.testing"
    and not public_names.is_of_text(name)
]


@dataclasses.dataclass(frozen=True)
class Call:
    """A function with arguments by their names; those in `**options` among them.

    With `traced` the example calls it only inside a transformation: the arrays have
    the shapes and dtypes of that call, and are 0.
    """

    function: Callable[..., Any]
    arguments: dict[str, Any]
    traced: bool = False

    @classmethod
    def of(cls, function: Callable[..., Any], *args: Any, **options: Any) -> "Call":
        parameters = inspect.signature(function).parameters
        arguments = dict(inspect.signature(function).bind(*args, **options).arguments)
        for parameter in parameters.values():
            if parameter.kind == parameter.VAR_KEYWORD:
                arguments |= arguments.pop(parameter.name, {})
        return cls(function, arguments)

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        return dict(inspect.signature(self.function).parameters)

    def __call__(self, **changed: Any) -> Any:
        arguments = self.arguments | changed
        given: list[Any] = []
        for parameter in self.parameters.values():
            if parameter.name not in arguments:
                continue
            if parameter.kind == parameter.VAR_POSITIONAL:
                given += arguments.pop(parameter.name)
            elif parameter.kind != parameter.KEYWORD_ONLY:
                given.append(arguments.pop(parameter.name))
        return self.function(*given, **arguments)

    def replaced(self, **arguments: Any) -> "Call":
        return dataclasses.replace(self, arguments=self.arguments | arguments)

    def cast(self, *dtypes: Any, numbers: bool = False) -> "Call":
        """The floating arguments in these dtypes, in turn; all arrays of one alike.

        With `numbers` those that may be traced become arrays, defaults included.
        """
        turn = 0
        arguments = dict(self.arguments)
        parameters = self.parameters
        for name in dict.fromkeys((*parameters, *arguments)):
            value = arguments.get(name)
            if name in parameters:
                value = arguments.get(name, parameters[name].default)
                if numbers and _is_traceable_number(parameters[name], value):
                    value = jnp.asarray(value, jnp.float32)
            if any(map(is_floating, jax.tree.leaves(value))):
                to = functools.partial(_cast, dtype=dtypes[turn % len(dtypes)])
                arguments[name] = jax.tree.map(to, value)
                turn += 1
        return dataclasses.replace(self, arguments=arguments)

    def split(self) -> tuple[Callable[[list[Any]], list[jax.Array]], list[Any]]:
        """A function of the arrays, and these; its results are arrays, too."""
        leaves, structure = jax.tree.flatten(self.arguments)
        arrays = [leaf for leaf in leaves if is_array(leaf)]

        def function(arrays: list[Any]) -> list[jax.Array]:
            rest = iter(arrays)
            whole = [next(rest) if is_array(leaf) else leaf for leaf in leaves]
            found = self(**jax.tree.unflatten(structure, whole))
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


def functions() -> dict[str, Any]:
    """Public functions by their address."""
    return {
        name.address: name.value
        for name in public_names.public_names()
        if inspect.isfunction(name.value)
    }


class _Reached(BaseException):
    """The example has come to the call that was waited for."""


@functools.cache
def of(address: str) -> Call:
    """The first call with plain arrays in the example of a function, else the first.

    The rest of the example is not run.
    """
    function = functions()[address]
    package, _, name = address.rpartition(".")
    calls: list[Call] = []

    @functools.wraps(function)
    def recording(*args: Any, **options: Any) -> Any:
        leaves = jax.tree.leaves((args, options))
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
        given, named = jax.tree.map(_without_trace, (args, options))
        call = Call.of(function, *given, **named)
        calls.append(dataclasses.replace(call, traced=traced))
        if not traced:
            raise _Reached
        return function(*args, **options)

    names = {"jax": jax, "jnp": jnp, "np": np, "softlib": softlib}
    names |= vars(sys.modules[function.__module__]) | {name: recording}
    with (
        mock.patch.object(importlib.import_module(package), name, recording),
        contextlib.suppress(_Reached),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        for source in sources(function):
            exec(compile(source, address, "exec"), names)
    assert calls, f"the example of {address} does not call it"
    if not calls[-1].traced:
        return calls[-1]
    return dataclasses.replace(
        calls[0], arguments=jax.tree.map(_of_jax, calls[0].arguments)
    )


def sources(value: Any) -> Iterator[str]:
    """The lines of the examples in a docstring."""
    for test in doctest.DocTestFinder(recurse=False).find(value, globs={}):
        for example in test.examples:
            yield example.source


def _without_trace(leaf: Any) -> Any:
    # Of NumPy: where the call is traced, an array of JAX would be, too.
    if isinstance(leaf, jax.core.Tracer):
        return np.zeros(leaf.shape, leaf.dtype)
    return leaf


def _of_jax(leaf: Any) -> Any:
    return jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf
