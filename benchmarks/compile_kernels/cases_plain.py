"""Linear heads in plain JAX: the steps and launches of a stream on every GPU."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from softlib import LinearLogits, losses

from .case import AMPERE, HOPPER, Case, Most, array

FAMILY = "plain programs"
QWEN = (16384, 4096, 151_936)
GEMMA = (8192, 2304, 256_000)
GPT = (2048, 768, 50_257)
_GPUS = (*AMPERE, *HOPPER)


def _loss(hidden: Any, weight: Any, labels: Any, **options: Any) -> Any:
    logits = LinearLogits(hidden, weight, implementation="xla", **options)
    return losses.softmax_cross_entropy(logits, labels).sum()


def _step(**options: Any) -> Any:
    loss = functools.partial(_loss, **options)
    return jax.value_and_grad(loss, argnums=(0, 1))


def _sum(hidden: Any, weight: Any, labels: Any) -> Any:
    logits = LinearLogits(hidden, weight, implementation="xla")
    return losses.softmax_cross_entropy_sum(logits, labels)


def cases() -> list[Case]:
    most = Most(steps=38, launches=12, temporary_mib=320)
    of_step = Most(steps=38, launches=12, temporary_mib=1024)
    return [
        _case("Qwen head, loss", _loss, QWEN, most),
        _case("Qwen head, training step", _step(), QWEN, of_step),
        _case(
            "Gemma 2 head, softcap, training step", _step(softcap=30.0), GEMMA, of_step
        ),
        _case("GPT-2 head, training step", _step(), GPT, of_step),
        _case(
            "GPT-2 head, sum with gradients",
            jax.value_and_grad(_sum, argnums=(0, 1)),
            GPT,
            of_step,
        ),
    ]


def _case(name: str, function: Any, shape: tuple[int, int, int], most: Most) -> Case:
    rows, features, classes = shape
    arguments = (
        array(jnp.bfloat16, rows, features),
        array(jnp.bfloat16, classes, features),
        array(jnp.int32, rows),
    )
    return Case(FAMILY, name, function, arguments, _GPUS, plain=_GPUS, most=most)
