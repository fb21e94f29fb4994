"""One call of every public function: the one that its docstring's example makes."""

import contextlib
import doctest
import functools
import importlib
import inspect
import io
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import softlib
from tests import public_names


class Call(NamedTuple):
    """The arguments of a call by the names of the signature; `**options` among them."""

    address: str
    function: Any
    arguments: dict[str, Any]

    def __call__(self, **changed: Any) -> Any:
        arguments = self.arguments | changed
        given: list[Any] = []
        for parameter in inspect.signature(self.function).parameters.values():
            if parameter.name not in arguments:
                continue
            if parameter.kind == parameter.VAR_POSITIONAL:
                given += arguments.pop(parameter.name)
            elif parameter.kind != parameter.KEYWORD_ONLY:
                given.append(arguments.pop(parameter.name))
        return self.function(*given, **arguments)


def functions() -> dict[str, Any]:
    """Public functions by their address."""
    return {
        name.address: name.value
        for name in public_names.public_names()
        if inspect.isfunction(name.value)
    }


@functools.cache
def of(address: str) -> Call | None:
    """The first call with plain arrays that the example makes of its function."""
    function = functions()[address]
    signature = inspect.signature(function)
    calls: list[Call] = []

    @functools.wraps(function)
    def recording(*args: Any, **options: Any) -> Any:
        arguments = dict(signature.bind(*args, **options).arguments)
        for parameter in signature.parameters.values():
            if parameter.kind == parameter.VAR_KEYWORD:
                arguments |= arguments.pop(parameter.name, {})
        leaves = jax.tree.leaves(arguments)
        if not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            calls.append(Call(address, function, arguments))
        return function(*args, **options)

    package, _, name = address.rpartition(".")
    module = sys.modules[function.__module__]
    names = {"jax": jax, "jnp": jnp, "np": np, "softlib": softlib}
    globs = vars(module) | names | {name: recording}
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module(package), name, recording)
        for test in finder.find(function, name, module=False, globs=globs):
            with contextlib.redirect_stdout(io.StringIO()):
                runner.run(test, out=lambda _: None, clear_globs=False)
    return calls[0] if calls else None
