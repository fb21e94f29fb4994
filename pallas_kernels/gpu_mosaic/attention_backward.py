r"""Block-sparse attention for Hopper: formulas of the backward pass, and dQ.

With p the weights over the sum of their row, w their slopes, dp = dO V^T:

    dZ = w (dp - delta),    dQ = dZ K,    dK = dZ^T Q,    dV = p^T dO

Weights are recomputed from the log-sum of each row. In the kernel of dQ a block of
threads has 128 queries and visits the keys that they attend to, like the forward pass.
dK and dV: `attention_key_gradients`. A single kernel would take five products but
atomics; two kernels take seven.

Shared memory: the block's own tile, which the results replace at the end, and a ring
of visited tiles. Registers per thread: half the features of the results, and half a
tile each for scores and dp.
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
from .attention_scores import Axis, Excluding, Form, across
from .attention_tiles import ROWS, TILE, WARPGROUPS, BackwardTiles


def kept(slope: Any, form: Form, *results: int) -> Any:
    """Slopes in the form in which registers keep them until their product.

    Where registers are short they are rounded to the dtype of dZ, which halves them.
    """
    sums, widest = sum(results) // 2, max(results)
    crowded = sums > 96 and (widest > 192 or not form.is_plain)
    return slope.astype(jnp.bfloat16) if crowded else slope


def query_gradient(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    cotangent: jax.Array,
    norm: jax.Array,
    delta: jax.Array,
    lists: Lists,
    *,
    form: Form,
    tiles: BackwardTiles,
    is_wide: bool,
    mask_scalars: jax.Array | None = None,
    extras: Extras = NOTHING,
    interpret: Any = None,
) -> jax.Array:
    """The gradient of the queries, dQ.

    Args:
        query: As in `attention`, like `key`, `value`, `form` and `interpret`.
        key: See `query`.
        value: See `query`.
        cotangent: dO, (B, T, N, E), in the dtype of `query`.
        norm: (B, N, T), float32: log-sums in bits, inf for an empty row; the inverse of
            the sum, 0 for an empty row, if weights are not relative. With a bias it is
            as long as whole tiles of `tiles.queries`: rows behind T are empty.
        delta: <dO, out> minus the cotangent of the log-sum, float32, as long as `norm`.
        lists: Lists of tiles of `tiles.keys` keys for each tile of 128 queries.
        form: See `query`.
        tiles: Sizes.
        is_wide: Whether the result is float32.
        mask_scalars: As in `attention`.
        extras: As in `attention`.
        interpret: See `query`.

    Returns:
        dQ, in the shape and dtype of `query`, or float32.
    """
    batch, _, heads, features = query.shape
    value_features, stages = value.shape[-1], tiles.stages
    given = [x for x in (*operands_of(extras), mask_scalars) if x is not None]
    operands = (query, key, value, cotangent, norm, delta, *lists, *given)
    layout = Layout(parts_of(extras), tiles.keys, stages)
    return plgpu.kernel(
        functools.partial(_query_kernel, form=form, layout=layout),
        out_type=result(
            query.shape, jnp.float32 if is_wide else query.dtype, *operands
        ),
        scratch_types={
            "q": ring.swizzled((WARPGROUPS, ROWS, features), query.dtype),
            "do": ring.swizzled((WARPGROUPS, ROWS, value_features), query.dtype),
            "k": ring.swizzled((stages, tiles.keys, features), key.dtype),
            "v": ring.swizzled((stages, tiles.keys, value_features), value.dtype),
            "rows": plgpu.SMEM((2, WARPGROUPS, ROWS), jnp.float32),
            "wide": ring.wide(is_wide),
            "staging": ring.staging(tiles.keys, key.dtype, interpret),
            "owned": plgpu.Barrier(num_arrivals=4, num_barriers=WARPGROUPS),
            "k_ready": plgpu.Barrier(num_barriers=stages),
            "v_ready": plgpu.Barrier(num_barriers=stages),
            "k_free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
            "v_free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
            **layout.scratch(),
        },
        grid=(lists.tiles.shape[0], heads, batch),
        grid_names=("tile", "head", "batch"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name="attention_query_gradient",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(*operands)


def _query_kernel(
    *refs, form, layout, q, do, k, v, rows, wide, staging, owned, extras, **barriers
):
    *arrays, others_ref, tiles_ref = refs[:8]
    query_ref, key_ref, value_ref, cotangent_ref, norm_ref, delta_ref = arrays
    extras_refs, (*scalars_refs, dq_ref) = layout.split(refs[8:])
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
        own = (batch, pl.ds(first, ROWS), head)
        own_rows = (batch, head, pl.ds(first, ROWS))
        staged = None if staging is None else staging.at[warpgroup]
        barrier = owned.at[warpgroup]
        plgpu.copy_gmem_to_smem(query_ref.at[own], q.at[warpgroup], barrier)
        plgpu.copy_gmem_to_smem(cotangent_ref.at[own], do.at[warpgroup], barrier)
        plgpu.copy_gmem_to_smem(norm_ref.at[own_rows], rows.at[0, warpgroup], barrier)
        plgpu.copy_gmem_to_smem(delta_ref.at[own_rows], rows.at[1, warpgroup], barrier)
        plgpu.barrier_wait(barrier)
        norm, delta = (
            plgpu.load(rows.at[i, warpgroup], layout=plgpu.Layout.WGMMA.reduce(1))
            for i in range(2)
        )

        def step(partial, at, total):
            (slot,) = keys.wait(at)
            own_slot = ring.anew(warpgroup)
            raw = ring.product(q.at[own_slot], ring.transposed(slot), size)

            beside = reader.wait(at, own_slot, head)

            def weights(columns, raw):
                def given():
                    key = Axis(1, walk.other(at) * size + columns.start)
                    scalars = ring.scalars(scalars_refs, batch)
                    return Excluding(Axis(0, first), key, last, scalars)

                found = beside.scores(form, columns, raw, given if partial else None)
                norms = across(norm, raw.shape)
                _, slope = form.normalised(found.bits, norms, found.capped)
                return (kept(slope, form, k.shape[2]),)

            (slope,) = ring.by_columns(weights, raw)
            reader.release(at)
            answer = across(-delta, slope.shape)
            (given,) = values.wait(at)
            answer = ring.added(answer, do.at[own_slot], ring.transposed(given), staged)
            values.release(at)
            dz = slope.astype(jnp.float32) * answer
            dz = ring.operand(dz.astype(key_ref.dtype), staged)
            total = ring.added(total, dz, slot, staged)
            keys.release(at)
            return total

        total = walk.fold(step, ring.zeros(k.shape[2]))
        ring.store_result(total * form.scale, q, wide, warpgroup, dq_ref.at[own])
        plgpu.wait_smem_to_gmem(0)
