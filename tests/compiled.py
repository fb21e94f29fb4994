"""Small calls as one program each: eager ones compile operation by operation.

A test that says `from tests.compiled import losses` instead of `from softlib import
losses` has its functions so. One that is about eager calls asks for the fixture
`eager`; one that calls `check_transformations` has it.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import softlib
from tests import heads

ENABLED = True  # the fixture `eager` says no


def compiled[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """`function` under `jax.jit`, with everything but arrays static."""
    programs: dict[Any, Any] = {}

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        if not ENABLED:
            return function(*args, **options)
        leaves, tree = jax.tree.flatten((args, options))
        is_array = [isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves]
        rest = [leaf for leaf, a in zip(leaves, is_array, strict=True) if not a]

        def of_arrays(arrays: list[Any]) -> Any:
            array, other = iter(arrays), iter(rest)
            whole = [next(array) if a else next(other) for a in is_array]
            args, options = jax.tree.unflatten(tree, whole)
            return function(*args, **options)

        try:
            # 0, 0.0, -0.0 and False are one key otherwise.
            key = tree, *is_array, *((type(leaf), leaf, repr(leaf)) for leaf in rest)
            program = programs.setdefault(key, jax.jit(of_arrays))
        except TypeError:  # not hashable
            program = jax.jit(of_arrays)
        return program([leaf for leaf, a in zip(leaves, is_array, strict=True) if a])

    return call


def method(cls: type, name: str) -> Callable[..., Any]:
    """A method, `compiled`, as a function of what the value is made of."""

    def call(field: Any, *args: Any, **options: Any) -> Any:
        return getattr(cls(field), name)(*args, **options)

    return compiled(call)


def computed(function: Callable[..., Any]) -> Callable[..., Any]:
    """`compiled`, with results of NumPy: what is done with them compiles nothing.

    They stay what they are where the call itself is traced.
    """
    of_jax = compiled(function)

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        result: Any = of_jax(*args, **options)
        leaves = jax.tree.leaves(result)
        is_traced = any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
        return result if is_traced else jax.device_get(result)

    return call


def f32(numbers: Any) -> Any:
    """An array of NumPy, which no program makes; functions take it for one of JAX."""
    return np.asarray(numbers, np.float32)


class _Package:
    """A package whose functions are `compiled`; its classes are what they are."""

    def __init__(self, package: Any):
        self._package = package

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._package, name)
        value = compiled(value) if inspect.isfunction(value) else value
        setattr(self, name, value)
        return value


bandits = _Package(softlib.bandits)
decoding = _Package(softlib.decoding)
estimation = _Package(softlib.estimation)
information = _Package(softlib.information)
losses = _Package(softlib.losses)
metrics = _Package(softlib.metrics)
numerics = _Package(softlib.numerics)
quantize = _Package(softlib.quantize)
of_head = _Package(heads.of_head)
of_stored = _Package(heads.of_stored)
nn = _Package(softlib.nn)
scoring = _Package(softlib.scoring)
softmax = _Package(softlib.softmax)


def of(source: str) -> Any:
    """As `tests.heads.of`, compiled."""
    return {"linear": of_head, "logits": of_stored}[source]
