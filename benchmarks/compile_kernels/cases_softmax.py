"""Softmax and logsumexp of rows: of vocabularies, of short rows, of ragged ones.

The naive program stores the exponentials of all scores in float32.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.gpu_mosaic import softmax as gpu
from pallas_kernels.tpu import softmax as tpu
from softlib import softmax

from .case import BLACKWELL, HOPPER, TPUS, Case, array

_FAMILY = "softmax"
_GPUS = (*HOPPER, *BLACKWELL)
# Rows, columns and dtype.
_SHAPES: dict[str, tuple[int, int, Any]] = {
    "vocabulary": (8192, 128_256, jnp.bfloat16),
    "vocabulary in float32": (8192, 32_768, jnp.float32),
    "short rows": (65_536, 1024, jnp.bfloat16),
    "ragged": (5003, 50_257, jnp.bfloat16),
    "ragged in float32": (5003, 1003, jnp.float32),
    "beyond fast memory": (264, 4_000_037, jnp.bfloat16),
}
_HALF = ("vocabulary in float16", (8192, 128_256, jnp.float16))


def cases() -> list[Case]:
    found = []
    for name, shape in _SHAPES.items():
        found += _bare(f"{name}, TPU kernel", tpu, shape, TPUS)
        found += _bare(f"{name}, GPU kernel", gpu, shape, _GPUS)
    found += _bare(f"{_HALF[0]}, GPU kernel", gpu, _HALF[1], _GPUS)
    return [*found, *_through_softlib()]


def _bare(
    name: str, kernels: Any, shape: tuple[int, int, Any], targets: tuple[str, ...]
) -> list[Case]:
    rows, columns, dtype = shape
    x = array(dtype, rows, columns)
    return [
        _case(f"{name}, softmax", kernels.softmax, x, targets),
        _case(f"{name}, logsumexp", kernels.logsumexp, x, targets),
    ]


def _through_softlib() -> list[Case]:
    def both(x: Any) -> Any:
        kernels = {"implementation": "pallas"}
        return softmax.softmax(x, **kernels), softmax.logsumexp(x, **kernels)

    def training(x: Any, cotangent: Any) -> Any:
        y, pull = jax.vjp(lambda x: softmax.softmax(x, implementation="pallas"), x)
        return y, pull(cotangent)

    x, odd = array(jnp.bfloat16, 8192, 32_768), array(jnp.bfloat16, 10, 2057, 4099)
    everywhere = (*TPUS, *_GPUS)
    return [
        _case("softlib, both", both, x, everywhere),
        _case("softlib, both of ragged rows", both, odd, everywhere),
        _case("softlib, training", training, (x, x), everywhere),
    ]


def _case(name: str, function: Any, x: Any, targets: tuple[str, ...]) -> Case:
    arguments = x if isinstance(x, tuple) else (x,)
    size = math.prod(arguments[0].shape)
    moved = arguments[0].dtype.itemsize * size
    if "logsumexp" in name:
        moved += 4 * size // arguments[0].shape[-1]
    else:
        moved *= 2
    return Case(
        *(_FAMILY, name, function, arguments, targets),
        # What a derivative needs is kept in float32, by every implementation.
        naive_bytes=0 if "training" in name else 4 * size,
        flops=4 * size,
        bytes_moved=moved,
    )
