r"""Attention to pairs of keys for Hopper: the gradients of one key axis.

A block of threads owns 64 keys of an axis, here the second one, and streams the tiles
of 64 queries that attend to them. Scores are transposed, keys by queries, so that they
are left operands. For each tile and one key j of the other axis,

    A = a q * k1_j,  G = g * v1_j     (64, H) and (64, E), in shared memory
    Z = K2 A^T,      D = V2 G^T - delta
    dV2 = dV2 + P G, dK2 = dK2 + dZ A

so that both results are sums of products (four in all). For the other key axis the
kernel runs again, with the axes exchanged. The two warpgroups divide the keys j; each
has its own A and G.

Formulas: `trilinear_gradient`. Shared memory: what the block owns, a ring of queries
and their cotangents, A and G twice, and sums.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._results import result

from . import attention_ring as ring, trilinear_common as common
from .attention_ring import Channel
from .attention_scores import LN2, LOG2E, Axis, across
from .attention_tiles import ROWS, WARPGROUPS
from .trilinear_common import Form, Pair, Walk
from .trilinear_lists import Runs
from .trilinear_tiles import PAIR


def key_gradients(
    query: jax.Array,
    first: Pair,
    second: Pair,
    cotangent: jax.Array,
    norm: jax.Array,
    delta: jax.Array,
    runs: Runs,
    *,
    form: Form,
    interpret: Any = None,
) -> Pair:
    """The cotangents of keys and values of the second axis.

    Args:
        query: As in `trilinear_gradient.query_gradient`, like all others but `runs`.
        first: See `query`.
        second: See `query`.
        cotangent: See `query`.
        norm: See `query`.
        delta: See `query`.
        runs: Runs of tiles of 64 keys of the second axis.
        form: See `query`; tiles of the second axis have 64 keys.
        interpret: See `query`.

    Returns:
        In the shapes and dtypes of `second`; 0 for keys that no query attends to.
    """
    tiles, dtype = form.tiles, query.dtype
    batch, _, heads, features = second[0].shape
    value_features, stages = second[1].shape[-1], tiles.stages
    operands = (query, *first, *second, cotangent, norm, delta, *runs)
    per_row = plgpu.SMEM((stages, ROWS), jnp.float32)
    scratch: dict[str, Any] = {
        # The first axis is for an index that the compiler does not know.
        "k2": ring.swizzled((1, ROWS, features), dtype),
        "v2": ring.swizzled((1, ROWS, value_features), dtype),
        "q": ring.swizzled((stages, ROWS, features), dtype),
        "do": ring.swizzled((stages, ROWS, value_features), dtype),
        "norms": per_row,
        "deltas": per_row,
        **common.pair_scratch((features, value_features), dtype),
        "spread_q": ring.swizzled((WARPGROUPS, ROWS, features), dtype),
        "spread_do": ring.swizzled((WARPGROUPS, ROWS, value_features), dtype),
        **common.sums_scratch(max(features, value_features)),
        "staged_weights": ring.staging(ROWS, dtype, interpret),
        "owned": plgpu.Barrier(num_arrivals=2),
        "ready": plgpu.Barrier(num_arrivals=2 * tiles.groups + 2, num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
    }
    dk, dv = plgpu.kernel(
        functools.partial(_key_kernel, form=form),
        out_type=tuple(result(x.shape, dtype, *operands) for x in second),
        scratch_types=scratch,
        grid=(runs.tiles.shape[0], heads, batch),
        grid_names=("tile", "head", "batch"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name="trilinear_attention_key_gradient",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(*operands)
    return dk, dv


def _key_kernel(*refs, form, **scratch):
    query_ref, k1_ref, v1_ref, k2_ref, v2_ref, cotangent_ref, *rest = refs
    norm_ref, delta_ref, *lists, dk_ref, dv_ref = rest
    at, key_head, batch = (lax.axis_index(name) for name in ("tile", "head", "batch"))
    warpgroup = lax.axis_index("warpgroup")
    tiles, walk = form.tiles, Walk(Runs(*lists), at)
    names = "q", "do", "norms", "deltas"
    queries = Channel(
        tuple(scratch[name] for name in names), scratch["ready"], scratch["free"]
    )
    pairs = common.pairs(scratch)
    k2, v2 = scratch["k2"].at[0], scratch["v2"].at[0]
    rounds = query_ref.shape[2] // k2_ref.shape[2] // tiles.groups
    # Computed just before it is used, to save registers.
    own = lambda: (batch, pl.ds(walk.tile * ROWS, ROWS), key_head)

    @pl.when(warpgroup == WARPGROUPS)
    def _():
        plgpu.set_max_registers(common.MEMORY_REGISTERS, action="decrease")
        plgpu.copy_gmem_to_smem(k2_ref.at[own()], k2, scratch["owned"])
        plgpu.copy_gmem_to_smem(v2_ref.at[own()], v2, scratch["owned"])

        def stream(number, turn, tile):
            (q, do, norm, delta), ready = queries.vacated(number)
            own_head = key_head * rounds + turn
            own_rows = batch, own_head, tile
            origin = batch, tile * tiles.queries, own_head * tiles.groups
            for source, slot in (
                *common.copies(query_ref, q, tiles, origin),
                *common.copies(cotangent_ref, do, tiles, origin),
                (norm_ref.at[own_rows], norm),
                (delta_ref.at[own_rows], delta),
            ):
                plgpu.copy_gmem_to_smem(source, slot, ready)

        fetch = common.fetching(pairs, (k1_ref, v1_ref), (batch, key_head))
        common.feed(walk, stream, pairs, fetch, rounds=rounds)
        queries.close()
        pairs.close()

    @pl.when(warpgroup < WARPGROUPS)
    def _():
        plgpu.set_max_registers(common.COMPUTE_REGISTERS, action="increase")
        queries.open()
        pairs.open()
        plgpu.barrier_wait(scratch["owned"])
        (weights,) = common.staged(scratch, warpgroup, "weights")

        def run(turn, partial, number, totals):
            visit = turn * walk.count + number
            queries.wait(visit)

            def step(at, totals):
                dk, dv = totals
                now = turn * walk.steps + at
                # Opaque, so that no value derived from them is kept across the loop.
                own, query, tile = (
                    ring.anew(x) for x in (warpgroup, walk.streamed(number), walk.tile)
                )
                query = query * tiles.queries
                q, do, norm, delta = queries.filled(visit)
                a, g = (scratch[name].at[own] for name in ("spread_q", "spread_do"))
                key = walk.pair(at) * PAIR + own
                keys, values = (slot.at[own] for slot in pairs.wait(now))
                common.spread_into(a, q, keys, form.scale * LOG2E)
                common.spread_into(g, do, values)
                common.leave(pairs, now)
                whole = ring.anew(0)
                left_k, left_v = (scratch[name].at[whole] for name in ("k2", "v2"))
                raw = ring.product(left_k, ring.transposed(a), ROWS)

                def weigh(columns, bits):
                    first, size = columns.start, columns.size
                    if partial:
                        along, second = Axis(1, query), Axis(0, tile * ROWS)
                        bits = form.selected(bits, along, key, second, first)
                    norms = ring.per_column(norm, columns)
                    ok = form.attending(query, key, 1, size, first)
                    norms = norms if ok is None else jnp.where(ok, norms, jnp.inf)
                    return (common.normalised(bits, across(norms, bits.shape, 1)),)

                (p,) = ring.by_columns(weigh, raw, 16)
                rounded = ring.operand(p.astype(v2.dtype), weights)
                dv = ring.added(dv, rounded, g, weights)
                dp = across(-ring.per_column(delta, pl.ds(0, ROWS)), p.shape, 1)
                dp = ring.added(dp, left_v, ring.transposed(g), weights)
                dz = ring.operand((p * dp).astype(k2.dtype), weights)
                return ring.added(dk, dz, a, weights), dv

            totals = lax.fori_loop(*walk.span(number), step, totals)
            common.leave(queries, visit)
            return totals

        def round_(turn, totals):
            return walk.fold(functools.partial(run, turn), totals)

        totals = ring.zeros(k2.shape[1]), ring.zeros(v2.shape[1])
        dk, dv = (
            round_(0, totals)
            if rounds == 1
            else lax.fori_loop(0, rounds, round_, totals)
        )
        # A held the scale, in bits.
        into_dk = lambda total: ring.store(total, k2, dk_ref.at[own()])
        into_dv = lambda total: ring.store(total, v2, dv_ref.at[own()])
        common.summed(dk * LN2, scratch, warpgroup, into_dk)
        common.summed(dv, scratch, warpgroup, into_dv)
        plgpu.wait_smem_to_gmem(0)
