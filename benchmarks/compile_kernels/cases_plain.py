"""Linear heads in plain JAX: steps, launches and memory of a stream on every machine.

A step of 2^26 logits of 16384 rows has 4096 classes, so a pass has 38 steps, the first
three in a loop of their own where their exponentials are kept.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from softlib import LinearLogits, losses

from .case import AMPERE, BLACKWELL, HOPPER, Case, Most, array

FAMILY = "plain programs"
QWEN = (16384, 4096, 151_936)
GEMMA = (8192, 2304, 256_000)
GPT = (2048, 768, 50_257)
_GPUS = (*AMPERE, *HOPPER, *BLACKWELL)
# Of TPUs, those whose compilers differ in what they copy.
MACHINES = (*_GPUS, "v5e", "v6e", "tpu7x")


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
    of_loss = Most(steps=38, launches=12, temporary_mib=320)
    of_step = Most(steps=38, launches=12, temporary_mib=1024)
    of_sum = jax.value_and_grad(_sum, argnums=(0, 1))
    softcap, columns = _step(softcap=30.0), _step(vocab_axis=1)
    return [
        _case("Qwen head, loss", _loss, QWEN, of_loss),
        _case("Qwen head, training step", _step(), QWEN, of_step, MACHINES),
        _case("Qwen head (D, V), training step", columns, QWEN, of_step, MACHINES, 1),
        _case(
            "Gemma 2 head, softcap, training step", softcap, GEMMA, of_step, MACHINES
        ),
        _case("GPT-2 head, training step", _step(), GPT, of_step, MACHINES),
        _case("GPT-2 head, sum with gradients", of_sum, GPT, of_step),
    ]


def _case(
    name: str,
    function: Any,
    shape: tuple[int, int, int],
    most: Most,
    targets: tuple[str, ...] = _GPUS,
    vocab_axis: int = 0,
) -> Case:
    rows, features, classes = shape
    weight = (classes, features) if vocab_axis == 0 else (features, classes)
    arguments = (
        array(jnp.bfloat16, rows, features),
        array(jnp.bfloat16, *weight),
        array(jnp.int32, rows),
    )
    return Case(FAMILY, name, function, arguments, targets, plain=targets, most=most)
