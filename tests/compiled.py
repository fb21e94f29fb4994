"""Small calls as one program each: eager ones compile operation by operation."""

import functools
from collections.abc import Callable
from typing import Any

import jax


def compiled[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """`function` under `jax.jit`, with everything but arrays static."""

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        leaves, tree = jax.tree.flatten((args, options))
        is_array = [isinstance(leaf, jax.Array) for leaf in leaves]

        def of_arrays(arrays: list[jax.Array]) -> Any:
            rest = iter(arrays)
            whole = [
                next(rest) if array else leaf
                for leaf, array in zip(leaves, is_array, strict=True)
            ]
            args, options = jax.tree.unflatten(tree, whole)
            return function(*args, **options)

        arrays = [leaf for leaf, a in zip(leaves, is_array, strict=True) if a]
        return jax.jit(of_arrays)(arrays)

    return call
