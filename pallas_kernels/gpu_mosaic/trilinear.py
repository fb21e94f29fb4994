r"""Attention to pairs of keys, one per axis, for Hopper: forward.

$z_{ijl} = a \sum_c q_{ic} k^1_{jc} k^2_{lc}$, one softmax per query over all pairs
$(j, l)$, $\mathrm{out}_i = \sum_{jl} p_{ijl}\, v^1_j \odot v^2_l$.

A block of threads has 64 rows, queries of one key head, and streams tiles of the second
axis. For each tile, two warpgroups visit the keys of the first axis listed for it, each
its own: for one key j

    A = a q * k1_j    (64, H), formed in float32, rounded once, in registers
    Z = A K2^T        (64, keys), 2^(Z - top) = P
    total = total + v1_j * (P V2)

with a maximum and a sum per row and warpgroup, which are merged at the end. A third
warpgroup copies; tiles that are not listed are never read. Lists, masks and common
code: `trilinear_lists`, `trilinear_common`.

Shared memory: the queries, a ring of tiles of the second axis, eight pairs of keys of
the first, and the sums of one warpgroup. Registers per thread: half a row of the
output, of P V2 and of scores.
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


def forward(
    query: jax.Array,
    first: Pair,
    second: Pair,
    runs: Runs,
    *,
    form: Form,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Output and logsumexp of attention over the pairs that runs and masks leave.

    Args:
        query: (B, T, N, H), bfloat16 or float16, T a multiple of 8, H of 64; query head
            n reads key head n // (N // K).
        first: Keys (B, S1, K, H) and values (B, S1, K, E) of the first axis, S1 a
            multiple of 8, E of 64.
        second: Keys and values of the second axis.
        runs: Runs of tiles of queries.
        form: Masks, scale and sizes.
        interpret: As in `plgpu.kernel`.

    Returns:
        (B, T, N, E) in the dtype of `query`, 0 in rows without a pair, and the
        logsumexp, float32, in the layout of `rows_of`: -inf for such a row.
    """
    tiles, dtype = form.tiles, query.dtype
    batch, length, heads, features = query.shape
    value_features = second[1].shape[-1]
    operands = (query, *first, *second, *runs)
    # Tiles of query heads, in the order of the heads.
    own, count = heads // tiles.groups, runs.tiles.shape[0]
    scratch: dict[str, Any] = {
        "q": ring.swizzled((ROWS, features), dtype),
        "out": ring.swizzled((ROWS, value_features), dtype)
        if features != value_features
        else None,
        "k2": ring.swizzled((tiles.stages, tiles.keys, features), dtype),
        "v2": ring.swizzled((tiles.stages, tiles.keys, value_features), dtype),
        **common.pair_scratch((features, value_features), dtype),
        **common.sums_scratch(value_features),
        "rows": plgpu.SMEM((2, ROWS), jnp.float32),
        "staged_left": ring.staging(features, dtype, interpret),
        "staged_weights": ring.staging(tiles.keys, dtype, interpret),
        "q_ready": plgpu.Barrier(num_arrivals=tiles.groups),
        "ready": plgpu.Barrier(num_arrivals=2, num_barriers=tiles.stages),
        "free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=tiles.stages),
    }
    return plgpu.kernel(
        functools.partial(_forward_kernel, form=form),
        out_type=(
            result((batch, length, heads, value_features), dtype, *operands),
            result((batch, own, count, ROWS), jnp.float32, *operands),
        ),
        scratch_types=scratch,
        # The tiles of one head run concurrently and share its keys in the cache.
        grid=(count, own, batch),
        grid_names=("tile", "head", "batch"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name="trilinear_attention",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(*operands)


def _forward_kernel(*refs, form, **scratch):
    query_ref, k1_ref, v1_ref, k2_ref, v2_ref, *lists, out_ref, lse_ref = refs
    at, own_head, batch = (lax.axis_index(name) for name in ("tile", "head", "batch"))
    warpgroup = lax.axis_index("warpgroup")
    tiles, walk = form.tiles, Walk(Runs(*lists), at)
    q, k2, v2, rows = (scratch[name] for name in ("q", "k2", "v2", "rows"))
    pairs = common.pairs(scratch)
    seconds = Channel((k2, v2), scratch["ready"], scratch["free"])
    head = own_head * tiles.groups

    @pl.when(warpgroup == WARPGROUPS)
    def _():
        plgpu.set_max_registers(common.MEMORY_REGISTERS, action="decrease")
        origin = batch, walk.tile * tiles.queries, head
        for source, slot in common.copies(query_ref, q, tiles, origin):
            plgpu.copy_gmem_to_smem(source, slot, scratch["q_ready"])
        of_keys = batch, lax.div(head, query_ref.shape[2] // k1_ref.shape[2])
        first, second = (k1_ref, v1_ref), (k2_ref, v2_ref)
        common.feed_keys(walk, pairs, first, seconds, second, of_keys, tiles.keys)

    @pl.when(warpgroup < WARPGROUPS)
    def _():
        plgpu.set_max_registers(common.COMPUTE_REGISTERS, action="increase")
        seconds.open()
        pairs.open()
        plgpu.barrier_wait(scratch["q_ready"])
        left, weights = common.staged(scratch, warpgroup, "left", "weights")

        def run(partial, number, carry):
            key, value = seconds.wait(number)

            def step(at, carry):
                total, top, weight = carry
                # Opaque, so that no value derived from them is kept across the loop.
                tile, other = (ring.anew(x) for x in (walk.tile, walk.streamed(number)))
                query, second = tile * tiles.queries, Axis(1, other * tiles.keys)
                own = walk.pair(at) * PAIR + warpgroup
                keys, values = (slot.at[warpgroup] for slot in pairs.wait(at))
                a = common.spread(q, keys, form.scale * LOG2E)
                bits = ring.product(
                    ring.operand(a, left), ring.transposed(key), tiles.keys
                )
                if partial:
                    bits = form.selected(bits, Axis(0, query), own, second, 0)
                highest = bits.max(1)
                ok = form.attending(query, own, 0, ROWS, 0)
                if ok is not None:
                    highest = jnp.where(ok, highest, -jnp.inf)
                before, top = top, jnp.maximum(top, highest)
                shift = common.finite(top)
                decay = jnp.exp2(before - shift)
                # A row that does not attend to this key has weights of 0.
                off = shift if ok is None else jnp.where(ok, shift, jnp.inf)
                p = jnp.exp2(bits - across(off, bits.shape))
                weight = weight * decay + p.sum(1)
                p = ring.operand(p.astype(v2.dtype), weights)
                found = ring.product(p, value, v2.shape[2])
                found = found * across(common.per_feature(values), found.shape, 1)
                total = total * across(decay, total.shape) + found
                common.leave(pairs, at)
                return total, top, weight

            carry = lax.fori_loop(*walk.span(number), step, carry)
            seconds.release(number)
            return carry

        top = ring.per_row(jnp.full((ROWS,), -jnp.inf, jnp.float32))
        weight = ring.per_row(jnp.zeros((ROWS,), jnp.float32))
        carry = ring.zeros(v2.shape[2]), top, weight
        total, top, weight = walk.fold(run, carry)

        met = scratch["sums_met"].at[ring.anew(0)]

        @pl.when(warpgroup == 1)
        def _():
            scratch["sums"][...] = total
            rows[0], rows[1] = top, weight
            plgpu.barrier_arrive(met)

        @pl.when(warpgroup == 0)
        def _():
            plgpu.barrier_wait(met)
            others = plgpu.load(scratch["sums"], layout=plgpu.Layout.WGMMA)
            row = lambda i: plgpu.load(rows.at[i], layout=plgpu.Layout.WGMMA.reduce(1))
            other_top, other_weight = row(0), row(1)
            highest = jnp.maximum(top, other_top)
            shift = common.finite(highest)
            own, other = jnp.exp2(top - shift), jnp.exp2(other_top - shift)
            both = weight * own + other_weight * other
            empty = both == 0
            divisor = jnp.where(empty, 1.0, both)
            inverse = jnp.where(empty, 0.0, 1 / divisor)
            lse = (shift + jnp.log2(divisor)) * LN2
            rows[0] = jnp.where(empty, -jnp.inf, lse)
            out = total * across(own * inverse, total.shape)
            out = out + others * across(other * inverse, total.shape)
            slot = q if scratch["out"] is None else scratch["out"]
            origin = batch, walk.tile * tiles.queries, head
            common.store(out, slot, out_ref, tiles, origin)
            plgpu.copy_smem_to_gmem(rows.at[0], lse_ref.at[batch, own_head, walk.tile])
            plgpu.wait_smem_to_gmem(0)


def rows_of(x: jax.Array, groups: int, count: int, fill: float) -> jax.Array:
    """Reshapes (B, T, N) to the rows of kernels: (B, N / groups, tiles, 64)."""
    batch, length, heads = x.shape
    queries = ROWS // groups
    over = ((0, 0), (0, count * queries - length), (0, 0))
    x = jnp.pad(x, over, constant_values=fill)
    x = x.reshape(batch, count, queries, heads // groups, groups)
    return jnp.transpose(x, (0, 3, 1, 4, 2)).reshape(batch, -1, count, ROWS)


def rows_back(x: jax.Array, groups: int, length: int) -> jax.Array:
    """The inverse of `rows_of`."""
    batch, own, count, _ = x.shape
    x = x.reshape(batch, own, count, groups, ROWS // groups)
    x = jnp.transpose(x, (0, 2, 4, 1, 3))
    return x.reshape(batch, -1, own * groups)[:, :length]
