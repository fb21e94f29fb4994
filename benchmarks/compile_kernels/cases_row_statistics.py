"""Linear heads: the training step of a large one, and what is ragged or unusual."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from softlib import LinearLogits, losses

from .case import TPUS, Case, array

FAMILY = "row statistics"
GEMMA = (8192, 2304, 256_000)
GPT = (2048, 768, 50_257)
PADDED = (2048, 768, 50_304)
RAGGED = (2048, 1000, 50_257)
QWEN = (16384, 4096, 151_936)
SMALL = (2048, 512, 16_384)
# Layout and dtype of the weight of Flax's layers.
COLUMNS: dict[str, Any] = {"vocab_axis": 1}
WIDE: dict[str, Any] = {"weight_dtype": jnp.float32}


def _loss(hidden: Any, weight: Any, labels: Any, **options: Any) -> Any:
    logits = LinearLogits(hidden, weight, **options)
    return losses.softmax_cross_entropy(logits, labels).sum()


def _step(**options: Any) -> Any:
    return jax.grad(functools.partial(_loss, **options), argnums=(0, 1))


def _case(
    name: str,
    function: Any,
    shape: tuple[int, int, int],
    dtype: Any = jnp.bfloat16,
    passes: int = 4,
    vocab_axis: int = 0,
    weight_dtype: Any = None,
    **more: Any,
) -> Case:
    rows, features, classes = shape
    weight = (classes, features) if vocab_axis == 0 else (features, classes)
    arguments = (
        array(dtype, rows, features),
        array(weight_dtype or dtype, *weight),
        array(jnp.int32, rows),
    )
    # Every operand is read by each of three kernels; gradients are written once.
    operands = sum(x.size * x.dtype.itemsize for x in arguments[:2])
    return Case(
        FAMILY,
        name,
        function,
        arguments,
        TPUS,
        naive_bytes=4 * rows * classes,
        flops=2 * passes * rows * features * classes,
        bytes_moved=operands * (4 if passes > 1 else 1),
        **more,
    )


def cases() -> list[Case]:
    return [
        _case("Gemma 2 head, training step", _step(), GEMMA),
        _case("Gemma 2 head, loss", _loss, GEMMA, passes=1),
        _case(
            "Gemma 2 head, softcap and filter",
            _step(softcap=30.0, gradient_filter_eps=2.0**-12),
            GEMMA,
        ),
        _case("GPT-2 head, training step", _step(), GPT),
        # One layout of an argument counts beside so few logits.
        _case("small head, training step", _step(), SMALL, most_temporaries=0.1),
        _case("GPT-2 head, float32", _step(), GPT, jnp.float32),
        # Which XLA stores as (V, D), by rows, and with features that are no whole tile.
        _case("GPT-2 head, columns", _step(vocab_axis=1), GPT, **COLUMNS),
        _case("padded GPT-2 head, columns", _step(vocab_axis=1), PADDED, **COLUMNS),
        _case("ragged head, columns", _step(vocab_axis=1), RAGGED, **COLUMNS),
        _case("GPT-2 head, float32 weight", _step(), GPT, **WIDE),
        _case(
            *("Qwen head, columns, float32 weight", _step(vocab_axis=1), QWEN),
            **COLUMNS | WIDE,
        ),
    ]
