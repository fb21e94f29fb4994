"""The kernels for pairs of keys on Hopper GPUs, behind attention over tuples.

A plan has blocks that suit a CPU: kernels take its mask and have lists of their own.
Arrays are padded for TMA; the masks exclude padded keys.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import _devices
from pallas_kernels.gpu_mosaic.attention_mask import is_constant, missing
from pallas_kernels.gpu_mosaic.trilinear_tiles import Pass
from softlib import _kernel_limits as limits
from softlib._dispatch import Implementation
from softlib._sharding import match_varying
from softlib.attention._engine.kernels_gpu import pads, tiled
from softlib.attention._engine.plan import Skeleton
from softlib.attention._engine.scores import Result
from softlib.attention._engine.stream import (
    BackwardOperands,
    Gradient,
    row_constants,
)
from softlib.attention._engine.tiles import Operands, Options

from .blocks import lengths_of, masks_of
from .blocks_gpu import Order, orders, runs_of
from .refusals import why_no_mask, why_no_options

# Most entries of a kernel's grid.
_MOST_HEADS = 65_535


def _forward(options: Options, operands: Operands) -> Result:
    from pallas_kernels.gpu_mosaic import trilinear

    (order,) = _orders("forward", operands)
    first, second = _sides(operands, order.swapped)
    out, lse = trilinear.forward(
        tiled(operands.query),
        first,
        second,
        runs_of("forward", operands, order),
        form=_form(options, operands, order),
    )
    length, groups = operands.plan.lengths[0], order.tiles.groups
    out = out[:, :length, :, : _value(operands).shape[-1]]
    lse = trilinear.rows_back(lse, groups, length)
    return match_varying(Result(out, lse), *_arrays(operands))


def _backward(options: Options, given: BackwardOperands) -> Gradient:
    from pallas_kernels.gpu_mosaic import (
        trilinear,
        trilinear_gradient,
        trilinear_key_gradient,
    )
    from pallas_kernels.gpu_mosaic.attention_scores import LOG2E

    operands, cotangent = given.operands, given.out_cotangent
    assert cotangent is not None
    inverse, delta = row_constants(options, given)
    query, cotangent = tiled(operands.query), tiled(cotangent)

    def call(kernel: Any, which: Pass, order: Order) -> Any:
        queries, groups = order.tiles.queries, order.tiles.groups
        count = -(-operands.plan.lengths[0] // queries)
        # Padded rows are made empty: their weights are 0.
        rows = (
            trilinear.rows_of(inverse * LOG2E, groups, count, jnp.inf),
            trilinear.rows_of(delta, groups, count, 0.0),
        )
        sides = _sides(operands, order.swapped)
        runs = runs_of(which, operands, order)
        form = _form(options, operands, order)
        return kernel(query, *sides, cotangent, *rows, runs, form=form)

    (order,) = _orders("query", operands)
    dq = call(trilinear_gradient.query_gradient, "query", order)
    found = {
        order.swapped: call(trilinear_key_gradient.key_gradients, "key", order)
        for order in _orders("key", operands)
    }
    like = lambda x, array: x[:, : array.shape[1], :, : array.shape[3]]
    pairs = [(operands.key, _value(operands)), *operands.outer]
    last, outer = (
        tuple(map(like, found[swapped], pair))
        for swapped, pair in zip((False, True), pairs, strict=True)
    )
    varying = (*_arrays(operands), cotangent, given.normalizer_cotangent)
    dq, last, outer = match_varying((like(dq, operands.query), last, outer), *varying)
    return Gradient(dq, last[0], last[1], None, None, (), (outer,))


def _orders(which: Pass, operands: Operands) -> tuple[Order, ...]:
    found = orders(which, operands)
    assert not isinstance(found, str)
    return found


def _value(operands: Operands) -> Array:
    assert operands.value is not None
    return operands.value


def _arrays(operands: Operands) -> tuple[Array, ...]:
    return (operands.query, operands.key, _value(operands), *operands.outer[0])


def _sides(operands: Operands, swapped: bool) -> list[tuple[Array, Array]]:
    """(keys, values) of the first and of the second axis."""
    pairs = [*operands.outer, (operands.key, _value(operands))]
    pairs = [(tiled(key), tiled(value)) for key, value in pairs]
    return pairs[::-1] if swapped else pairs


def _form(options: Options, operands: Operands, order: Order) -> Any:
    from pallas_kernels.gpu_mosaic.trilinear_common import Form

    lengths = lengths_of(operands, order.swapped)
    own = masks_of(operands.plan.mask, lengths, order.swapped)
    return Form(own, lengths, options.scale, order.tiles)


# --------------------------------------------------------------------- what is refused
def _why_not(options: Options, operands: Operands) -> str | None:
    return (
        limits.why_not_hopper(_devices.gpu_generation())
        or why_no_options(options, operands)
        or _why_no_dtype(options, operands)
        or why_no_mask(operands)
        or _why_no_operations(operands)
    )


def _why_no_dtype(options: Options, operands: Operands) -> str | None:
    dtype = operands.query.dtype
    for array in _arrays(operands):
        if array.dtype not in (jnp.bfloat16, jnp.float16):
            return f"an argument is {array.dtype}, not bfloat16 or float16"
        if array.dtype != dtype:
            return f"an argument is {array.dtype}, the queries are {dtype}"
    if options.out_dtype != dtype:
        return f"the output is to be {options.out_dtype}, not {dtype} as the arrays"
    if limits.is_exact(options.precision):
        return f"products of queries and keys are rounded to the {dtype} of the arrays"
    batch, _, heads, _ = operands.query.shape
    if max(batch, heads) > _MOST_HEADS:
        most = max(batch, heads)
        return f"{most} heads or batch entries are more than {_MOST_HEADS}"
    return None


def _why_no_operations(operands: Operands) -> str | None:
    return _lacking(Skeleton.of(operands.plan.mask), operands.plan.lengths)


@functools.lru_cache(maxsize=256)
def _lacking(skeleton: Skeleton, lengths: tuple[int, int, int]) -> str | None:
    first, second, joint = masks_of(skeleton.mask, lengths, False)
    every = [
        (mask, scalars)
        for mask, scalars in ((first, 0), (second, 0), (joint, 1))
        if mask is not None
    ]
    lacks = {name for own in every for name in missing(*own)}
    if lacks:
        return f"the mask takes operations that it lacks: {', '.join(sorted(lacks))}"
    if any(is_constant(*own) for own in every):
        return "a part of the mask looks at no position"
    return None


def _forward_why_not(options: Options, operands: Operands) -> str | None:
    return _why_not(options, operands) or _why_no_tiles(operands, "forward")


def _backward_why_not(options: Options, given: BackwardOperands) -> str | None:
    operands = given.operands
    reason = _why_not(options, operands)
    if reason is not None:
        return reason
    if options.wide_gradients:
        return "gradients are to be float32, it rounds them to the dtype of the arrays"
    return _why_no_tiles(operands, "query", "key")


def _why_no_tiles(operands: Operands, *passes: Pass) -> str | None:
    found = (orders(which, operands) for which in passes)
    return next((reason for reason in found if isinstance(reason, str)), None)


def _note(operands: Operands, *passes: Pass) -> str:
    names = (f"{_orders(which, operands)[0].tiles} ({which})" for which in passes)
    return f"{', '.join(names)}{pads(*_arrays(operands))}"


FORWARD = Implementation(
    "pallas_gpu",
    _forward,
    _forward_why_not,
    platform="cuda",
    note=lambda options, operands: _note(operands, "forward"),
)
BACKWARD = Implementation(
    "pallas_gpu",
    _backward,
    _backward_why_not,
    platform="cuda",
    note=lambda options, given: _note(given.operands, "query", "key"),
)
