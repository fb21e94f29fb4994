"""Adapters of the kernels of decode attention.

`state` gives the sums over a device's keys: for sums over devices, or by the running
maximum. `attended` gives the result by the unified maximum on one device: the kernel
recomputes rows that leave the range.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels import _devices as devices
from pallas_kernels.gpu_mosaic import decode_tiles as gpu
from pallas_kernels.gpu_mosaic.attention_tiles import FEATURES, MOST_COLUMNS, ROWS
from pallas_kernels.tpu import decode_tiles as tpu
from softlib import _kernel_limits as limits
from softlib._dispatch import Implementation
from softlib._sharding import match_varying
from softlib.numerics import RunningMaxState, UnifiedMaxState

from .stream import Operands, Options, State

# Shorter caches are read in less time than it takes to start a kernel.
LEAST_KEYS = 1024
LEAST_FEATURES = 32
# Most rows of queries of all heads: with more, products take longer than reading.
MOST_ROWS = 256


class Attended(NamedTuple):
    """Rows of the result, (B, K, R), in the dtype of the sums."""

    out: Array
    lse: Array
    max_score: Array
    # 1 for recomputed rows: a derivative rule may return floats only.
    recomputed: Array


class _Rows(NamedTuple):
    """The operands as rows (B, K R)."""

    query: Array
    visible: Array
    numbers: tuple[Array, ...]  # scale; phi and the valid range

    @classmethod
    def of(cls, operands: Operands) -> "_Rows":
        batch, heads, shared, size = operands.query.shape
        rows, keys = heads * shared, operands.key.shape[1]
        visible = operands.visible
        if visible is None:
            visible = jnp.full((batch, shared), keys, jnp.int32)
        visible = jnp.broadcast_to(visible[:, None], (batch, heads, shared))
        every = lambda x: jnp.broadcast_to(
            jnp.asarray(x, jnp.float32), (heads, shared)
        ).reshape(rows)
        numbers = [operands.scale]
        if operands.unified is not None:
            low, high = operands.unified.valid_range
            float32 = jnp.finfo(jnp.float32)
            lowest = math.log(2 * float(float32.tiny) / float(float32.eps))
            numbers += [operands.unified.phi, jnp.maximum(low, lowest), high]
        query = operands.query.reshape(batch, rows, size)
        numbers = tuple(every(x) for x in numbers)
        found = cls(query, visible.reshape(batch, rows), numbers)
        return match_varying(found, operands.key)


# ---------------------------------------------------------------------------------- TPU
def _on_tpu(options: Options, operands: Operands, *, falls_back: bool) -> Any:
    from pallas_kernels.tpu import decode as kernels

    rows, unified = _Rows.of(operands), operands.unified
    tiles = _tiles(operands)
    assert tiles is not None
    products = ((operands.query, operands.key), (operands.value,))
    precision = [
        limits.PRECISIONS[options.precision]
        if all(x.dtype == jnp.float32 for x in arrays)
        else lax.Precision.DEFAULT
        for arrays in products
    ]
    form = tpu.Form(
        operands.key.shape[2],
        options.softcap,
        unified is not None,
        unified is not None and unified.criterion == "elementwise",
        falls_back,
        (precision[0], precision[1]),
    )
    return kernels.decode(
        rows.query,
        operands.key,
        operands.value,
        rows.visible,
        kernels.Numbers(*rows.numbers),
        form=form,
        tiles=tiles,
    )


def _tiles(operands: Operands) -> tpu.Tiles | None:
    (_, heads, shared, size), value = operands.query.shape, operands.value
    return tpu.choose_tiles(
        heads * shared,
        operands.key.shape[1],
        heads,
        (size, value.shape[-1]),
        (operands.key.dtype.itemsize, value.dtype.itemsize),
        devices.tpu(),
    )


def _tpu_state(options: Options, operands: Operands) -> State:
    # By the running maximum the second pass handles values that are not finite.
    falls_back = operands.unified is None
    return _state(operands, _on_tpu(options, operands, falls_back=falls_back))


def _tpu_attended(options: Options, operands: Operands) -> Attended:
    return _attended(operands, _on_tpu(options, operands, falls_back=True))


def _not_on_tpu(options: Options, operands: Operands) -> str | None:
    reason = _unfit(options, operands, (jnp.float32, jnp.bfloat16))
    if reason is not None:
        return reason
    if options.num_splits is not None:
        return "it reads the keys of a sequence in one go (num_splits)"
    rows = math.prod(operands.query.shape[1:3])
    if rows > MOST_ROWS:
        return f"{rows} rows of queries are more than {MOST_ROWS}"
    if _tiles(operands) is None:
        return "no block of keys fits the vector memory"
    return None


def _tpu_note(options: Options, operands: Operands) -> str:
    return str(_tiles(operands))


# ---------------------------------------------------------------------------------- GPU
def _on_gpu(options: Options, operands: Operands, *, falls_back: bool) -> Any:
    from pallas_kernels.gpu_mosaic import decode as kernels

    rows, unified = _Rows.of(operands), operands.unified
    tiles = _gpu_tiles(options, operands)
    assert tiles is not None
    shared = operands.query.shape[1:3]
    numbers = [x.reshape(shared) for x in rows.numbers]
    numbers += [jnp.zeros_like(numbers[0])] * (4 - len(numbers))
    return kernels.decode(
        operands.query,
        operands.key,
        operands.value,
        rows.visible[:, : shared[1]],
        kernels.Numbers(*numbers),
        form=kernels.Form(
            options.softcap,
            unified is not None,
            unified is not None and unified.criterion == "elementwise",
            falls_back,
        ),
        tiles=tiles,
    )


def _gpu_tiles(options: Options, operands: Operands) -> gpu.Tiles | None:
    batch, keys, heads, size = operands.key.shape
    device = devices.gpu() or devices.H100
    features = (size, operands.value.shape[-1])
    splits = options.num_splits
    return gpu.choose_tiles(batch, heads, keys, features, device, splits=splits)


def _gpu_state(options: Options, operands: Operands) -> State:
    found = _on_gpu(options, operands, falls_back=False)
    top, total = found.max.max(2), found.sum
    if operands.unified is None:
        total, weighted = _merged(found, top)
        return RunningMaxState(top, total, weighted)
    least = found.min.min(2) if operands.unified.criterion == "elementwise" else None
    return UnifiedMaxState(total.sum(2), top, least, found.weighted.sum(2))


def _gpu_attended(options: Options, operands: Operands) -> Attended:
    found, unified = _on_gpu(options, operands, falls_back=True), operands.unified
    assert unified is not None
    # phi, unless a split was recomputed.
    reference = found.reference.max(2)
    total, weighted = _merged(found, reference)
    top = found.max.max(2)
    lost = found.lost.max(2)
    # Flags are of whole rows: the maximum of a split may be below the range.
    least = found.min.min(2) if unified.criterion == "elementwise" else None
    ones = jnp.where(lost > 0, jnp.nan, 1)
    state = UnifiedMaxState(ones, top, least, None)
    again = unified.needs_recompute(state).astype(top.dtype)
    empty = top == -jnp.inf
    total = jnp.where(empty, 1, total)
    out = jnp.where(empty[..., None], 0, weighted / total[..., None])
    lse = jnp.where(empty, -jnp.inf, reference + jnp.log(total))
    return Attended(out, lse, top, again)


def _merged(found: Any, reference: Array) -> tuple[Array, Array]:
    """Sums over the splits (axis 2), relative to the same reference."""
    shift = jnp.where(reference == -jnp.inf, 0, reference)
    # Exactly 1 for a split with this reference.
    factor = jnp.exp(found.reference - shift[:, :, None])
    weighted = (found.weighted * factor[..., None]).sum(2)
    return (found.sum * factor).sum(2), weighted


def _not_on_gpu(options: Options, operands: Operands) -> str | None:
    dtypes = (jnp.bfloat16, jnp.float16)
    reason = limits.why_not_hopper(devices.gpu_generation())
    reason = reason or _unfit(options, operands, dtypes)
    if reason is not None:
        return reason
    key, value = operands.key, operands.value
    if value.dtype == jnp.float16 and operands.unified is not None:
        return "weights relative to phi leave the range of float16"
    if key.shape[1] % 8:
        return f"{key.shape[1]} keys are not a multiple of 8"
    for name, array in (("key", key), ("value", value)):
        if array.shape[3] % FEATURES:
            size = array.shape[3]
            return f"{size} features of a {name} are not a multiple of {FEATURES}"
        if array.shape[3] > MOST_COLUMNS:
            return f"{array.shape[3]} features of a {name} are more than 256"
    rows = operands.query.shape[2]
    if rows > ROWS:
        return f"{rows} rows of queries of a head of keys are more than {ROWS}"
    if _gpu_tiles(options, operands) is None:
        return "no tile of keys fits the shared memory"
    return None


def _gpu_note(options: Options, operands: Operands) -> str:
    return str(_gpu_tiles(options, operands))


# --------------------------------------------------------------------------------- both
def _state(operands: Operands, found: Any) -> State:
    shape = operands.query.shape[:3]
    of = lambda x: x.reshape(*shape, *x.shape[2:])
    total, weighted, top = of(found.sum), of(found.weighted), of(found.max)
    if operands.unified is None:
        return RunningMaxState(top, total, weighted)
    least = of(found.min) if operands.unified.criterion == "elementwise" else None
    return UnifiedMaxState(total, top, least, weighted)


def _attended(operands: Operands, found: Any) -> Attended:
    assert operands.unified is not None
    shape = operands.query.shape[:3]
    of = lambda x: x.reshape(*shape, *x.shape[2:])
    total, weighted, top = of(found.sum), of(found.weighted), of(found.max)
    again = of(found.again)
    phi = jnp.broadcast_to(jnp.asarray(operands.unified.phi, top.dtype), top.shape)
    empty = top == -jnp.inf
    total = jnp.where(empty, 1, total)
    lse = jnp.where(again > 0, top, phi) + jnp.log(total)
    out = jnp.where(empty[..., None], 0, weighted / total[..., None])
    return Attended(out, jnp.where(empty, -jnp.inf, lse), top, again)


def _unfit(options: Options, operands: Operands, dtypes: tuple[Any, ...]) -> str | None:
    query, key, value = operands.query, operands.key, operands.value
    if not (query.size and key.size and value.size):
        return "an array is empty"
    sizes = (
        ("keys", key.shape[1], LEAST_KEYS),
        ("features of a key", key.shape[3], LEAST_FEATURES),
        ("features of a value", value.shape[3], LEAST_FEATURES),
    )
    arrays = {"query": query, "key": key, "value": value}
    reason = (
        limits.why_too_small(sizes)
        or limits.why_wrong_dtype(arrays, dtypes)
        or limits.why_no_precision(options.precision)
    )
    if reason is not None:
        return reason
    if query.dtype != key.dtype:
        return f"`query` is {query.dtype} and `key` is {key.dtype}"
    if operands.dtype != jnp.float32:
        return f"the sums are {operands.dtype}, not float32"
    for name, array in (("key", key), ("value", value)):
        if limits.is_exact(options.precision) and array.dtype != jnp.float32:
            return f"products are those of the {array.dtype} of `{name}`"
    return None


def _implementation(
    name: str,
    platform: str,
    why_not: Callable[[Any, Any], str | None],
    note: Callable[[Any, Any], str],
    *calls: Callable[[Any, Any], Any],
) -> list[Implementation]:
    return [Implementation(name, call, why_not, platform, note) for call in calls]


TPU_STATE, TPU_ATTENDED = _implementation(
    "pallas_tpu", "tpu", _not_on_tpu, _tpu_note, _tpu_state, _tpu_attended
)
GPU_STATE, GPU_ATTENDED = _implementation(
    "pallas_gpu", "cuda", _not_on_gpu, _gpu_note, _gpu_state, _gpu_attended
)
