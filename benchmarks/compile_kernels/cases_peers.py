"""The training step of a large head in tokamax, compiled for the same devices."""

import functools
import importlib
import importlib.util
import logging
from typing import Any

import jax
import jax.numpy as jnp

from .case import Case, array
from .cases_row_statistics import GEMMA

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


def _case(name: str, step: Any, targets: tuple[str, ...]) -> Case:
    rows, features, classes = GEMMA
    arguments = (
        array(jnp.bfloat16, rows, features),
        array(jnp.bfloat16, features, classes),
        array(jnp.int32, rows),
    )
    naive = 4 * rows * classes
    return Case(FAMILY, name, step, arguments, targets, naive_bytes=naive, ours=False)


def cases() -> list[Case]:
    step = functools.partial(jax.grad, argnums=(0, 1))
    found = [_case("stored logits", step(_logits), ("v5e", "v6e", "h100"))]
    if importlib.util.find_spec("tokamax") is None:
        return found
    kernels = {"mosaic_tpu": ("v5e", "v6e"), "chunked_xla": ("v5e", "v6e", "h100")}
    for name, targets in kernels.items():
        loss = functools.partial(_loss, implementation=name)
        found.append(
            _case(f"tokamax {name}", _for_another_machine(step(loss)), targets)
        )
    return found
