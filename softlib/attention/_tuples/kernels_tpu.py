"""The kernels for pairs of keys, behind the operations of attention over tuples.

A plan has blocks that suit a CPU: kernels take its mask and have lists of their own.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.tpu.attention_mask import missing
from pallas_kernels.tpu.trilinear_tiles import LANES, Pass
from softlib import _kernel_limits as limits
from softlib._dispatch import Implementation
from softlib.attention._engine.plan import BlockPlan, Skeleton
from softlib.attention._engine.scores import Result
from softlib.attention._engine.stream import (
    BackwardOperands,
    Gradient,
    row_constants,
)
from softlib.attention._engine.tiles import Operands, Options

from .blocks import Order, chosen_order, lengths_of, masks_of, pieces_of, visits_of
from .refusals import why_no_mask, why_no_options

# Most features of the backward pass: with more, products spill registers.
MOST_FLOAT32_FEATURES = LANES
_BACKWARD: tuple[Pass, ...] = ("query", "first", "second")


def _forward(options: Options, operands: Operands) -> Result:
    from pallas_kernels.tpu import trilinear

    order = chosen_order(("forward",), options, operands)
    assert isinstance(order, Order)
    first, second = _sides(operands, order)
    out, lse = trilinear.forward(
        _flat(operands.query),
        first,
        second,
        visits_of("forward", operands, order.tiles[0], order),
        tiles=order.tiles[0],
        **_form(options, operands, order),
    )
    out = _heads(out, operands.query.shape[2], _value(operands).shape[-1])
    return Result(out.astype(options.out_dtype), lse)


def _backward(options: Options, given: BackwardOperands) -> Gradient:
    from pallas_kernels.tpu import trilinear_gradient

    operands, cotangent = given.operands, given.out_cotangent
    assert cotangent is not None
    order = chosen_order(_BACKWARD, options, operands)
    assert isinstance(order, Order)
    visits = [
        visits_of(which, operands, tiles, order)
        for which, tiles in zip(_BACKWARD, order.tiles, strict=True)
    ]
    first, second = _sides(operands, order)
    dq, *found = trilinear_gradient.gradient(
        _flat(operands.query),
        first,
        second,
        _flat(cotangent),
        *row_constants(options, given),
        (visits[0], visits[1], visits[2]),
        tiles=(order.tiles[0], order.tiles[1], order.tiles[2]),
        dtype=jnp.float32 if options.wide_gradients else None,
        **_form(options, operands, order),
    )
    if order.swapped:
        found = found[::-1]
    heads, features = operands.key.shape[2:]
    outer, last = (
        (_heads(key, heads, features), _heads(value, heads, _value(operands).shape[-1]))
        for key, value in found
    )
    dq = _heads(dq, *operands.query.shape[2:])
    return Gradient(dq, last[0], last[1], None, None, (), (outer,))


def _value(operands: Operands) -> Array:
    assert operands.value is not None
    return operands.value


def _form(options: Options, operands: Operands, order: Order) -> dict[str, Any]:
    """The static arguments of a kernel."""
    return {
        "masks": masks_of(
            operands.plan.mask, lengths_of(operands, order.swapped), order.swapped
        ),
        "scale": options.scale,
        "heads": operands.key.shape[2],
        "groups": operands.groups,
        "pieces": pieces_of(options, operands),
    }


def _sides(operands: Operands, order: Order) -> list[tuple[Array, Array]]:
    """(keys, values) of the first and of the second axis."""
    pairs = [*operands.outer, (operands.key, _value(operands))]
    pairs = [(_flat(key), _flat(value)) for key, value in pairs]
    return pairs[::-1] if order.swapped else pairs


def _flat(x: Array) -> Array:
    """Puts heads side by side on the last axis, each padded to whole lanes."""
    over = ((0, 0), (0, 0), (0, 0), (0, -x.shape[-1] % LANES))
    x = jnp.pad(x, over) if over[-1][1] else x
    return x.reshape(*x.shape[:2], -1)


def _heads(x: Array, heads: int, features: int) -> Array:
    """The inverse of `_flat`."""
    return x.reshape(*x.shape[:2], heads, -1)[..., :features]


# --------------------------------------------------------------------- what is refused
def _why_not(options: Options, operands: Operands) -> str | None:
    reason = why_no_options(options, operands)
    if reason is not None:
        return reason
    arrays = (operands.query, operands.key, _value(operands), *operands.outer[0])
    for array in arrays:
        if array.dtype not in (jnp.float32, jnp.bfloat16):
            return f"an argument is {array.dtype}, not float32 or bfloat16"
    return (
        limits.why_no_precision(options.precision)
        or why_no_mask(operands)
        or _why_no_operations(operands.plan)
    )


def _why_no_operations(plan: BlockPlan) -> str | None:
    lacks = _lacking(Skeleton.of(plan.mask), plan.lengths)
    if lacks:
        return f"the mask takes operations that it lacks: {', '.join(lacks)}"
    return None


@functools.lru_cache(maxsize=256)
def _lacking(skeleton: Skeleton, lengths: tuple[int, int, int]) -> list[str]:
    first, second, joint = masks_of(skeleton.mask, lengths, False)
    every = ((first, 0), (second, 0), (joint, 1))
    return sorted({name for m, n in every if m is not None for name in missing(m, n)})


def _forward_why_not(options: Options, operands: Operands) -> str | None:
    return _why_not(options, operands) or _no_tiles(("forward",), options, operands)


def _backward_why_not(options: Options, given: BackwardOperands) -> str | None:
    operands = given.operands
    reason = _why_not(options, operands)
    if reason is not None:
        return reason
    features = max(operands.query.shape[-1], _value(operands).shape[-1])
    if max(pieces_of(options, operands)) > 1 and features > MOST_FLOAT32_FEATURES:
        return f"{features} features of float32 would not fit the registers"
    return _no_tiles(_BACKWARD, options, operands)


def _no_tiles(
    passes: tuple[Any, ...], options: Options, operands: Operands
) -> str | None:
    order = chosen_order(passes, options, operands)
    return order if isinstance(order, str) else None


def _note(passes: tuple[Any, ...], options: Options, operands: Operands) -> str | None:
    order = chosen_order(passes, options, operands)
    assert isinstance(order, Order)
    names = (
        f"{tiles} ({which})" for which, tiles in zip(passes, order.tiles, strict=True)
    )
    return ", ".join(names)


FORWARD = Implementation(
    "pallas_tpu",
    _forward,
    _forward_why_not,
    platform="tpu",
    note=functools.partial(_note, ("forward",)),
)
BACKWARD = Implementation(
    "pallas_tpu",
    _backward,
    _backward_why_not,
    platform="tpu",
    note=lambda options, given: _note(_BACKWARD, options, given.operands),
)
