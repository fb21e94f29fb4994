"""Block-sparse attention for Hopper: the forward pass.

One block of threads computes 128 queries of a head. Two warpgroups multiply, 64 queries
each; a third only copies: it prefetches the listed tiles of keys and values into a ring
in shared memory. Other tiles are never read. Weights go from the registers of the first
product into the second.

Lists and masks: `attention_lists`, `attention_scores`. Arrays stay in the layout
(batch, length, heads, features): a copy takes one head out of it.

Shared memory: the queries, `stages` tiles of keys and of values, and the output if it
does not fit into the memory of the queries, of a float32 output a few columns.
Registers per thread: E / 2 for the output and `keys` / 2 for scores.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._attention_extras import NOTHING, Extras
from pallas_kernels._results import result

from . import attention_ring as ring
from .attention_extras import Layout, Reader, operands_of, parts_of
from .attention_lists import Lists
from .attention_ring import Channel, Walk
from .attention_scores import LN2, LOG2E, Axis, Excluding, Form, across
from .attention_tiles import ROWS, TILE, WARPGROUPS, Tiles


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lists: Lists,
    *,
    form: Form,
    tiles: Tiles,
    out_dtype: Any,
    sinks: jax.Array | None = None,
    mask_scalars: jax.Array | None = None,
    extras: Extras = NOTHING,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention over listed tiles, and the log of the sum of the weights.

    Args:
        query: (B, T, N, H), bfloat16 or float16, T a multiple of 8, H of 64.
        key: (B, S, K, H); query head n reads key head n // (N // K).
        value: (B, S, K, E), E a multiple of 64.
        lists: Lists of tiles of `tiles.keys` keys for each tile of 128 queries. If the
            last tile of keys is not full, it is listed as masked.
        form: Options of scores and weights.
        tiles: Sizes.
        out_dtype: That of `query`, or float32.
        sinks: (N,) float32: one more score per head, without a value; only for weights
            `softmax`.
        mask_scalars: (B, n) int32: further arguments of `form.mask`.
        extras: A boolean array, a bias, and arguments of `form.mask` per position.
        interpret: As in `plgpu.kernel`.

    Returns:
        The output, (B, T, N, E), 0 in rows without weights, and the normalizer,
        float32, (B, N, T): the log-sum in nats (-inf or the sink in rows without
        weights), or the sum if weights are not relative.
    """
    batch, length, heads, features = query.shape
    value_features = value.shape[-1]
    given = [x for x in (sinks, *operands_of(extras), mask_scalars) if x is not None]
    operands = (query, key, value, *lists, *given)
    layout = Layout(parts_of(extras), tiles.keys, tiles.stages)
    is_wide = out_dtype != query.dtype
    scratch: dict[str, Any] = {
        "q": ring.swizzled((WARPGROUPS, ROWS, features), query.dtype),
        "k": ring.swizzled((tiles.stages, tiles.keys, features), query.dtype),
        "v": ring.swizzled((tiles.stages, tiles.keys, value_features), value.dtype),
        "out": ring.swizzled((WARPGROUPS, ROWS, value_features), query.dtype)
        if features != value_features and not is_wide
        else None,
        "wide": ring.wide(is_wide),
        "lse": plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
        "staging": ring.staging(tiles.keys, value.dtype, interpret),
        "q_ready": plgpu.Barrier(num_barriers=WARPGROUPS),
        "k_ready": plgpu.Barrier(num_barriers=tiles.stages),
        "v_ready": plgpu.Barrier(num_barriers=tiles.stages),
        "k_free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=tiles.stages),
        "v_free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=tiles.stages),
        **layout.scratch(),
    }
    return plgpu.kernel(
        functools.partial(
            _forward_kernel,
            form=form,
            layout=layout,
            has_sinks=sinks is not None,
        ),
        out_type=(
            result((batch, length, heads, value_features), out_dtype, *operands),
            result((batch, heads, length), jnp.float32, *operands),
        ),
        scratch_types=scratch,
        # The tiles of one head run concurrently and share its keys in the cache.
        grid=(lists.tiles.shape[0], heads, batch),
        grid_names=("tile", "head", "batch"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name="block_sparse_attention",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(*operands)


def _forward_kernel(
    *refs, form, layout, has_sinks, q, k, v, out, wide, lse, staging, extras, **barriers
):
    query_ref, key_ref, value_ref, others_ref, tiles_ref, *rest = refs
    sinks_ref = rest.pop(0) if has_sinks else None
    extras_refs, (*scalars_refs, out_ref, lse_ref) = layout.split(rest)
    at, head, batch = (lax.axis_index(name) for name in ("tile", "head", "batch"))
    warpgroup = lax.axis_index("warpgroup")
    walk = Walk(others_ref, tiles_ref, at)
    keys = Channel((k,), barriers["k_ready"], barriers["k_free"])
    values = Channel((v,), barriers["v_ready"], barriers["v_free"])
    reader = Reader.of(layout, extras_refs, batch, extras, barriers)
    size, last = k.shape[1], form.last(key_ref.shape[1], k.shape[1])

    @pl.when(warpgroup == WARPGROUPS)
    def _():
        key_head = lax.div(head, query_ref.shape[2] // key_ref.shape[2])
        fills = (keys, key_ref), (values, value_ref)
        more = lambda step, tile: reader.fill(step, walk, tile, head)
        ring.feed_keys(walk, fills, (batch, key_head), size, more)
        reader.close()

    @pl.when(warpgroup < WARPGROUPS)
    def _():
        plgpu.set_max_registers(ring.COMPUTE_REGISTERS, action="increase")
        keys.open()
        values.open()
        reader.open()
        first = walk.tile * TILE + warpgroup * ROWS
        own = pl.ds(first, ROWS)
        staged = None if staging is None else staging.at[warpgroup]
        ready = barriers["q_ready"].at[warpgroup]
        plgpu.copy_gmem_to_smem(query_ref.at[batch, own, head], q.at[warpgroup], ready)
        plgpu.barrier_wait(ready)

        def step(partial, at, carry):
            total, top, weight = carry
            (slot,) = keys.wait(at)
            queries = q.at[ring.anew(warpgroup)]
            raw = ring.product(queries, ring.transposed(slot), size)
            keys.release(at)

            one_by_one = partial or not form.is_plain or layout.parts
            in_parts = ring.by_columns if one_by_one else ring.at_once
            beside = reader.wait(at, warpgroup, head)

            def scores(columns, raw):
                def given():
                    key = Axis(1, walk.other(at) * size + columns.start)
                    scalars = ring.scalars(scalars_refs, batch)
                    return Excluding(Axis(0, first), key, last, scalars)

                found = beside.scores(form, columns, raw, given if partial else None)
                return (found.bits,)

            (bits,) = in_parts(scores, raw)
            reader.release(at)
            if form.is_relative:
                before, top = top, form.top(bits, top)
                shift = _finite(top)
                weights = lambda _, bits: (
                    form.relative(bits, across(shift, bits.shape)),
                )
                (p,) = in_parts(weights, bits)
                decay = jnp.exp2(before - shift)
                weight = weight * decay + p.sum(1)
                total = total * across(decay, total.shape)
            else:
                (p,) = ring.by_columns(lambda _, bits: form.absolute(bits)[:1], bits)
                weight = weight + p.sum(1)
            (slot,) = values.wait(at)
            p = ring.operand(p.astype(value_ref.dtype), staged)
            total = ring.added(total, p, slot, staged)
            values.release(at)
            return total, top, weight

        top = jnp.full((ROWS,), -jnp.inf, jnp.float32)
        weight = jnp.zeros((ROWS,), jnp.float32)
        if sinks_ref is not None:
            sink = sinks_ref[head] * LOG2E
            top = jnp.full((ROWS,), sink)
            weight = jnp.full((ROWS,), jnp.where(sink == -jnp.inf, 0.0, 1.0))
        carry = ring.zeros(v.shape[2]), ring.per_row(top), ring.per_row(weight)
        total, top, weight = walk.fold(step, carry)

        empty = weight == 0
        divisor = jnp.where(empty, 1.0, weight)
        inverse = jnp.where(empty, 0.0, 1 / divisor)
        if form.is_relative:
            bits = _finite(top) + jnp.log2(divisor)
            weight = jnp.where(empty, -jnp.inf, bits * LN2)
        lse[warpgroup] = weight
        total = total * across(inverse, total.shape)
        tile, target = q if out is None else out, out_ref.at[batch, own, head]
        ring.store_result(total, tile, wide, warpgroup, target)
        plgpu.copy_smem_to_gmem(lse.at[warpgroup], lse_ref.at[batch, head, own])
        plgpu.wait_smem_to_gmem(0)


def _finite(top: Any) -> Any:
    """The maximum, 0 for rows that have seen nothing: -inf - -inf is NaN."""
    return jnp.where(top == -jnp.inf, 0.0, top)
