"""What a loop of the compiler needs in order to be compiled once, not in each call.

Outside `jax.jit` a loop whose body is a function made in the call is compiled in every
call: the compiled program is found again by the identity of the body. The function that
holds the loop is therefore compiled as a whole, and found again by its own identity,
its static arguments, and the types of the others.
"""

import functools

import jax

# For functions of a module: one made in a call would be a new one each time. Everything
# that they use must be an argument: arrays, or static values that compare by value.
# Inside of a program it leaves no mark, for it is inlined there.
compiled_once = functools.partial(jax.jit, inline=True)
