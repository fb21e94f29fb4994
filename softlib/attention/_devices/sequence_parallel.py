"""Attention over a sequence that is divided over devices, inside `jax.shard_map`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from softlib import _checks as checks, _dispatch, masks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype
from softlib._sharding import match_varying
from softlib.attention._arguments import Shapes, are_given, scaled
from softlib.attention._dot_product import dot_product_attention
from softlib.attention._engine import operations
from softlib.attention._engine.scores import Result, Softmax
from softlib.attention._engine.stream import BackwardOperands, Gradient
from softlib.attention._engine.tiles import Operands, Options
from softlib.attention._partials import AttentionResult, merge
from softlib.masks import Mask
from softlib.typing import Implementations, Precision, Scalar

from .ring import Layout, Ring, ring_of, sequence_order


@array_arguments
def sequence_parallel_attention(
    query: Float[Array, "*batch T N H"],
    key: Float[Array, "*batch S K H"],
    value: Float[Array, "*batch S K E"],
    *,
    axis_name: str,
    method: Literal["ring", "all_to_all"] = "ring",
    layout: Layout = "contiguous",
    mask: Mask | None = None,
    scale: Scalar | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    return_lse: bool = False,
    block_query: int | None = None,
    block_key: int | None = None,
    precision: Precision = None,
    implementation: Implementations = None,
) -> Float[Array, "*batch T N E"] | AttentionResult:
    r"""Attention over all keys of a mesh axis, each device holding a part of them.

    Equals `dot_product_attention` of the whole sequence, forward and backward; every
    device gets the rows of its own queries. To be called inside `jax.shard_map`.

    - `ring`: keys and values travel, queries stay. A pair of devices of whose keys the
      mask lets no query see any exchanges nothing; what arrives is merged by its
      logsumexp. The memory of a device is that of its own part.
    - `all_to_all`: heads are divided instead of the sequence while attention runs, two
      exchanges for everything. For masks that are dense, and N a multiple of the
      devices.

    Args:
        query: The part of this device; T queries on each.
        key: The part of this device; S keys on each. With `all_to_all` K is a multiple
            or a divisor of the devices.
        value: Likewise.
        axis_name: Static name of a mesh axis over which the sequence is divided.
        method: Static.
        layout: Static; how the sequence was divided. `contiguous`, or `paired`: in the
            order of `sequence_order`.
        mask: A mask value on positions in the whole sequence; its arrays are whole too,
            the same on each device of the axis. None for all pairs.
        scale: As in `dot_product_attention`.
        softcap: Static positive number; None for none.
        sinks: One extra score per query head.
        return_lse: Static; returns `AttentionResult`, with the logsumexp.
        block_query: Static queries per block.
        block_key: Static keys per block.
        precision: Of the matrix products, as in `jax.lax.dot_general`.
        implementation: Static; see `softlib.explain`.

    Returns:
        The output of this device's queries in the dtype of `query`; with `return_lse`
        also the logsumexp `(*batch, T, N)`.

    Raises:
        TypeError: An argument has the wrong kind of dtype or type.
        ValueError: Shapes do not fit together, or cannot be divided.
        NotImplementedError: No implementation that was named can run.

    Derivatives: first order in reverse mode, and forward over reverse; of `query`,
        `key`, `value`, `sinks` and `scale`, through both results.
    Cost: that of the device's rows of `dot_product_attention`. `ring` moves each part
        of the keys once per device that sees it forward, and backward once more with
        its gradient in return; `all_to_all` moves queries, keys, values and outputs
        once each way. Kept for the backward pass: the arguments, the output and one
        number per row. On GPUs and TPUs a ring visits, in each of its steps, the blocks
        that some device has there; one that has none is idle.
    Source: "Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long
        Video Generation" shards heads; ring attention is that of the literature, here
        without the exchanges that the mask makes pointless.

    Example:
        >>> mesh = jax.sharding.Mesh(jax.devices()[:1], ("sequence",))
        >>> attend = softlib.attention.sequence_parallel_attention
        >>> local = lambda x: attend(x, x, x, axis_name="sequence")
        >>> spec = jax.sharding.PartitionSpec(None, "sequence")
        >>> f = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec)
        >>> print(f(jnp.ones((1, 4, 1, 2))).shape)
        (1, 4, 1, 2)
    """
    function = "sequence_parallel_attention"
    shapes = Shapes.of(function, query, key, value)
    checks.require_one_of(function, "method", method, ("ring", "all_to_all"))
    checks.require_one_of(function, "layout", layout, ("contiguous", "paired"))
    mask = masks.All() if mask is None else mask
    if not isinstance(mask, Mask):
        raise TypeError(
            f"{function}: `mask` must be a mask value or None, got "
            f"{type(mask).__name__}."
        )
    checks.require_floating(function, sinks=sinks)
    checks.require_shape(function, "sinks", sinks, (shapes.heads,), "one per head")
    if softcap is not None:
        checks.require_positive_number(function, "softcap", softcap)
    devices = lax.axis_size(axis_name)
    for name, length in (("query", shapes.query_length), ("key", shapes.key_length)):
        if length == 0 or (layout == "paired" and length % 2):
            raise ValueError(
                f"{function}: `{name}` must have a positive{' even' * (length > 0)} "
                f"length on each device in the layout {layout!r}, got {length}."
            )
    if method == "all_to_all":
        return _all_to_all(
            *(query, key, value, shapes, devices, axis_name, layout, return_lse),
            mask=mask,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            block_query=block_query,
            block_key=block_key,
            precision=precision,
            implementation=implementation,
        )
    ring = ring_of(
        mask,
        (shapes.query_length, shapes.key_length),
        devices,
        layout,
        (block_query, block_key),
        shapes.heads // shapes.key_heads,
    )
    query, key, value = shapes.flat(query, key, value)
    out_dtype = query.dtype
    query, scale = scaled(function, query, scale)
    options = Options(
        Softmax(),
        scale,
        softcap,
        precision,
        out_dtype,
        has_given_blocks=are_given(mask, block_query, block_key),
    )
    call = Call(implementation, options, ring, axis_name)
    arrays = match_varying((query, key, value, sinks, mask))
    out, lse = _ring_attention(call, *arrays)
    out = shapes.unflat(out)
    return AttentionResult(out, shapes.unflat(lse)) if return_lse else out


@dataclasses.dataclass(frozen=True)
class Call:
    """The static options of ring attention."""

    names: Implementations
    options: Options
    ring: Ring
    axis_name: str


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring_attention(
    call: Call, query: Array, key: Array, value: Array, sinks: Array | None, mask: Mask
) -> tuple[Array, Array]:
    return _ring_forward(call, query, key, value, sinks, mask)[0]


def _ring_forward(
    call: Call, query: Array, key: Array, value: Array, sinks: Array | None, mask: Mask
):
    dtype = accumulator_dtype(query, key, value, sinks)
    partials = dataclasses.replace(call.options, out_dtype=dtype)
    held, result = (key, value), None
    for i, step in enumerate(call.ring.steps):
        held = _moved(call, i, held, (key, value))
        plan = call.ring.plan(i, mask, call.axis_name)
        own_sinks = sinks if step.shift == 0 else None  # counted once
        operands = Operands(query, held[0], held[1], plan, sinks=own_sinks)
        run = functools.partial(
            _dispatch.run,
            operations.ATTENTION,
            call.names,
            partials,
            match_varying(operands),
        )
        nothing = Result(
            jnp.zeros((*query.shape[:-1], value.shape[-1]), dtype),
            jnp.full(query.shape[:-1], -jnp.inf, accumulator_dtype(query, key, value)),
        )
        found = _unless_idle(call, i, run, match_varying(nothing, query, *held))
        new = (found.out, found.normalizer)
        if result is not None:
            both = zip(result, new, strict=True)
            new = merge(*(jnp.stack(pair) for pair in both))
        result = new
    assert result is not None
    out, lse = result
    out = out.astype(call.options.out_dtype)
    return (out, lse), (query, key, value, sinks, mask, out, lse)


def _ring_backward(call: Call, residuals: tuple[Any, ...], cotangents: tuple[Any, ...]):
    query, key, value, sinks, mask, out, lse = residuals
    dtype = accumulator_dtype(query, key, value, sinks)
    options = dataclasses.replace(call.options, wide_gradients=True)
    zeros = lambda x: jnp.zeros(x.shape, dtype)
    # Sinks take part in the first step only, in which no device is idle.
    empty = lambda x: jnp.zeros(x.shape, accumulator_dtype(query, key, value))
    total = match_varying(tuple(map(zeros, (query, key, value))), query)
    sinks_total, held = None, (key, value)
    for i, step in enumerate(call.ring.steps):
        held = _moved(call, i, held, (key, value))
        plan = call.ring.plan(i, mask, call.axis_name)
        own_sinks = sinks if step.shift == 0 else None  # counted once
        operands = Operands(query, held[0], held[1], plan, sinks=own_sinks)
        given = BackwardOperands(operands, out, lse, *cotangents)
        run = functools.partial(
            _dispatch.run,
            operations.ATTENTION_GRADIENT,
            call.names,
            options,
            match_varying(given),
        )
        nothing = Gradient(empty(query), empty(key), empty(value), None, None, ())
        found: Gradient = _unless_idle(call, i, run, match_varying(nothing, query))
        if step.shift == 0:
            sinks_total = found.sinks
            if sinks is not None:
                assert sinks_total is not None
                sinks_total = sinks_total.astype(sinks.dtype)
        # Sent directly to the owner, which adds in the order of the steps.
        home = [(d, (d - step.shift) % call.ring.devices) for _, d in step.moves]
        returned = (found.key, found.value)
        if step.shift:
            returned = lax.ppermute(returned, call.axis_name, home)
        new = (found.query, *returned)
        total = tuple(x + y for x, y in zip(total, new, strict=True))
    narrow = (query, key, value)
    gradients = (x.astype(y.dtype) for x, y in zip(total, narrow, strict=True))
    return (*gradients, sinks_total, None)


_ring_attention.defvjp(_ring_forward, _ring_backward)


def _unless_idle(call: Call, i: int, run: Callable[[], Any], nothing: Any) -> Any:
    """The result of a step, or `nothing` on devices whose mask leaves them no block."""
    works = call.ring.works(i)
    if works.all():
        return run()
    mine = jnp.asarray(works)[lax.axis_index(call.axis_name)]
    return lax.cond(mine, run, lambda: nothing)


def _moved(call: Call, i: int, held: Any, own: Any) -> Any:
    step = call.ring.steps[i]
    if step.shift == 0:
        return own
    source = held if step.relay else own
    return lax.ppermute(source, call.axis_name, step.moves)


def _all_to_all(
    query: Array,
    key: Array,
    value: Array,
    shapes: Shapes,
    devices: int,
    axis_name: str,
    layout: Layout,
    return_lse: bool,
    *,
    sinks: Array | None,
    **options: Any,
) -> Array | AttentionResult:
    function = "sequence_parallel_attention"
    if shapes.heads % devices:
        raise ValueError(
            f"{function}: `query` must have a multiple of {devices} heads for "
            f"method='all_to_all' on {devices} devices, got {shapes.heads}."
        )
    if shapes.key_heads % devices:
        if devices % shapes.key_heads:
            raise ValueError(
                f"{function}: `key` must have a multiple or a divisor of {devices} "
                f"heads for method='all_to_all', got {shapes.key_heads}."
            )
        # Every device needs a key head of its own.
        again = devices // shapes.key_heads
        key, value = (jnp.repeat(x, again, axis=-2) for x in (key, value))
    count = len(shapes.batch)
    positions = [
        sequence_order(length * devices, devices, layout=layout)
        for length in (shapes.query_length, shapes.key_length)
    ]

    def gathered(x: Array, order: np.ndarray) -> Array:
        x = lax.all_to_all(x, axis_name, count + 1, count, tiled=True)
        return x if layout == "contiguous" else jnp.take(x, np.argsort(order), count)

    def divided(x: Array) -> Array:
        if layout != "contiguous":
            x = jnp.take(x, positions[0], count)
        return lax.all_to_all(x, axis_name, count, count + 1, tiled=True)

    if sinks is not None:
        heads = shapes.heads // devices
        sinks = lax.dynamic_slice_in_dim(
            sinks, lax.axis_index(axis_name) * heads, heads
        )
    found = dot_product_attention(
        gathered(query, positions[0]),
        gathered(key, positions[1]),
        gathered(value, positions[1]),
        sinks=sinks,
        return_lse=True,
        **options,
    )
    found = AttentionResult(*map(divided, found))
    return found if return_lse else found.output
