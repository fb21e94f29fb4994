r"""Block-sparse attention for Hopper: the gradients of keys and values.

A block of threads has 128 keys of a key head and visits the queries that attend to
them, query head by query head: so both results are sums in registers, in a fixed order,
that are written once. Scores are transposed, keys by queries, so that they are the left
operands of the products. Formulas: `attention_backward`.

If registers do not hold both results the kernel runs twice, for one result each.
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
from .attention_backward import kept
from .attention_extras import Layout, Reader, operands_of, parts_of
from .attention_lists import Lists
from .attention_ring import Channel, Walk
from .attention_scores import Axis, Excluding, Form, across
from .attention_tiles import ROWS, TILE, WARPGROUPS, BackwardTiles


def key_gradients(
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
) -> tuple[jax.Array, jax.Array]:
    """The gradients of keys and values, dK and dV.

    Args:
        query: As in `query_gradient`, like all others but `lists`.
        key: See `query`.
        value: See `query`.
        cotangent: See `query`.
        norm: See `query`.
        delta: See `query`.
        lists: Lists of tiles of `tiles.queries` queries for each tile of 128 keys.
        form: See `query`.
        tiles: See `query`.
        is_wide: Whether the results are float32.
        mask_scalars: See `query`.
        extras: See `query`.
        interpret: See `query`.

    Returns:
        In the shapes and dtypes of `key` and `value`, or float32; 0 for keys that no
        query reads.
    """
    arrays = (query, key, value, cotangent, norm, delta, lists, mask_scalars, extras)
    call = functools.partial(_call, *arrays, form, tiles, is_wide, interpret)
    crowded = form.is_heavy and key.shape[-1] + value.shape[-1] > 192
    if tiles.together and not crowded:
        dk, dv = call("attention_key_gradients", (True, True))
    else:
        (dk,) = call("attention_key_gradient", (True, False))
        (dv,) = call("attention_value_gradient", (False, True))
    return dk, dv


def _call(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    cotangent: jax.Array,
    norm: jax.Array,
    delta: jax.Array,
    lists: Lists,
    mask_scalars: jax.Array | None,
    extras: Extras,
    form: Form,
    tiles: BackwardTiles,
    is_wide: bool,
    interpret: Any,
    name: str,
    wanted: tuple[bool, bool],
) -> Any:
    """Computes the wanted gradients of dK and dV."""
    batch, _, key_heads, features = key.shape
    value_features, stages = value.shape[-1], tiles.stages
    given = [x for x in (*operands_of(extras), mask_scalars) if x is not None]
    operands = (query, key, value, cotangent, norm, delta, *lists, *given)
    layout = Layout(parts_of(extras), tiles.queries, stages, is_transposed=True)
    per_query = plgpu.SMEM((stages, tiles.queries), jnp.float32)
    scratch: dict[str, Any] = {
        "k": ring.swizzled((WARPGROUPS, ROWS, features), key.dtype),
        "q": ring.swizzled((stages, tiles.queries, features), query.dtype),
        "do": ring.swizzled((stages, tiles.queries, value_features), query.dtype),
        "norms": per_query,
        "v": ring.swizzled((WARPGROUPS, ROWS, value_features), value.dtype),
        "deltas": per_query,
        "wide": ring.wide(is_wide),
        "staging": ring.staging(tiles.queries, query.dtype, interpret),
        "owned": plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS),
        "ready": plgpu.Barrier(num_arrivals=4, num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
        **layout.scratch(),
    }
    wants = [x for x, is_wanted in zip((key, value), wanted, strict=True) if is_wanted]
    return plgpu.kernel(
        functools.partial(_key_kernel, form=form, layout=layout, wanted=wanted),
        out_type=tuple(
            result(x.shape, jnp.float32 if is_wide else x.dtype, *operands)
            for x in wants
        ),
        scratch_types=scratch,
        grid=(lists.tiles.shape[0], key_heads, batch),
        grid_names=("tile", "head", "batch"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(*operands)


def _key_kernel(
    *refs,
    form,
    layout,
    wanted,
    k,
    v,
    q,
    do,
    norms,
    deltas,
    wide,
    staging,
    extras,
    **barriers,
):
    *arrays, others_ref, tiles_ref = refs[:8]
    query_ref, key_ref, value_ref, cotangent_ref, norm_ref, delta_ref = arrays
    wants_key, wants_value = wanted
    extras_refs, rest = layout.split(refs[8:])
    dv_ref: Any = rest.pop() if wants_value else None
    dk_ref: Any = rest.pop() if wants_key else None
    scalars_refs, dtype = rest, query_ref.dtype
    results = (wants_key * k.shape[2], wants_value * v.shape[2])
    at, key_head, batch = (lax.axis_index(name) for name in ("tile", "head", "batch"))
    warpgroup = lax.axis_index("warpgroup")
    queries = Channel((q, norms, do, deltas), barriers["ready"], barriers["free"])
    reader = Reader.of(layout, extras_refs, batch, extras, barriers)
    size, groups = q.shape[1], query_ref.shape[2] // key_ref.shape[2]

    @pl.when(warpgroup == WARPGROUPS)
    def _():
        plgpu.set_max_registers(ring.MEMORY_REGISTERS, action="decrease")
        walk = Walk(others_ref, tiles_ref, at)

        def fill(step, group, tile):
            some, head = pl.ds(tile * size, size), key_head * groups + group
            tiled, flat = (batch, some, head), (batch, head, some)
            queries.fill(
                step,
                query_ref.at[tiled],
                norm_ref.at[flat],
                cotangent_ref.at[tiled],
                delta_ref.at[flat],
            )
            reader.fill(step, walk, tile, head)

        ring.feed(walk, fill, rounds=groups)
        queries.close()
        reader.close()

    @pl.when(warpgroup < WARPGROUPS)
    def _():
        plgpu.set_max_registers(ring.COMPUTE_REGISTERS, action="increase")
        queries.open()
        reader.open()
        walk = Walk(others_ref, tiles_ref, at)
        # Computed just before it is used, to save registers.
        first = lambda: walk.tile * TILE + warpgroup * ROWS
        own = lambda: (batch, pl.ds(first(), ROWS), key_head)
        staged = None if staging is None else staging.at[warpgroup]
        barrier = barriers["owned"].at[warpgroup]
        plgpu.copy_gmem_to_smem(key_ref.at[own()], k.at[warpgroup], barrier)
        plgpu.copy_gmem_to_smem(value_ref.at[own()], v.at[warpgroup], barrier)
        plgpu.barrier_wait(barrier)

        def step(group, before, partial, at, totals):
            dk, dv = totals
            now = before + at
            query, norm, given, delta = queries.wait(now)
            own_slot = ring.anew(warpgroup)
            raw = ring.product(k.at[own_slot], ring.transposed(query), size)
            start = walk.other(at) * size if partial else None
            own_first = walk.tile * TILE + own_slot * ROWS

            beside = reader.wait(now, own_slot, key_head * groups + group)

            def weights(columns, raw):
                def given():
                    # Results of padded keys are not written.
                    along, own = Axis(1, start + columns.start), Axis(0, own_first)
                    scalars = ring.scalars(scalars_refs, batch)
                    return Excluding(along, own, None, scalars)

                found = beside.scores(form, columns, raw, given if partial else None)
                norms = across(ring.per_column(norm, columns), raw.shape, 1)
                p, slope = form.normalised(found.bits, norms, found.capped)
                p, slope = p.astype(dtype), kept(slope, form, *results)
                return (p,) * wants_value + (slope,) * wants_key

            found = ring.by_columns(weights, raw, 32 if form.is_plain else 16)
            reader.release(now)
            p, slope = found[0], found[-1]  # if it is wanted
            if dv is not None:
                p = ring.operand(p, staged)
                dv = ring.added(dv, p, given, staged)
            if dk is not None:
                answer = across(-ring.per_column(delta, pl.ds(0, size)), raw.shape, 1)
                left = v.at[own_slot]
                answer = ring.added(answer, left, ring.transposed(given), staged)
                dz = (slope.astype(jnp.float32) * answer).astype(dtype)
                dk = ring.added(dk, ring.operand(dz, staged), query, staged)
            queries.release(now)
            return dk, dv

        def head(group, totals):
            before = group * walk.count
            return walk.fold(functools.partial(step, group, before), totals)

        totals = (
            ring.zeros(k.shape[2]) if wants_key else None,
            ring.zeros(v.shape[2]) if wants_value else None,
        )
        dk, dv = (
            head(0, totals) if groups == 1 else lax.fori_loop(0, groups, head, totals)
        )
        if dk is not None:
            ring.store_result(dk * form.scale, k, wide, warpgroup, dk_ref.at[own()])
        if dv is not None:
            ring.store_result(dv, v, wide, warpgroup, dv_ref.at[own()])
        plgpu.wait_smem_to_gmem(0)
