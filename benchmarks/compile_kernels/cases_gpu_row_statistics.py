"""Linear heads on Hopper: the training step of large ones, and each kernel's options.

Through softlib, and the kernels as the engine calls them with every option at once.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.gpu_mosaic import row_statistics as kernels
from softlib import LinearLogits, losses

from .case import HOPPER, Case, array
from .cases_row_statistics import COLUMNS, FAMILY, GEMMA, GPT, QWEN, SMALL, WIDE

# Rows, features and classes that are multiples of nothing that tiles are.
RAGGED = (4001, 1000, 100_277)
RAGGED_COLUMNS = (4001, 1000, 100_280)  # rows of memory at multiples of 16 bytes
FEW = ("lse", "label_logits")
ALL = (
    *(*FEW, "mean_logit", "sum_logits", "sum_squared_logits"),
    *("max_logit", "argmax"),
)
COTANGENTS = ("g_lse", "g_mean_logit", "g_sum_logits", "g_sum_squared_logits")


def cases() -> list[Case]:
    capped = {"softcap": 30.0}
    filtered = {"gradient_filter_eps": 2.0**-12}
    return [
        _case("Gemma 2 head, training step", _step(**capped), GEMMA),
        _case("Gemma 2 head, loss", _loss(), GEMMA, passes=1),
        _case("Gemma 2 head, filter", _step(**capped, **filtered), GEMMA),
        _case("Gemma 2 head, float16", _step(), GEMMA, jnp.float16),
        _case("GPT-2 head, loss", _loss(), GPT, passes=1),
        # The gradient of hidden is summed in float32 beside so few logits.
        dataclasses.replace(
            _case("small head, training step", _step(), SMALL), most_temporaries=0.1
        ),
        _case("ragged head, training step", _step(), RAGGED),
        _case("ragged head, smoothing", _step(label_smoothing=0.1), RAGGED),
        # Layouts and dtypes of Flax. The gradient of hidden is summed in float32, and
        # is 2.7 % of the logits.
        *(
            dataclasses.replace(
                _case(f"Qwen head, {name}, training step", step, QWEN, **layout),
                most_temporaries=0.05,
            )
            for name, step, layout in (
                ("columns", _step(vocab_axis=1), COLUMNS),
                ("float32 weight", _step(), WIDE),
                ("columns, float32", _step(vocab_axis=1), COLUMNS | WIDE),
            )
        ),
        _case(
            *(
                "Gemma 2 head, columns, float32, filter",
                _step(**filtered, vocab_axis=1),
            ),
            *(GEMMA, jnp.bfloat16),
            **COLUMNS | WIDE,
        ),
        _case(
            *("ragged head, columns, float32", _step(vocab_axis=1), RAGGED_COLUMNS),
            jnp.float16,
            **COLUMNS | WIDE,
        ),
        _case("ragged head, float32 weight", _step(), RAGGED, **WIDE),
        *_bare("few", GEMMA, FEW, 1, modified=False),
        *_bare("all", GEMMA, ALL, 1, modified=True),
        *_bare("all, 2 labels, filter", RAGGED, ALL, 2, modified=True, eps=1e-3),
        *_bare("8 labels", RAGGED, FEW, 8, modified=False),
        *_bare("all, columns", RAGGED_COLUMNS, ALL, 1, modified=True, **COLUMNS),
        # A copy of some classes of the weight is 6 % of so few logits.
        *(
            dataclasses.replace(case, most_temporaries=0.1)
            for case in _bare(
                *("all, 2 labels, columns, float32", RAGGED_COLUMNS, ALL, 2),
                modified=True,
                **COLUMNS | WIDE,
            )
        ),
    ]


def _loss(*, label_smoothing: float = 0.0, **options: Any) -> Any:
    def loss(hidden: Any, weight: Any, labels: Any) -> Any:
        logits = LinearLogits(hidden, weight, implementation="pallas_gpu", **options)
        return losses.softmax_cross_entropy(
            logits, labels, label_smoothing=label_smoothing
        ).sum()

    return loss


def _step(**options: Any) -> Any:
    return jax.grad(_loss(**options), argnums=(0, 1))


def _case(
    name: str,
    function: Any,
    shape: tuple[int, int, int],
    dtype: Any = jnp.bfloat16,
    passes: int = 4,
    more: tuple[Any, ...] = (),
    *,
    vocab_axis: int = 0,
    weight_dtype: Any = None,
) -> Case:
    rows, features, classes = shape
    weight = (classes, features) if vocab_axis == 0 else (features, classes)
    weight = array(weight_dtype or dtype, *weight)
    arguments = (
        array(dtype, rows, features),
        weight,
        *(more or (array(jnp.int32, rows),)),
    )
    operands = features * (2 * rows + weight.dtype.itemsize * classes)
    return Case(
        FAMILY,
        f"gpu {name}",
        function,
        arguments,
        HOPPER,
        naive_bytes=4 * rows * classes,
        flops=2 * passes * rows * features * classes,
        # Read by the forward pass, read and written by the backward one.
        bytes_moved=operands * (1 if passes == 1 else passes - 1),
    )


def _bare(
    name: str,
    shape: tuple[int, int, int],
    statistics: tuple[str, ...],
    labels: int,
    *,
    modified: bool,
    eps: float | None = None,
    **layout: Any,
) -> list[Case]:
    """The two passes by themselves; `modified` by all that turns products to logits."""
    rows, _, classes = shape
    # Of no case above: a kernel that a process has compiled is not compiled again.
    axis = layout.get("vocab_axis", 0)
    options = kernels.Options(statistics, 20.0, eps, axis)
    names = [n for n in COTANGENTS if n.removeprefix("g_") in statistics]
    known = [n for n in ("lse", "mean_logit") if n in statistics]

    def operands(hidden: Any, weight: Any, labels: Any, row: Any, class_: Any) -> Any:
        per_row = {"scale": row, "temperature": row} if modified else {}
        per_class = {"bias": class_, "where": class_} if modified else {}
        return kernels.Operands(hidden, weight, labels, per_row, per_class)

    def forward(*arrays: Any) -> Any:
        return kernels.forward(options, operands(*arrays))

    def backward(*arrays: Any) -> Any:
        row = arrays[3]
        of_labels = jnp.broadcast_to(row[:, None], (rows, labels))
        given = dict.fromkeys((*known, *names), row)
        return kernels.gradient(options, operands(*arrays), given, of_labels)

    more = (
        array(jnp.int32, rows, labels),
        array(jnp.float32, rows),
        array(jnp.float32, classes),
    )
    of = functools.partial(_case, shape=shape, more=more, **layout)
    return [
        of(f"bare {name}, forward", forward, passes=1),
        of(f"bare {name}, backward", backward, passes=3),
    ]
