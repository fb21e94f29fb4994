"""Operations of softlib seen from within, or run by the kernel of another machine.

In a program as users trace it an operation is one equation, and a test that reads the
arrays of a program would find none of those inside.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax

from softlib import _primitive
from softlib.logits._engine import accelerator

# Part of the key of every jit cache, so that nothing traced outside is found inside.
_INSIDE = jax.make_user_context(None)


@contextlib.contextmanager
def visible() -> Iterator[None]:
    """While a program is traced: the plain implementations stand in it themselves."""
    inside = lambda call, operands: call.plain(call.options, operands)
    with mock.patch.object(_primitive, "run", inside), _INSIDE("visible"):
        yield


def make_jaxpr(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.make_jaxpr` with visible operations."""

    def made(*args: Any, **kwargs: Any) -> Any:
        with visible():
            return jax.make_jaxpr(function)(*args, **kwargs)

    return made


@contextlib.contextmanager
def kernels_of(platform: str) -> Iterator[None]:
    """While a program is traced: its operations are the kernels of that platform.

    The caller puts an interpreter into the kernels. Its effects must be there from the
    trace on, so they cannot wait for the lowering. Nothing is taken from memory of
    other programs: tests replace what a kernel looks up, tiles say.
    """

    def inside(call: _primitive.Call, operands: Any) -> Any:
        own = dict(call.platforms).get(platform)
        plain = functools.partial(call.plain, call.options)
        if own is None:
            return plain(operands)
        kernel = jax.custom_jvp(functools.partial(own.kernel, call.options))
        kernel.defjvp(functools.partial(jax.jvp, plain))
        return kernel(operands)

    with mock.patch.object(_primitive, "run", inside), _INSIDE(object()):
        yield


@contextlib.contextmanager
def in_steps_of_accelerators(traced_for: str = "cpu") -> Iterator[None]:
    """While a program is made for a CPU: plain JAX as it is for TPUs and GPUs.

    It may be traced for another platform, whose residuals it has then.
    """
    platforms = (*_primitive.ACCELERATORS, "cpu")
    traced = lambda: traced_for
    with (
        mock.patch.object(_primitive, "ACCELERATORS", platforms),
        mock.patch.object(accelerator, "platform_that_keeps", traced),
        _INSIDE(object()),
    ):
        yield
