r"""Attention to pairs of keys for Hopper: formulas of the gradients, and of queries.

With $p_{ijl}$ recomputed from the logsumexp of row i, $g$ the cotangent of the output
and $\delta_i$ its product with the output, less the cotangent of the logsumexp,

$$dz_{ijl} = p_{ijl} (\langle g_i, v^1_j \odot v^2_l \rangle - \delta_i), \qquad
dq_i = a \sum_j k^1_j \odot \sum_l dz_{ijl} k^2_l,$$

and the gradient of either key axis is $a \sum dz_{ijl}$ times query and the other key,
see `trilinear_key_gradient`. The kernel of the queries loops like the forward pass: for
one key j of the first axis three products,

    Z = (a q * k1_j) K2^T,   D = (g * v1_j) V2^T - delta,   total += k1_j * (dZ K2).

The queries and both key axes take eleven products per tuple; a single kernel with
atomic sums would take six, but add in a varying order.
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
from .attention_scores import LOG2E, Axis, across
from .attention_tiles import ROWS, WARPGROUPS
from .trilinear_common import Form, Pair, Walk
from .trilinear_lists import Runs
from .trilinear_tiles import PAIR


def query_gradient(
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
) -> jax.Array:
    """The cotangent of the queries.

    Args:
        query: As in `trilinear.forward`, like `first`, `second`, `runs`, `form` and
            `interpret`.
        first: See `query`.
        second: See `query`.
        cotangent: Cotangent of the output, (B, T, N, E), in the dtype of `query`.
        norm: Logsumexp in bits, +inf for rows without a pair and padded ones; float32,
            in the layout of `trilinear.rows_of`.
        delta: In this layout, the sum of output times cotangent, less the cotangent of
            the logsumexp.
        runs: See `query`.
        form: See `query`.
        interpret: See `query`.

    Returns:
        In the shape and dtype of `query`.
    """
    tiles, dtype = form.tiles, query.dtype
    features, value_features = query.shape[-1], cotangent.shape[-1]
    operands = (query, *first, *second, cotangent, norm, delta, *runs)
    scratch: dict[str, Any] = {
        "q": ring.swizzled((ROWS, features), dtype),
        "do": ring.swizzled((ROWS, value_features), dtype),
        "rows": plgpu.SMEM((2, ROWS), jnp.float32),
        "k2": ring.swizzled((tiles.stages, tiles.keys, features), dtype),
        "v2": ring.swizzled((tiles.stages, tiles.keys, value_features), dtype),
        **common.pair_scratch((features, value_features), dtype),
        **common.sums_scratch(features),
        "staged_left": ring.staging(features, dtype, interpret),
        "staged_values": ring.staging(value_features, dtype, interpret),
        "staged_weights": ring.staging(tiles.keys, dtype, interpret),
        "owned": plgpu.Barrier(num_arrivals=2 * tiles.groups + 2),
        "ready": plgpu.Barrier(num_arrivals=2, num_barriers=tiles.stages),
        "free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=tiles.stages),
    }
    batch, _, heads, _ = query.shape
    return plgpu.kernel(
        functools.partial(_query_kernel, form=form),
        out_type=result(query.shape, dtype, *operands),
        scratch_types=scratch,
        grid=(runs.tiles.shape[0], heads // tiles.groups, batch),
        grid_names=("tile", "head", "batch"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name="trilinear_attention_query_gradient",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(*operands)


def _query_kernel(*refs, form, **scratch):
    query_ref, k1_ref, v1_ref, k2_ref, v2_ref, cotangent_ref, *rest = refs
    norm_ref, delta_ref, *lists, dq_ref = rest
    at, own_head, batch = (lax.axis_index(name) for name in ("tile", "head", "batch"))
    warpgroup = lax.axis_index("warpgroup")
    tiles, walk = form.tiles, Walk(Runs(*lists), at)
    q, do, k2, v2, rows = (scratch[name] for name in ("q", "do", "k2", "v2", "rows"))
    pairs = common.pairs(scratch)
    seconds = Channel((k2, v2), scratch["ready"], scratch["free"])
    head = own_head * tiles.groups

    @pl.when(warpgroup == WARPGROUPS)
    def _():
        plgpu.set_max_registers(common.MEMORY_REGISTERS, action="decrease")
        own_rows = batch, own_head, walk.tile
        origin = batch, walk.tile * tiles.queries, head
        for source, slot in (
            *common.copies(query_ref, q, tiles, origin),
            *common.copies(cotangent_ref, do, tiles, origin),
            (norm_ref.at[own_rows], rows.at[0]),
            (delta_ref.at[own_rows], rows.at[1]),
        ):
            plgpu.copy_gmem_to_smem(source, slot, scratch["owned"])
        of_keys = batch, lax.div(head, query_ref.shape[2] // k1_ref.shape[2])
        first, second = (k1_ref, v1_ref), (k2_ref, v2_ref)
        common.feed_keys(walk, pairs, first, seconds, second, of_keys, tiles.keys)

    @pl.when(warpgroup < WARPGROUPS)
    def _():
        plgpu.set_max_registers(common.COMPUTE_REGISTERS, action="increase")
        seconds.open()
        pairs.open()
        plgpu.barrier_wait(scratch["owned"])
        left, right, weights = common.staged(
            scratch, warpgroup, "left", "values", "weights"
        )
        norm, delta = (
            plgpu.load(rows.at[i], layout=plgpu.Layout.WGMMA.reduce(1))
            for i in range(2)
        )

        def run(partial, number, total):
            key, value = seconds.wait(number)

            def step(at, total):
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
                ok = form.attending(query, own, 0, ROWS, 0)
                off = norm if ok is None else jnp.where(ok, norm, jnp.inf)
                p = common.normalised(bits, across(off, bits.shape))
                g = ring.operand(common.spread(do, values), right)
                answer = across(-delta, p.shape)
                answer = ring.added(answer, g, ring.transposed(value), right)
                dz = ring.operand((p * answer).astype(k2.dtype), weights)
                found = ring.product(dz, key, k2.shape[2])
                total = total + found * across(common.per_feature(keys), found.shape, 1)
                common.leave(pairs, at)
                return total

            total = lax.fori_loop(*walk.span(number), step, total)
            seconds.release(number)
            return total

        total = walk.fold(run, ring.zeros(k2.shape[2])) * form.scale

        def use(total):
            origin = batch, walk.tile * tiles.queries, head
            common.store(total, q, dq_ref, tiles, origin)
            plgpu.wait_smem_to_gmem(0)

        common.summed(total, scratch, warpgroup, use)
