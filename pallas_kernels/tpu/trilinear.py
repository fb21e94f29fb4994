r"""Attention to pairs of keys, one per axis, for Mosaic TPU: forward.

$z_{ijl} = a \sum_c q_{ic} k^1_{jc} k^2_{lc}$, one softmax per query over all pairs
$(j, l)$, $\mathrm{out}_i = \sum_{jl} p_{ijl}\, v^1_j \odot v^2_l$.

The blocks of a tile of queries are visited in sequence: the maximum, the sum and the
weighted values of its rows stay in VMEM, float32, until the last one. Keys of the first
axis are multiplied into the queries, which gives the products enough rows for the
matrix unit although a tile of queries is short: a long tile would visit, beyond the
window, as many keys as it has queries. The product of query and first key is computed
in float32 and rounded once to the matrix unit's dtype.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels._trilinear import Masks, Visits

from .trilinear_blocks import (
    Block,
    Pair,
    Shape,
    Tile,
    call,
    shape_of,
    unstack,
    vmem,
)
from .trilinear_math import (
    along,
    as_row,
    contract,
    gather,
    load,
    product,
    row_blocks,
    spread,
    store,
)
from .trilinear_tiles import LANES, Tiles


def forward(
    query: jax.Array,
    first: Pair,
    second: Pair,
    visits: Visits,
    *,
    masks: Masks,
    scale: float,
    heads: int,
    groups: int,
    tiles: Tiles,
    pieces: tuple[int, int] = (1, 1),
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Output and logsumexp of attention over the pairs that the lists and masks leave.

    Args:
        query: (B, T, heads * groups * H), H and E multiples of 128.
        first: Keys (B, S1, heads * H) and values (B, S1, heads * E) of the first axis.
        second: Keys and values of the second axis.
        visits: Blocks by tile of queries, made with the counts of `tiles`.
        masks: Static; evaluated where the lists say SOME.
        scale: Static factor of the scores.
        heads: Key heads.
        groups: Query heads per key head.
        tiles: See `trilinear_tiles.choose_tiles`.
        pieces: Numbers of bfloat16 arrays, 1 to 3, into which are split left operands
            of products, and keys and values of the second axis. Three hold float32.
        interpret: As in `pallas_call`.

    Returns:
        (B, T, heads * groups * E) in the dtype of `query`, and (B, T, heads * groups),
        float32: -inf for a row without a pair, whose output is 0.
    """
    s = shape_of(query, first, second, masks, scale, heads, groups, pieces, tiles)
    batch, length = query.shape[:2]
    own, count = heads * s.head_groups, pl.cdiv(length, tiles.query)
    wide_rows = (tiles.rows, LANES)
    out, lse = call(
        _forward_kernel,
        s,
        visits,
        ("query", "first", "first", "second", "second"),
        (query, *first, *second),
        ("query", "rows"),
        (
            jax.ShapeDtypeStruct(
                (batch, length, heads * groups * s.values), query.dtype
            ),
            jax.ShapeDtypeStruct((batch, own, count, 1, tiles.rows), jnp.float32),
        ),
        scratch=(
            *s.keys(),
            vmem(tiles.rows, s.features),
            s.spread(s.features),
            vmem(*wide_rows),
            vmem(*wide_rows),
            vmem(tiles.rows, s.values),
        ),
        products=2,
        interpret=interpret,
        name="trilinear_attention",
    )
    return out, _rows_back(lse, length, tiles.groups)


def _forward_kernel(s: Shape, at: Block, refs: Sequence[Any]) -> None:
    q_ref, *keys, out_ref, lse_ref, k1, v1, k2, v2 = refs[:11]
    q, spread_q, top, total, weighted = refs[11:]

    @pl.when(at.is_first)
    def _():
        q[...] = at.queries(q_ref, s.features) * s.scale
        top[...] = jnp.full(top.shape, -jnp.inf, top.dtype)
        total[...] = jnp.zeros(total.shape, total.dtype)
        weighted[...] = jnp.zeros(weighted.shape, weighted.dtype)

    at.load(keys, (k1, v1, k2, v2))

    def enter(own: Any) -> None:
        store(spread_q, spread(q[...], k1[own]))

    def visit(own: Any, other: Any, tile: Tile) -> None:
        z = contract(load(spread_q), load(k2, other))
        z, before = tile.select(z, -jnp.inf), top[...]
        highest = row_blocks(z.max(1, keepdims=True), s.rows)
        new = functools.reduce(jnp.maximum, highest, before)
        shift = jnp.where(new == -jnp.inf, 0.0, new)
        p = jnp.exp(z - jnp.concatenate([along(shift, z)] * s.tiles.combined, 0))
        decay = jnp.exp(before - shift)
        added = functools.reduce(jnp.add, row_blocks(p.sum(1, keepdims=True), s.rows))
        total[...] = total[...] * decay + added
        top[...] = new
        found = row_blocks(product(s.divided(p), load(v2, other)), s.rows)
        before = weighted[...] * along(decay, weighted)
        weighted[...] = before + gather(found, v1[own])

    at.loop(enter, visit)

    @pl.when(at.is_last)
    def _():
        sums = total[:, :1]
        mean = jnp.where(sums > 0, weighted[...] / jnp.where(sums > 0, sums, 1), 0)
        # A row whose sum is NaN is not empty.
        mean = jnp.where(sums != sums, sums, mean)
        unstack(out_ref, mean, s.tiles.groups)
        lse = jnp.where(sums == 0, -jnp.inf, top[:, :1] + jnp.log(sums))
        lse_ref[0, 0, 0] = as_row(lse)


def _rows_back(x: jax.Array, length: int, groups: int) -> jax.Array:
    """Reshapes (B, N / groups, tiles of queries, 1, rows) to (B, T, N)."""
    batch, heads, count, _, rows = x.shape
    x = x.reshape(batch, heads, count, groups, rows // groups)
    x = jnp.transpose(x, (0, 2, 4, 1, 3))
    return x.reshape(batch, -1, heads * groups)[:, :length]
