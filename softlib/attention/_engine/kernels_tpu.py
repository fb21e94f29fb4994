"""The block-sparse kernels for TPUs, behind the operations of attention.

A plan has blocks that suit a CPU: kernels take its mask and make lists of their own, at
the sizes that cost least on the TPU for which the program is traced.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels import _devices, _measured
from pallas_kernels._attention_extras import Extras
from pallas_kernels.tpu import attention_lists as blocks
from pallas_kernels.tpu.attention_form import Form, Masking
from pallas_kernels.tpu.attention_mask import OPERATIONS
from pallas_kernels.tpu.attention_tiles import (
    NAMES,
    Part,
    Pass,
    Tiles,
    candidates,
    parts_of,
    seconds,
)
from pallas_kernels.tpu.attention_weights import Weights
from softlib import _kernel_limits as limits
from softlib._dispatch import Implementation
from softlib._dtypes import common_dtype
from softlib.masks import Block, block_map

from . import pair_arrays
from .mask_program import MaskProgram, Numbers, program_of
from .plan import Skeleton, plan_of
from .scores import LogSoftplus, Result, Softmax, Softplus, StableMax
from .stream import BackwardOperands, Gradient, row_constants, sinks_gradient
from .tiles import OWN_BLOCKS, Operands, Options

# Smaller problems do not fill a tile, and plain JAX compiles faster.
LEAST_LENGTH, LEAST_FEATURES = 128, 32
# Most blocks of one call: their list has to fit in scalar memory.
MOST_ENTRIES = blocks.MOST_ENTRIES
# Sizes are chosen from this number of rows of blocks, evenly spaced.
SAMPLE = 64
_KINDS: dict[Any, Weights] = {
    Softmax(): Weights("softmax"),
    LogSoftplus(): Weights("log_softplus"),
    Softplus(): Weights("softplus"),
    StableMax(): Weights("stablemax"),
}


def _forward(options: Options, operands: Operands) -> Result:
    from pallas_kernels.tpu.attention import attention

    form, masked = form_of(options, operands)
    tiles, entries = blocks_of("forward", options, operands)
    out, normalizer = attention(
        operands.query,
        operands.key,
        _value(operands),
        entries,
        form=form,
        tiles=tiles,
        out_dtype=options.out_dtype,
        sinks=operands.sinks,
        **masked,
    )
    return Result(out, normalizer)


def _backward(options: Options, given: BackwardOperands) -> Gradient:
    from pallas_kernels.tpu.attention_key_gradient import key_value_gradient
    from pallas_kernels.tpu.attention_query_gradient import query_gradient

    operands = given.operands
    form, masked = form_of(options, operands)
    inverse, delta = row_constants(options, given)
    value, cotangent = _value(operands), given.out_cotangent
    assert cotangent is not None
    arrays = (operands.query, operands.key, value, cotangent, inverse, delta)
    of = lambda x: jnp.float32 if options.wide_gradients else x.dtype
    tiles, entries = blocks_of("query", options, operands)
    dq = query_gradient(
        *arrays,
        entries,
        form=form,
        tiles=tiles,
        out_dtype=of(operands.query),
        **masked,
    )
    tiles, entries = blocks_of("key", options, operands)
    dk, dv = key_value_gradient(
        *arrays,
        entries,
        form=form,
        tiles=tiles,
        out_dtypes=(of(operands.key), of(value)),
        **masked,
    )
    sinks = operands.sinks
    if sinks is not None:
        sinks = sinks_gradient(sinks, inverse, delta).astype(of(sinks))
    bias = pair_arrays.bias_gradient(options, given)
    return Gradient(dq, dk, dv, bias, sinks, ())


def _value(operands: Operands) -> Array:
    assert operands.value is not None
    return operands.value


def form_of(options: Options, operands: Operands) -> tuple[Form, dict[str, Any]]:
    """The static form of a kernel, and the arrays that decide about pairs."""
    program, lengths = _program(operands), operands.plan.lengths
    if program.is_evaluable:
        numbers = program.numbers(operands.plan.mask, operands.query.shape[0])
        masking = Masking(program.attends, lengths[1], program.scalars)
    else:
        # Tiles were chosen so that only padding is left to exclude.
        numbers = Numbers(None, None, None)
        masking = Masking(lambda query, key: key == key, lengths[1])
    arrays = {
        "mask_scalars": numbers.scalars,
        "extras": _extras(operands, numbers),
    }
    form = Form(
        _KINDS[options.kind],
        options.scale,
        options.softcap,
        limits.PRECISIONS[options.precision],
        masking,
    )
    return form, arrays


def _extras(operands: Operands, numbers: Numbers) -> Extras:
    dense, bias = _on_pairs(operands)
    return Extras(dense, bias, numbers.queries, numbers.keys)


def _on_pairs(operands: Operands) -> tuple[Array | None, Array | None]:
    """The boolean array and the bias, as kernels take them."""
    length = operands.plan.lengths[1]

    def fitted(x: Array | None) -> Array | None:
        if x is None:
            return None
        if x.dtype == jnp.float16:
            x = x.astype(jnp.float32)
        # One number for all pairs is one per key.
        return jnp.broadcast_to(x, (*x.shape[:3], length)) if x.shape[2] == 1 else x

    dense, bias = map(fitted, pair_arrays.stored(operands))
    return dense, bias


def _parts(operands: Operands) -> tuple[Part, ...]:
    """Static facts about the arrays that decide about pairs."""
    program = _program(operands)

    def numbers(side: int, count: int) -> Any:
        if not (program.is_evaluable and count):
            return None
        shape = (1, count, operands.plan.lengths[side])
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    queries, keys = numbers(0, program.queries), numbers(1, program.keys)
    call = lambda arrays: _on_pairs(arrays._replace(plan=operands.plan))
    dense, bias = jax.eval_shape(call, operands._replace(plan=None))
    return parts_of(Extras(dense, bias, queries, keys))


def _program(operands: Operands) -> MaskProgram:
    return program_of(operands.plan.mask, operands.plan.lengths, OPERATIONS)


def blocks_of(
    which: Pass, options: Options, operands: Operands
) -> tuple[Tiles, np.ndarray]:
    """The tile sizes, and the list of blocks at these sizes."""
    skeleton, lengths = Skeleton.of(operands.plan.mask), operands.plan.lengths
    tiles = _tiles(which, options, operands)
    assert tiles is not None
    return tiles, _lists(which == "key", skeleton, lengths, tiles.query, tiles.key)


@functools.lru_cache(maxsize=64)
def _lists(
    by_columns: bool, skeleton: Skeleton, lengths: tuple[int, int], *sizes: int
) -> np.ndarray:
    plan = plan_of(skeleton.mask, lengths, sizes)
    rows, columns = np.concatenate([plan.whole, plan.partial], axis=1)
    whole = np.arange(len(rows)) < plan.whole.shape[1]
    if by_columns:  # padded queries hold anything
        whole &= (rows + 1) * sizes[0] <= lengths[0]
    axes = (columns, rows) if by_columns else (rows, columns)
    row_count = plan.grid[int(by_columns)]
    return blocks.lists(*axes, whole, row_count, most_entries=MOST_ENTRIES)


def _tiles(which: Pass, options: Options, operands: Operands) -> Tiles | None:
    """The sizes that cost least for the mask; None if there are none."""
    mask = Skeleton.of(operands.plan.mask)
    return _cheapest(mask, *_limits(which, options, operands))


def _limits(which: Pass, options: Options, operands: Operands) -> Any:
    """The inputs of the choice of sizes besides the mask."""
    program = _program(operands)
    arrays = (operands.query, operands.key, operands.value)
    return (
        which,
        operands.plan.lengths,
        (operands.query.shape[-1], _value(operands).shape[-1]),
        common_dtype(*arrays),
        _devices.tpu(),
        _KINDS[options.kind].is_light,
        program.is_evaluable,
        _parts(operands),
    )


def _candidates(which: Pass, options: Options, operands: Operands) -> list[Tiles]:
    *limits, light, _, parts = _limits(which, options, operands)
    return candidates(*limits, light=light, parts=parts)


def _is_countable(lengths: tuple[int, int], tiles: Tiles) -> bool:
    sizes = (tiles.query, tiles.key)
    return max(map(_count_of, lengths, sizes)) <= blocks.MOST_BLOCKS


@functools.lru_cache(maxsize=256)
def _cheapest(
    skeleton: Skeleton,
    which: Pass,
    lengths: tuple[int, int],
    features: tuple[int, int],
    dtype: Any,
    device: _devices.Tpu,
    light: bool,
    evaluable: bool,
    parts: tuple[Part, ...],
) -> Tiles | None:
    costs = {}
    limits = (which, lengths, features, dtype, device)
    for tiles in candidates(*limits, light=light, parts=parts):
        if not _is_countable(lengths, tiles):
            continue
        sizes = (tiles.query, tiles.key)
        visited, partial = _counts(skeleton, lengths, sizes, all_rows=not evaluable)
        if evaluable or not partial:
            correction = _measured.factor(device.name, NAMES[which], sizes)
            costs[tiles] = correction * seconds(
                *(which, tiles, features, dtype, device),
                visited=visited,
                partial=partial,
                parts=parts,
            )
    return min(costs, key=lambda tiles: costs[tiles], default=None)


@functools.lru_cache(maxsize=256)
def _counts(
    skeleton: Skeleton,
    lengths: tuple[int, int],
    sizes: tuple[int, int],
    *,
    all_rows: bool,
) -> tuple[float, float]:
    """Number of visited blocks, and of those in which the mask is evaluated."""
    if all_rows:
        kinds, every = block_map(skeleton.mask, lengths, sizes), 1.0
    else:
        rows, columns = map(_count_of, lengths, sizes)
        row = np.unique(np.linspace(0, rows - 1, min(rows, SAMPLE), dtype=int))
        kinds = skeleton.mask.block_status(
            row[:, None] * sizes[0],
            np.minimum((row[:, None] + 1) * sizes[0], lengths[0]),
            np.arange(columns)[None] * sizes[1],
            np.minimum(np.arange(1, columns + 1)[None] * sizes[1], lengths[1]),
        )
        kinds = np.broadcast_to(kinds, (len(row), columns))
        every = rows / len(row)
    count = lambda found: float(found.sum() * every)
    return count(kinds != Block.NONE), count(kinds == Block.SOME)


def _count_of(length: int, size: int) -> int:
    return -(-length // size)


def _why_not(options: Options, operands: Operands) -> str | None:
    plan, value = operands.plan, operands.value
    if value is None:
        return "it computes no statistics without values"
    if options.kind not in _KINDS:
        return f"it has no weights of kind {type(options.kind).__name__}"
    if options.has_given_blocks:
        return OWN_BLOCKS
    (batch, _, heads, features), key_heads = operands.query.shape, operands.key.shape[2]
    if not (batch and heads and key_heads):
        return "an axis is empty"
    sizes = (
        ("queries", plan.lengths[0], LEAST_LENGTH),
        ("keys", plan.lengths[1], LEAST_LENGTH),
        ("features of a query", features, LEAST_FEATURES),
        ("features of a value", value.shape[-1], LEAST_FEATURES),
    )
    arrays = {"query": operands.query, "key": operands.key, "value": value}
    dtypes = (jnp.float32, jnp.bfloat16)
    reason = limits.why_too_small(sizes) or limits.why_wrong_dtype(arrays, dtypes)
    if reason is not None:
        return reason
    if operands.dtype != jnp.float32:
        return f"the sums are {operands.dtype}, not float32"
    return _why_no_precision(options, arrays) or _why_no_blocks(options, operands)


def _why_no_precision(options: Options, arrays: dict[str, Any]) -> str | None:
    reason = limits.why_no_precision(options.precision)
    if reason is not None:
        return reason
    for name, array in arrays.items():
        if limits.is_exact(options.precision) and array.dtype != jnp.float32:
            return f"weights are rounded to the {array.dtype} of `{name}`"
    return None


def _why_no_blocks(options: Options, operands: Operands) -> str | None:
    reason = _program(operands).why_not
    return reason or _why_no_tiles(("forward",), options, operands)


def _why_no_tiles(
    passes: tuple[Pass, ...], options: Options, operands: Operands
) -> str | None:
    for which in passes:
        if _tiles(which, options, operands) is not None:
            continue
        features = operands.query.shape[-1], _value(operands).shape[-1]
        fitting = _candidates(which, options, operands)
        lengths = operands.plan.lengths
        if not fitting:
            return "no tile of {} and {} features fits the vector memory".format(
                *features
            )
        if not any(_is_countable(lengths, tiles) for tiles in fitting):
            return f"{max(lengths)} positions are more than {blocks.MOST_BLOCKS} blocks"
        return "the mask looks into an array inside of blocks of 128 or more"
    return None


def _backward_why_not(options: Options, given: BackwardOperands) -> str | None:
    operands = given.operands
    reason = _why_not(options, operands)
    return reason or _why_no_tiles(("query", "key"), options, operands)


def _note(options: Options, operands: Operands) -> str:
    return str(_tiles("forward", options, operands))


def _backward_note(options: Options, given: BackwardOperands) -> str:
    operands = given.operands
    query, key = (_tiles(which, options, operands) for which in ("query", "key"))
    note = f"{query} for queries, {key} for keys and values"
    return note if operands.bias is None else note + pair_arrays.NOTE


FORWARD = Implementation("pallas_tpu", _forward, _why_not, platform="tpu", note=_note)
BACKWARD = Implementation(
    "pallas_tpu", _backward, _backward_why_not, platform="tpu", note=_backward_note
)
