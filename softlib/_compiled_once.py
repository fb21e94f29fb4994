"""Lets a function with a loop be compiled once, not in each eager call.

JAX caches an eager loop by the identity of its body, and a body defined inside a call
is a new function each time. The function that holds the loop is therefore compiled as a
whole; its cache key is its identity, its static arguments, and the types of the others.
"""

from collections.abc import Callable
from typing import Any

import jax


def compiled_once[F: Callable[..., Any]](*static: int) -> Callable[[F], F]:
    """Compiles a module-level function whose arguments at `static` are static.

    It may use only its arguments: arrays, or static values that compare by value. A
    function given by the user is neither, since what it reads may change between calls.
    Within another program the function is inlined.
    """

    def compiled(function: F) -> Any:
        return jax.jit(function, static_argnums=static, inline=True)

    return compiled
