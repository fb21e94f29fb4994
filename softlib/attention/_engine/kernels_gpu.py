"""The block-sparse kernels for Hopper GPUs, behind the operations of attention.

A plan has blocks that suit a CPU: kernels take its mask and make lists of their own, of
tiles that fill a GPU. For TMA, lengths are padded to multiples of 8 and features to
multiples of 64; the mask excludes padded keys.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels import _devices
from pallas_kernels._attention_extras import Extras
from pallas_kernels.gpu_mosaic.attention_lists import Lists, lists
from pallas_kernels.gpu_mosaic.attention_mask import OPERATIONS
from pallas_kernels.gpu_mosaic.attention_tiles import (
    FEATURES,
    LENGTHS,
    PAIR_COLUMNS,
    TILE,
    PairBytes,
    choose_backward_tiles,
    choose_tiles,
)
from softlib import _kernel_limits as limits
from softlib._dispatch import Implementation
from softlib._sharding import match_varying
from softlib.masks import Block

from . import pair_arrays
from .mask_program import MaskProgram, Numbers, program_of
from .plan import Skeleton, plan_of
from .scores import LogSoftplus, Result, Softmax, Softplus, StableMax
from .stream import BackwardOperands, Gradient, row_constants, sinks_gradient
from .tiles import OWN_BLOCKS, Operands, Options, why_other_dtypes

type Pass = Literal["forward", "query", "key"]

# Smaller problems do not fill a tile, and plain JAX compiles faster.
LEAST_LENGTH, LEAST_FEATURES = 128, 32
# Padded features for each given one above which cuDNN, which pads none, comes first.
MOST_PADDING = 1.25
# Most entries of a list, 4 bytes each, which are constants of the program.
MOST_ENTRIES = 1 << 23
# Entries are estimated from this number of rows of tiles, evenly spaced.
SAMPLE = 64
_WEIGHTS: dict[Any, Any] = {
    Softmax(): "softmax",
    LogSoftplus(): "log_softplus",
    Softplus(): "softplus",
    StableMax(): "stablemax",
}


def _forward(options: Options, operands: Operands) -> Result:
    from pallas_kernels.gpu_mosaic.attention import attention

    form, numbers = form_of(options, operands)
    tiles = tiles_of("forward", options, operands)
    assert tiles is not None
    query, key, value = _arrays(operands)
    sinks = operands.sinks
    out, normalizer = attention(
        query,
        key,
        value,
        lists_of("forward", options, operands),
        form=form,
        tiles=tiles,
        out_dtype=options.out_dtype,
        sinks=None if sinks is None else sinks.astype(jnp.float32),
        mask_scalars=numbers.scalars,
        extras=_extras(operands, numbers),
    )
    length = operands.plan.lengths[0]
    out = out[:, :length, :, : _value(operands).shape[-1]]
    normalizer = jnp.moveaxis(normalizer[..., :length], 1, 2)
    return match_varying(Result(out, normalizer), *_every(operands))


def _backward(options: Options, given: BackwardOperands) -> Gradient:
    from pallas_kernels.gpu_mosaic.attention_backward import query_gradient
    from pallas_kernels.gpu_mosaic.attention_key_gradients import key_gradients
    from pallas_kernels.gpu_mosaic.attention_scores import LOG2E

    operands = given.operands
    form, numbers = form_of(options, operands)
    tiles = tiles_of("query", options, operands)
    assert tiles is not None
    inverse, delta = row_constants(options, given)
    norm = inverse * LOG2E if options.kind.is_log else inverse
    rows = lambda x, fill=0.0: _padded(jnp.moveaxis(x, 2, 1), {2: multiple}, fill)
    # Padded rows have no weights: a bias that queries share is not 0 there.
    multiple = LENGTHS if operands.bias is None else tiles.queries
    empty = 0.0 if operands.bias is None or not options.kind.is_log else jnp.inf
    cotangent = given.out_cotangent
    assert cotangent is not None
    arrays = (*_arrays(operands), tiled(cotangent), rows(norm, empty), rows(delta))
    rest: dict[str, Any] = {
        "form": form,
        "tiles": tiles,
        "is_wide": options.wide_gradients,
        "mask_scalars": numbers.scalars,
        "extras": _extras(operands, numbers),
    }
    dq = query_gradient(*arrays, lists_of("query", options, operands), **rest)
    dk, dv = key_gradients(*arrays, lists_of("key", options, operands), **rest)
    like = lambda x, array: x[:, : array.shape[1], :, : array.shape[3]]
    dq = like(dq, operands.query)
    dk, dv = like(dk, operands.key), like(dv, _value(operands))
    sinks = operands.sinks
    if sinks is not None:
        dtype = jnp.float32 if options.wide_gradients else sinks.dtype
        sinks = sinks_gradient(sinks, inverse, delta).astype(dtype)
    varying = (*_every(operands), cotangent, given.normalizer_cotangent)
    dq, dk, dv = match_varying((dq, dk, dv), *varying)
    bias = pair_arrays.bias_gradient(options, given)
    return Gradient(dq, dk, dv, bias, sinks, ())


def _every(operands: Operands) -> list[Array]:
    """All arrays: results vary over every mesh axis over which one of them varies."""
    plan, arrays = operands.plan, operands._replace(plan=None)
    leaves = jax.tree.leaves((arrays, plan.mask))
    return [leaf for leaf in leaves if isinstance(leaf, jax.Array)]


def _value(operands: Operands) -> Array:
    assert operands.value is not None
    return operands.value


def _arrays(operands: Operands) -> tuple[Array, Array, Array]:
    return tiled(operands.query), tiled(operands.key), tiled(_value(operands))


def tiled(x: Array) -> Array:
    """Pads (B, T, N, H) to the multiples that TMA needs."""
    return _padded(x, {1: LENGTHS, 3: FEATURES})


def _padded(x: Array, multiples: dict[int, int], fill: float = 0) -> Array:
    """Pads axes at the end, up to multiples of these sizes; not axes of one."""
    width = [
        (0, -size % multiples.get(axis, 1) if size > 1 else 0)
        for axis, size in enumerate(x.shape)
    ]
    padded = any(after for _, after in width)
    return jnp.pad(x, width, constant_values=fill) if padded else x


def _extras(operands: Operands, numbers: Numbers) -> Extras:
    """The arrays over pairs and positions, in the dtypes and sizes of kernels."""

    def padded(x: Array | None) -> Array | None:
        if x is None:
            return None
        columns = PAIR_COLUMNS if pair_arrays.is_matrix(x) else LENGTHS
        return _padded(x, {2: LENGTHS, 3: columns})

    return Extras(
        *map(padded, pair_arrays.stored(operands)),
        *(
            None if x is None else _padded(x, {2: LENGTHS})
            for x in (numbers.queries, numbers.keys)
        ),
    )


def form_of(options: Options, operands: Operands) -> tuple[Any, Numbers]:
    """The static form of a kernel, and what its mask reads."""
    from pallas_kernels.gpu_mosaic.attention_scores import Form

    program, plan = _program(operands), operands.plan
    # Else tiles were chosen so that only padded keys are left to exclude.
    attends, numbers = None, Numbers(None, None, None)
    if program.is_evaluable:
        attends = program.attends
        numbers = program.numbers(plan.mask, operands.query.shape[0])
    form = Form(
        attends,
        plan.lengths[1],
        options.scale,
        options.softcap,
        _WEIGHTS[options.kind],
    )
    return form, numbers


def _program(operands: Operands) -> MaskProgram:
    return program_of(operands.plan.mask, operands.plan.lengths, OPERATIONS)


def lists_of(which: Pass, options: Options, operands: Operands) -> Lists:
    lengths = operands.plan.lengths
    return _listed(
        which,
        Skeleton.of(operands.plan.mask),
        lengths,
        _sizes(which, options, operands),
    )


@functools.lru_cache(maxsize=64)
def _listed(
    which: Pass, skeleton: Skeleton, lengths: tuple[int, int], sizes: tuple[int, int]
) -> Lists:
    plan = plan_of(skeleton.mask, lengths, sizes)
    if which == "key":
        return lists(plan.whole[::-1], plan.partial[::-1], plan.grid[1])
    return lists(plan.whole, plan.partial, plan.grid[0])


def _sizes(which: Pass, options: Options, operands: Operands) -> tuple[int, int]:
    """Numbers of queries and keys in a tile of scores."""
    tiles = tiles_of(which, options, operands)
    assert tiles is not None
    return (tiles.queries, TILE) if which == "key" else (TILE, tiles.keys)


def _features(operands: Operands) -> tuple[int, int]:
    """Numbers of features of queries and of values, padded."""
    up = lambda size: -(-size // FEATURES) * FEATURES
    return up(operands.query.shape[-1]), up(_value(operands).shape[-1])


def tiles_of(which: Pass, options: Options, operands: Operands) -> Any:
    device = _devices.gpu() or _devices.H100
    choose = choose_tiles if which == "forward" else choose_backward_tiles
    wide = _is_wide(which, options, operands)
    return choose(*_features(operands), device, _pair_bytes(operands), wide)


def _is_wide(which: Pass, options: Options, operands: Operands) -> bool:
    """Whether results are float32, in which parts are added up."""
    if which == "forward":
        return options.out_dtype != operands.query.dtype
    return options.wide_gradients


def _pair_bytes(operands: Operands) -> PairBytes:
    program = _program(operands)
    matrices, rows = 0, 0
    if program.is_evaluable:
        rows = 4 * (program.queries + program.keys)
    for x, size in ((operands.dense, 1), (operands.bias, None)):
        if x is None:
            continue
        if pair_arrays.is_matrix(x):
            matrices += size or x.dtype.itemsize
        else:
            rows += 4
    return PairBytes(matrices, rows)


def _why_not(options: Options, operands: Operands) -> str | None:
    return (
        limits.why_not_hopper(_devices.gpu_generation())
        or _why_no_option(options, operands)
        or _why_no_shape(operands)
        or _why_no_tiles(options, operands)
        or _why_no_mask(options, operands, ("forward",))
    )


def _backward_why_not(options: Options, given: BackwardOperands) -> str | None:
    operands = given.operands
    reason = _why_not(options, operands)
    if reason is not None:
        return reason
    if tiles_of("query", options, operands) is None:
        return f"the sums of {_both(operands)} do not fit the registers"
    return _why_no_mask(options, operands, ("query", "key"))


def _why_no_option(options: Options, operands: Operands) -> str | None:
    value = operands.value
    if value is None:
        return "it computes no statistics without values"
    if options.kind not in _WEIGHTS:
        return f"it has no weights of kind {type(options.kind).__name__}"
    if options.has_given_blocks:
        return OWN_BLOCKS
    return why_other_dtypes(options, operands, widens=True)


def _why_no_shape(operands: Operands) -> str | None:
    (batch, _, heads, features), key_heads = operands.query.shape, operands.key.shape[2]
    if not (batch and heads and key_heads):
        return "an axis is empty"
    if max(batch, heads) > 65_535:
        return f"{max(batch, heads)} heads or batch entries are more than 65535"
    sizes = (
        ("queries", operands.plan.lengths[0], LEAST_LENGTH),
        ("keys", operands.plan.lengths[1], LEAST_LENGTH),
        ("features of a query", features, LEAST_FEATURES),
        ("features of a value", _value(operands).shape[-1], LEAST_FEATURES),
    )
    return limits.why_too_small(sizes)


def _why_no_tiles(options: Options, operands: Operands) -> str | None:
    if tiles_of("forward", options, operands) is None:
        return f"tiles of {_both(operands)} do not fit the registers or shared memory"
    return None


def _both(operands: Operands) -> str:
    sizes = operands.query.shape[-1], _value(operands).shape[-1]
    return "{} features of a query and {} of a value".format(*sizes)


def _why_no_mask(
    options: Options, operands: Operands, passes: tuple[Pass, ...]
) -> str | None:
    plan = operands.plan
    program, skeleton = _program(operands), Skeleton.of(plan.mask)
    if program.why_not is not None:
        return program.why_not
    for which in passes:
        sizes = _sizes(which, options, operands)
        if not program.is_evaluable and _decides(skeleton, plan.lengths, sizes):
            return "the mask looks into an array inside of tiles of {} x {}".format(
                *sizes
            )
        entries = _entries(skeleton, plan.lengths, sizes)
        if entries > MOST_ENTRIES:
            return f"a list of {entries} tiles is longer than {MOST_ENTRIES}"
    return None


@functools.lru_cache(maxsize=256)
def _decides(
    skeleton: Skeleton, lengths: tuple[int, int], sizes: tuple[int, int]
) -> bool:
    """Whether a mask decides within some tile."""
    return bool((_kinds(skeleton, lengths, sizes) == Block.SOME).any())


@functools.lru_cache(maxsize=256)
def _entries(
    skeleton: Skeleton, lengths: tuple[int, int], sizes: tuple[int, int]
) -> int:
    """The estimated number of listed tiles."""
    kinds = _kinds(skeleton, lengths, sizes, SAMPLE)
    every = -(-lengths[0] // sizes[0]) / len(kinds)
    return int((kinds != Block.NONE).sum() * every)


def _kinds(
    skeleton: Skeleton,
    lengths: tuple[int, int],
    sizes: tuple[int, int],
    most_rows: int | None = None,
) -> np.ndarray:
    """Block status of tiles, in at most `most_rows` rows of them."""
    rows, columns = (-(-n // size) for n, size in zip(lengths, sizes, strict=True))
    some = min(rows, most_rows or rows)
    start = np.linspace(0, rows - 1, some, dtype=int)[:, None] * sizes[0]
    key_start = np.arange(columns)[None] * sizes[1]
    kinds = skeleton.mask.block_status(
        start,
        np.minimum(start + sizes[0], lengths[0]),
        key_start,
        np.minimum(key_start + sizes[1], lengths[1]),
    )
    return np.broadcast_to(kinds, (some, columns))


def _yields(options: Options, operands: Operands) -> str | None:
    features, padded = operands.query.shape[-1], _features(operands)[0]
    if padded <= MOST_PADDING * features:
        return None
    return f"it multiplies {padded} features for {features}"


def _backward_yields(options: Options, given: BackwardOperands) -> str | None:
    return _yields(options, given.operands)


def pads(*arrays: Array) -> str:
    """Describes the cost of `tiled`."""
    shapes = (array.shape for array in arrays)
    fits = all(
        length % LENGTHS == 0 and features % FEATURES == 0
        for _, length, _, features in shapes
    )
    return "" if fits else "; arrays are copied to pad them"


def _padding(operands: Operands) -> str:
    note = pads(operands.query, operands.key, _value(operands))
    matrices = [x for x in (operands.dense, operands.bias) if x is not None]
    fits = all(
        x.shape[2] % LENGTHS == 0 == x.shape[3] % PAIR_COLUMNS
        for x in filter(pair_arrays.is_matrix, matrices)
    )
    if not fits:
        note += "; arrays over pairs are copied to pad them"
    return note


def _note(options: Options, operands: Operands) -> str:
    tiles = tiles_of("forward", options, operands)
    return f"{tiles}{_padding(operands)}"


def _backward_note(options: Options, given: BackwardOperands) -> str:
    tiles = tiles_of("query", options, given.operands)
    note = f"{tiles}{_padding(given.operands)}"
    if given.operands.bias is not None:
        note += pair_arrays.NOTE
    return note


FORWARD = Implementation(
    "pallas_gpu", _forward, _why_not, platform="cuda", note=_note, yields=_yields
)
BACKWARD = Implementation(
    "pallas_gpu",
    _backward,
    _backward_why_not,
    platform="cuda",
    note=_backward_note,
    yields=_backward_yields,
)
