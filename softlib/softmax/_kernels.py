"""Adapters of the TPU and GPU kernels for softmax and logsumexp."""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import _devices as devices
from pallas_kernels.gpu_mosaic import softmax_tiles as gpu
from pallas_kernels.tpu import softmax_tiles as tpu
from softlib._dispatch import Implementation

type Map = Literal["softmax", "logsumexp"]

# With fewer elements a kernel gains nothing.
LEAST = 1 << 20
# With fewer columns vector registers are mostly empty.
LEAST_COLUMNS = 128


def implementations(name: Map) -> tuple[Implementation, Implementation]:
    keeps_row = name == "softmax"

    def kernel_of(target: Any, options: Any) -> Callable[[Array], Array]:
        if keeps_row:
            return functools.partial(target.softmax, out_dtype=options.dtype)
        return target.logsumexp

    def on_tpu(options: Any, operands: Any) -> Array:
        from pallas_kernels.tpu import softmax as kernels

        z, kernel = operands.z, kernel_of(kernels, options)
        *batch, columns = z.shape
        rows = batch[-1] if batch else 1
        if rows % 8 and rows > 1:
            # Memory tiles rows by 8: merging an axis of another length with the one
            # before it would copy the array.
            found = jax.vmap(kernel)(z.reshape(-1, rows, columns))
        else:
            found = kernel(z.reshape(-1, columns))
        return found.reshape(z.shape if keeps_row else batch)

    def on_gpu(options: Any, operands: Any) -> Array:
        from pallas_kernels.gpu_mosaic import softmax as kernels

        z = operands.z
        found = kernel_of(kernels, options)(z.reshape(-1, z.shape[-1]))
        return found.reshape(z.shape if keeps_row else z.shape[:-1])

    def tpu_note(options: Any, operands: Any) -> str:
        z, out = operands.z, options.dtype if keeps_row else None
        return str(tpu.choose_tiles(*_cut(z), z.dtype, out, devices.tpu()))

    def gpu_note(options: Any, operands: Any) -> str:
        z = operands.z
        device = devices.gpu() or devices.H100
        return str(gpu.choose_tiles(z.shape[-1], z.dtype, device, writes=keeps_row))

    return (
        Implementation("pallas_tpu", on_tpu, _not_on_tpu, "tpu", tpu_note),
        Implementation("pallas_gpu", on_gpu, _not_on_gpu, "cuda", gpu_note),
    )


def _cut(z: Array) -> tuple[int, int]:
    """Numbers of rows and columns."""
    return math.prod(z.shape[:-1]), z.shape[-1]


def _not_on_tpu(options: Any, operands: Any) -> str | None:
    return _unfit(options.axes, operands.z, (jnp.float32, jnp.bfloat16))


def _not_on_gpu(options: Any, operands: Any) -> str | None:
    z, device = operands.z, devices.gpu()
    if device is None:
        return "it is written for Hopper and Blackwell GPUs"
    why = _unfit(options.axes, z, (jnp.float32, jnp.bfloat16, jnp.float16))
    if why is not None:
        return why
    rows, _ = _cut(z)
    if rows < device.multiprocessors:
        return f"{rows} rows leave some of {device.multiprocessors} processors idle"
    return None


def _unfit(axes: tuple[int, ...], z: Array, dtypes: tuple[Any, ...]) -> str | None:
    if z.size < LEAST:
        return f"{z.size} elements are too few to gain by it"
    if axes != (z.ndim - 1,):
        return f"the axes {axes} of a row are not the last of {z.ndim}"
    if z.dtype not in dtypes:
        return f"it has no {z.dtype}"
    if z.shape[-1] < LEAST_COLUMNS:
        return f"rows of {z.shape[-1]} columns do not fill a vector of {LEAST_COLUMNS}"
    return None
