"""The operation of the attention engine, its gradient, and the one derivative rule.

A `custom_vjp` is needed because the transpose of a loop would store every tile of
weights. Its rules call the inner functions, never the decorated one: otherwise forward
mode over the rule, hence every Hessian-vector product, would be an error.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from softlib import _dispatch
from softlib._dispatch import Implementation, Operation, Plan
from softlib._dtypes import accumulator_dtype
from softlib._sharding import automatic_axes
from softlib.attention._tuples import (
    kernels_gpu as tuple_kernels_gpu,
    kernels_tpu as tuple_kernels,
)
from softlib.typing import Implementations

from . import (
    batch_heads as _batch_heads,
    cudnn,
    kernels_gpu,
    kernels_tpu,
    large_steps as _large_steps,
    stream as _stream,
)
from .scores import Result
from .stream import BackwardOperands, Gradient
from .tiles import Operands, Options, product


def operation_of(operands: Operands) -> Operation:
    """The operation of attention over keys, or over tuples of keys."""
    return TUPLE_ATTENTION if operands.outer else ATTENTION


def attention(names: Implementations, options: Options, operands: Operands) -> Result:
    choice = _dispatch.plan(operation_of(operands), names, options, operands)
    if choice.is_reference:
        return _dispatch.execute(choice, options, operands)  # JAX differentiates it
    return _attention(choice, names, options, operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attention(
    choice: Plan, names: Implementations, options: Options, operands: Operands
) -> Result:
    return _dispatch.execute(choice, options, operands)


def _forward(
    choice: Plan, names: Implementations, options: Options, operands: Operands
):
    found = _dispatch.execute(choice, options, operands)
    return found, (operands, found.out, found.normalizer)


def _backward(
    choice: Plan,
    names: Implementations,
    options: Options,
    residuals: tuple[Operands, Array | None, Array],
    cotangents: Result,
):
    operands, out, normalizer = residuals
    given = BackwardOperands(
        operands, out, normalizer, cotangents.out, cotangents.normalizer
    )
    operation = TUPLE_ATTENTION_GRADIENT if operands.outer else ATTENTION_GRADIENT
    gradient: Gradient = _dispatch.run(operation, names, options, given)
    return (
        Operands(
            gradient.query,
            gradient.key,
            gradient.value,
            None,
            None,
            gradient.bias,
            gradient.sinks,
            gradient.rows,
            gradient.outer,
        ),
    )


_attention.defvjp(_forward, _backward)


def _reference(options: Options, operands: Operands) -> Result:
    """Evaluates the definition on all pairs at once."""
    kind, dtype, groups = options.kind, operands.dtype, operands.groups
    (t, *lengths), mask = operands.plan.lengths, operands.plan.mask
    s = math.prod(lengths)
    keys, values = zip(*operands.outer, (operands.key, operands.value), strict=True)
    heads = lambda x: jnp.repeat(jnp.moveaxis(x.astype(dtype), 2, 1), groups, axis=1)
    query = jnp.moveaxis(operands.query.astype(dtype), 2, 1)
    z = product(query, heads(_tuples(keys)).swapaxes(-1, -2), options) * options.scale
    if options.softcap is not None:
        z = options.softcap * jnp.tanh(z / options.softcap)
    if operands.bias is not None:
        z = z + operands.bias.astype(dtype)
    ok = jnp.asarray(mask.materialize(t, *lengths))
    ok = ok.reshape(*ok.shape[: -len(lengths)], s)
    ok = ok[:, None] if ok.ndim == 3 else ok[None, None]
    ok = jnp.broadcast_to(ok, z.shape)
    if operands.dense is not None:
        ok = ok & operands.dense
    rows = tuple(jnp.moveaxis(row, 2, 1)[..., None] for row in operands.rows)
    # Selected before as well as after: 0 * inf in a derivative is NaN.
    entries = kind.entries(jnp.where(ok, z, 0), rows)
    entries = jnp.where(ok, entries, kind.absent)
    weigh = value = None
    if operands.value is not None:
        value = heads(_tuples(values))
        weigh = lambda weights: product(weights, value, options)
    sinks = operands.sinks
    if sinks is not None:
        sinks = jnp.broadcast_to(sinks.astype(dtype)[None, :, None], z.shape[:-1])
    state = _stream.initial_state(options.kind, z.shape[:-1], dtype, value, sinks)
    if s:
        state = kind.accumulator.update(state, entries, weigh=weigh)
    found = kind.finalize(state)
    back = lambda x: None if x is None else jnp.moveaxis(x, 1, 2)
    out = back(found.out)
    if out is not None:
        out = out.astype(options.out_dtype)
    return Result(out, back(found.normalizer), back(found.max))


def _tuples(arrays: Sequence[Array]) -> Array:
    """The feature products of all tuples of keys, as one long key axis."""
    found = arrays[0].astype(accumulator_dtype(*arrays))
    for array in arrays[1:]:
        batch, length, heads, features = array.shape
        length = found.shape[1] * length
        found = found[:, :, None] * array.astype(found.dtype)[:, None]
        found = found.reshape(batch, length, heads, features)
    return found


def _reference_gradient(options: Options, given: BackwardOperands) -> Gradient:
    operands = given.operands

    def call(query, key, value, bias, sinks, rows, outer):
        same = operands._replace(
            query=query,
            key=key,
            value=value,
            bias=bias,
            sinks=sinks,
            rows=rows,
            outer=outer,
        )
        found = _reference(options, same)
        return found.out, found.normalizer

    arguments = (
        operands.query,
        operands.key,
        operands.value,
        operands.bias,
        operands.sinks,
        operands.rows,
        operands.outer,
    )
    _, pull = jax.vjp(call, *arguments)
    return Gradient(*pull((given.out_cotangent, given.normalizer_cotangent)))


def _note(options: Options, given: Operands | BackwardOperands) -> str:
    operands = given.operands if isinstance(given, BackwardOperands) else given
    steps = _large_steps.described(options, operands)
    axes = automatic_axes(given)
    if not axes:
        return steps
    names = ", ".join(map(repr, axes))
    return (
        f"{steps}; keys divided over mesh axis {names} are gathered on every device; "
        "sequence_parallel_attention inside jax.shard_map keeps each device to its own"
    )


def _operations(
    name: str, kernels: Sequence[tuple[Implementation, Implementation]]
) -> tuple[Operation, Operation]:
    """An operation of attention with this name and its gradient.

    `kernels` are those of each platform, for both.
    """
    of_forward, of_backward = zip(*kernels, strict=True)
    forward = (
        Implementation(
            "xla",
            _batch_heads.forward,
            note=_note,
            accelerated=_large_steps.forward,
        ),
        Implementation("reference", _reference),
    )
    backward = (
        Implementation(
            "xla",
            _batch_heads.backward,
            note=_note,
            accelerated=_large_steps.backward,
        ),
        Implementation("reference", _reference_gradient),
    )
    return (
        Operation(name, (*of_forward, *forward)),
        Operation(f"{name}_gradient", (*of_backward, *backward)),
    )


ATTENTION, ATTENTION_GRADIENT = _operations(
    "dot_product_attention",
    [
        (kernels_tpu.FORWARD, kernels_tpu.BACKWARD),
        (kernels_gpu.FORWARD, kernels_gpu.BACKWARD),
        (cudnn.FORWARD, cudnn.BACKWARD),
    ],
)
# Both have the same plain computation but different kernels.
TUPLE_ATTENTION, TUPLE_ATTENTION_GRADIENT = _operations(
    "kronecker_attention",
    [
        (tuple_kernels.FORWARD, tuple_kernels.BACKWARD),
        (tuple_kernels_gpu.FORWARD, tuple_kernels_gpu.BACKWARD),
    ],
)
