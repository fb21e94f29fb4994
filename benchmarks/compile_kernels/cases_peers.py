"""The training step of a head in tokamax, compiled for the same devices.

Its TPU kernel takes minutes to compile, and more of them at a large head.
"""

import functools
import importlib
import importlib.util
import logging
from typing import Any

import jax
import jax.numpy as jnp

from .case import Case, array
from .cases_row_statistics import GEMMA, SMALL

FAMILY = "peers"


def _loss(hidden: Any, weight: Any, labels: Any, *, implementation: Any) -> Any:
    tokamax: Any = importlib.import_module("tokamax")
    logging.getLogger("absl").setLevel(logging.ERROR)  # it has not been tuned for this
    return tokamax.linear_softmax_cross_entropy_loss(
        hidden, labels, weight, reduction="sum", implementation=implementation
    )


def _for_another_machine(function: Any) -> Any:
    """With tokamax told not to look for the device at which a program is traced."""

    def call(*arguments: Any) -> Any:
        tokamax: Any = importlib.import_module("tokamax")
        with tokamax.config.cross_compile(True):
            return function(*arguments)

    return call


def _logits(hidden: Any, weight: Any, labels: Any) -> Any:
    logits = jnp.matmul(hidden, weight, preferred_element_type=jnp.float32)
    label = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    return (jax.nn.logsumexp(logits, axis=1) - label).sum()


def _case(
    name: str, step: Any, targets: tuple[str, ...], head: tuple[int, int, int] = GEMMA
) -> Case:
    rows, features, classes = head
    arguments = (
        array(jnp.bfloat16, rows, features),
        array(jnp.bfloat16, features, classes),
        array(jnp.int32, rows),
    )
    naive = 4 * rows * classes
    return Case(FAMILY, name, step, arguments, targets, naive_bytes=naive, ours=False)


def cases() -> list[Case]:
    step = functools.partial(jax.grad, argnums=(0, 1))
    everywhere = ("v5e", "h100")
    found = [_case("Gemma 2 head, stored logits", step(_logits), everywhere)]
    if importlib.util.find_spec("tokamax") is None:
        return found
    chunked, kernel = (
        _for_another_machine(step(functools.partial(_loss, implementation=name)))
        for name in ("chunked_xla", "mosaic_tpu")
    )
    return [
        *found,
        _case("Gemma 2 head, tokamax chunked_xla", chunked, everywhere),
        _case("small head, tokamax chunked_xla", chunked, everywhere, SMALL),
        _case("small head, tokamax mosaic_tpu", kernel, ("v5e",), SMALL),
    ]
