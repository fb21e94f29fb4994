"""Runs a call as one program where `jax.transfer_guard` refuses implicit transfers.

In an eager call each Python number is such a transfer (`x * 2.0`); in a program it is a
constant.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax

_REFUSED = ("disallow", "disallow_explicit")


def transfers_are_refused() -> bool:
    """Whether `jax.transfer_guard` refuses transfers from the host to a device."""
    config = jax.config
    guards = (config.jax_transfer_guard, config.jax_transfer_guard_host_to_device)
    return any(guard in _REFUSED for guard in guards)


def as_one_program(
    function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]
) -> Any:
    """Calls a compiled `function` with all arguments static but JAX arrays.

    Equal calls share a program, unless a function is among the arguments: what it reads
    may have changed.
    """
    leaves, structure = jax.tree.flatten((args, options))
    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
    if not arrays:
        return function(*args, **options)
    static = tuple(map(_static, leaves))
    if any(map(callable, leaves)) or not _is_hashable((static, structure)):
        call = functools.partial(_called, function, structure, static)
        return jax.jit(lambda *arrays: call(*arrays))(*arrays)
    return _compiled(function, structure, static, *arrays)


def _called(
    function: Callable[..., Any], structure: Any, static: tuple[Any, ...], *arrays: Any
) -> Any:
    rest = iter(arrays)
    leaves = [next(rest) if each is None else each[0] for each in static]
    args, options = jax.tree.unflatten(structure, leaves)
    return function(*args, **options)


_compiled = jax.jit(_called, static_argnums=(0, 1, 2), inline=True)


def _static(leaf: Any) -> tuple[Any, ...] | None:
    """None for an array; else a key in which 1 and 1.0, 0.0 and -0.0 differ."""
    if isinstance(leaf, jax.Array):
        return None
    return leaf, type(leaf), repr(leaf) if isinstance(leaf, float) else ""


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True
