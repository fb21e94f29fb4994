"""The operation of decode attention: sums per device, merge, fallback, derivative.

The operation itself is the fold over a device's own keys. The rest is the same for
every implementation: sums are added over devices, rows that leave the range of the
unified maximum are recomputed, and the quotient is taken. Where all keys are on one
device, the unified maximum is a separate operation, whose kernel recomputes rows.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from softlib import _dispatch
from softlib._dispatch import Implementation, Operation, Plan
from softlib._sharding import automatic_axes, match_varying
from softlib.numerics import RunningMax
from softlib.typing import AxisName, Implementations

from . import kernels as kernels, stream as stream
from .kernels import Attended
from .stream import Operands, Options


class Plans(NamedTuple):
    """The plan of the first pass, and of the recomputation of rows out of range."""

    first: Plan
    again: Plan | None


def attend(
    names: Implementations,
    options: Options,
    axis_name: AxisName | None,
    operands: Operands,
) -> Attended:
    if operands.unified is None or axis_name is not None:
        plans = Plans(_dispatch.plan(DECODE, names, options, operands), None)
    else:
        plans = Plans(_dispatch.plan(UNIFIED, names, options, operands), None)
    if operands.unified is not None and axis_name is not None:
        running = operands._replace(unified=None)
        plans = plans._replace(again=_dispatch.plan(DECODE, names, options, running))
    if operands.unified is None and plans.first.is_reference:
        return _computed(plans, options, axis_name, operands)  # JAX differentiates it
    return _attend(plans, options, axis_name, operands)


# Needs a rule because a loop whose length is traced has no reverse mode, and because an
# overflowed row would send 0 * inf through the branch that was not selected. As a jvp
# of (out, lse) it serves every mode and every order.
@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _attend(
    plans: Plans, options: Options, axis_name: AxisName | None, operands: Operands
) -> Attended:
    return _computed(plans, options, axis_name, operands)


@_attend.defjvp
def _attend_jvp(
    plans: Plans,
    options: Options,
    axis_name: AxisName | None,
    primals: tuple[Operands],
    tangents: tuple[Any],
):
    (operands,), (dots,) = primals, tangents
    found = _attend(plans, options, axis_name, operands)
    visible, dtype = operands.visible, operands.dtype
    indices = jnp.arange(operands.key.shape[1])
    used = lambda array: array
    if visible is not None:
        # Zeroed before any arithmetic, as are tangents: 0 * NaN is NaN.
        kept = stream.seen_by_any(visible, indices)
        used = lambda array: jnp.where(kept, array, 0)
    value, value_dot = used(operands.value), used(dots.value)
    z, z_dot = jax.jvp(
        functools.partial(stream.scores, options),
        (operands.query, used(operands.key), operands.scale),
        (dots.query, used(dots.key), dots.scale),
    )
    if visible is not None:
        z = jnp.where(stream.seen_by_rows(visible, indices), z, -jnp.inf)
    # p = exp(z - lse), dlse = sum p dz, dout = sum p (dz - dlse) v + p dv
    lse = jnp.where(found.lse == -jnp.inf, 0, found.lse)
    p = jnp.exp(z - lse[..., None])
    lse_dot = _summed((p * z_dot).sum(-1), axis_name)
    weights = p * (z_dot - lse_dot[..., None])
    out_dot = stream.weighted_values(options, weights, value)
    out_dot = out_dot + stream.weighted_values(options, p, value_dot)
    out_dot = _summed(out_dot, axis_name)
    none = match_varying(jnp.zeros(lse_dot.shape, dtype), lse_dot)
    return found, Attended(out_dot, lse_dot, none, none)


def _computed(
    plans: Plans, options: Options, axis_name: AxisName | None, operands: Operands
) -> Attended:
    if operands.unified is None:
        out, lse, top = _by_running_max(plans.first, options, axis_name, operands)
        return Attended(out, lse, top, jnp.zeros_like(lse))

    state = _dispatch.execute(plans.first, options, operands)
    if axis_name is None:
        return state  # already the result
    assert plans.again is not None
    return _completed(
        operands,
        _unified_over(axis_name, state),
        functools.partial(_by_running_max, plans.again, options, axis_name),
    )


def _unified_by(
    fold: Callable[[Options, Operands], Any], options: Options, operands: Operands
) -> Attended:
    """Attention by the unified maximum; a second fold recomputes rows out of range."""

    def again(operands: Operands) -> tuple[Array, Array, Array]:
        return _quotients(fold(options, operands))

    return _completed(operands, fold(options, operands), again)


def _completed(
    operands: Operands,
    state: Any,
    again: Callable[[Operands], tuple[Array, Array, Array]],
) -> Attended:
    """The results of sums by the unified maximum; flagged rows take `again`'s."""
    unified = operands.unified
    assert unified is not None
    flagged = unified.needs_recompute(state)
    fast = unified.mean(state), unified.finalize(state)
    # Flags are the same on all devices of the axis, so that all take the same branch:
    # it may contain collectives.
    slow = lax.cond(
        flagged.any(),
        lambda operands: again(operands)[:2],
        lambda operands: fast,
        operands._replace(unified=None),
    )
    # Selected per row: no row depends on whether another has left the range.
    out = jnp.where(flagged[..., None], slow[0], fast[0])
    lse = jnp.where(flagged, slow[1], fast[1])
    return Attended(out, lse, state.max, flagged.astype(lse.dtype))


def _by_running_max(
    plan: Plan, options: Options, axis_name: AxisName | None, operands: Operands
) -> tuple[Array, Array, Array]:
    accumulator = RunningMax()
    state = _dispatch.execute(plan, options, operands)
    if axis_name is not None:
        top = lax.pmax(lax.stop_gradient(state.max), axis_name)
        # Merging with an empty state at the common maximum rescales to it.
        common = accumulator.init(
            top.shape, top.dtype, weighted=jnp.zeros_like(state.weighted)
        )
        scaled = accumulator.merge(state, common._replace(max=top))
        state = _added_over(axis_name, scaled._replace(max=top))
    return _quotients(state)


def _quotients(state: Any) -> tuple[Array, Array, Array]:
    accumulator = RunningMax()
    top = jnp.where(state.sum == 0, -jnp.inf, state.max)  # -inf in an empty row
    return accumulator.mean(state), accumulator.finalize(state), top


def _unified_over(axis_name: AxisName, state: Any) -> Any:
    # Only flags use the extremes, so no sum waits for them.
    least = state.min
    if least is not None:
        least = lax.pmin(lax.stop_gradient(least), axis_name)
    top = lax.pmax(lax.stop_gradient(state.max), axis_name)
    return _added_over(axis_name, state._replace(max=top, min=least))


def _added_over(axis_name: AxisName, state: Any) -> Any:
    """The state with its sums over all devices, in one collective."""
    both = jnp.concatenate([state.weighted, state.sum[..., None]], axis=-1)
    both = lax.psum(both, axis_name)
    return state._replace(sum=both[..., -1], weighted=both[..., :-1])


def _summed(array: Array, axis_name: AxisName | None) -> Array:
    return array if axis_name is None else lax.psum(array, axis_name)


def _no_splits(options: Options, operands: Any) -> str | None:
    if options.num_splits is None:
        return None
    return "it takes the keys as a whole (num_splits)"


def _gathers(options: Options, operands: Any) -> str | None:
    axes = automatic_axes(operands)
    if not axes:
        return None
    names = ", ".join(map(repr, axes))
    return (
        f"keys whose positions are sharded over mesh axis {names} are gathered part "
        "by part; inside jax.shard_map `axis_name` keeps each device to its own"
    )


_NAME = "decode_attention"
# The sums of a device.
DECODE = Operation(
    _NAME,
    (
        kernels.TPU_STATE,
        kernels.GPU_STATE,
        Implementation("xla", stream.forward, note=_gathers),
        Implementation("reference", stream.whole, _no_splits),
    ),
)
# The result by the unified maximum, where one device has all keys.
UNIFIED = Operation(
    _NAME,
    (
        kernels.TPU_ATTENDED,
        kernels.GPU_ATTENDED,
        Implementation(
            "xla", functools.partial(_unified_by, stream.forward), note=_gathers
        ),
        Implementation(
            "reference", functools.partial(_unified_by, stream.whole), _no_splits
        ),
    ),
)
