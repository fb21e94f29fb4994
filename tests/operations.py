"""Programs in which the operations of softlib are seen from within.

In a program as users trace it an operation is one equation, and a test that reads the
arrays of a program would find none of those inside.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax

from softlib import _primitive

# Part of the key of every jit cache, so that nothing traced outside is found inside.
_VISIBLE = jax.make_user_context(False)


@contextlib.contextmanager
def visible() -> Iterator[None]:
    """While a program is traced: the plain implementations stand in it themselves."""
    inside = lambda call, operands: call.plain(call.options, operands)
    with mock.patch.object(_primitive, "run", inside), _VISIBLE(True):
        yield


def make_jaxpr(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.make_jaxpr` with visible operations."""

    def made(*args: Any, **kwargs: Any) -> Any:
        with visible():
            return jax.make_jaxpr(function)(*args, **kwargs)

    return made
