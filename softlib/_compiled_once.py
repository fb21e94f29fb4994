"""What a loop of the compiler needs in order to be compiled once, not in each call.

Outside `jax.jit` a loop whose body is a function made in the call is compiled in every
call: the compiled program is found again by the identity of the body. The function that
holds the loop is therefore compiled as a whole, and found again by its own identity,
its static arguments, and the types of the others.
"""

from collections.abc import Callable
from typing import Any

import jax


def compiled_once[F: Callable[..., Any]](*static: int) -> Callable[[F], F]:
    """Compiles a function of a module, with the static arguments at these places.

    Everything that it uses must be an argument: arrays, or static values that compare
    by value. A function of the caller is neither, for what it reads may change between
    two calls. Inside of a program the function is inlined and leaves no mark.
    """

    def compiled(function: F) -> Any:
        return jax.jit(function, static_argnums=static, inline=True)

    return compiled
