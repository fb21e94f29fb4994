r"""Attention to pairs of keys for Mosaic TPU: the gradients, in three kernels.

With $p_{ijl}$ recomputed from the logsumexp of row i, $g$ the cotangent of the output
and $\delta_i$ its product with the output, less the cotangent of the logsumexp,
$dz_{ijl} = p_{ijl} (\langle g_i, v^1_j \odot v^2_l \rangle - \delta_i)$:

- `query_gradient` owns tiles of queries. With $t_{ij} = \sum_l dz_{ijl} k^2_l$, a
  product, $dq_i = a \sum_j k^1_j t_{ij}$. Three products per tile.
- `first_gradient` owns blocks of the first axis: the same $t$ and
  $u_{ij} = \sum_l p_{ijl} v^2_l$, then $dk^1_j = a \sum_i q_i t_{ij}$ and
  $dv^1_j = \sum_i g_i u_{ij}$. Four products.
- `second_gradient` owns blocks of the second axis, whose tiles of scores are
  transposed, (keys, rows): then $dk^2 = dz^\top (a\, q k^1)$ and
  $dv^2 = p^\top (g v^1)$ need no transposed operands. Four products.

Every owner sums in float32 in VMEM, in a fixed order, and writes once. Blocks, lists
and masks are those of the forward pass.
"""

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
    as_column,
    contract,
    gather,
    load,
    product,
    row_blocks,
    spread,
    store,
)
from .trilinear_tiles import LANES, Tiles

type Pieces = list[jax.Array]


def gradient(
    query: jax.Array,
    first: Pair,
    second: Pair,
    cotangent: jax.Array,
    inverse: jax.Array,
    delta: jax.Array,
    visits: tuple[Visits, Visits, Visits],
    *,
    masks: Masks,
    scale: float,
    heads: int,
    groups: int,
    tiles: tuple[Tiles, Tiles, Tiles],
    pieces: tuple[int, int] = (1, 1),
    dtype: Any = None,
    interpret: Any = False,
) -> tuple[jax.Array, Pair, Pair]:
    """Cotangents of the queries, and of keys and values of both axes.

    Args:
        query: As in `trilinear.forward`, like `first`, `second`, `masks`, `scale`,
            `heads`, `groups`, `pieces` and `interpret`.
        first: See `query`.
        second: See `query`.
        cotangent: Cotangent of the output, (B, T, heads * groups * E).
        inverse: (B, T, heads * groups), float32: the logsumexp; +inf for rows without a
            pair.
        delta: In this shape, float32: the sum of output times cotangent, less the
            cotangent of the logsumexp.
        visits: Blocks by tile of queries, by block of the first and of the second axis.
        masks: See `query`.
        scale: See `query`.
        heads: See `query`.
        groups: See `query`.
        tiles: Tiles for each of `visits`; see `trilinear_tiles.choose_tiles`.
        pieces: See `query`.
        dtype: Dtype of the results; None for that of each operand.
        interpret: See `query`.

    Returns:
        Arrays of the shapes of their operands.
    """
    kinds = ("query", "first", "first", "second", "second", "query", "rows", "rows")
    options = (query, first, second, masks, scale, heads, groups)

    def owned(
        kernel: Any, owner: int, name: str, results: Pair | tuple[jax.Array]
    ) -> list[jax.Array]:
        own = ("query", "first", "second")[owner]
        s = shape_of(*options, pieces, tiles[owner])
        # Padded rows are made empty: their weights are 0.
        filled = ((inverse, jnp.inf), (delta, 0.0))
        rows = [_rows_of(x, s.tiles, fill) for x, fill in filled]
        if owner == 2:
            rows = [jnp.tile(x, s.tiles.combined) for x in rows]
        return call(
            kernel,
            s,
            visits[owner],
            kinds,
            (query, *first, *second, cotangent, *rows),
            (own,) * len(results),
            [jax.ShapeDtypeStruct(x.shape, dtype or x.dtype) for x in results],
            scratch=_scratch(s, owner),
            products=3 if owner == 0 else 4,
            interpret=interpret,
            name=f"trilinear_attention_{name}_gradient",
        )

    (dq,) = owned(_query_kernel, 0, "query", (query,))
    dk1, dv1 = owned(_first_kernel, 1, "first", first)
    dk2, dv2 = owned(_second_kernel, 2, "second", second)
    return dq, (dk1, dv1), (dk2, dv2)


def _scratch(s: Shape, owner: int) -> tuple[Any, ...]:
    sizes = (s.features, s.values)
    common = (
        *s.keys(),
        *(vmem(s.rows, n) for n in sizes),
        *(s.spread(n) for n in sizes),
    )
    if owner == 2:
        return (*common, *(vmem(s.tiles.second, n) for n in sizes))
    per_row = vmem(s.scores, LANES)
    if owner == 0:
        sums = (vmem(s.scores, s.features), vmem(s.rows, s.features))
        return (*common, per_row, per_row, *sums)
    sums = (
        *(vmem(s.scores, n) for n in sizes),
        *(s.first_keys(n) for n in sizes),
    )
    return (*common, per_row, per_row, *sums)


def _query_kernel(s: Shape, at: Block, refs: Sequence[Any]) -> None:
    operands, (out_ref, *scratch) = refs[:8], refs[8:]
    *keys, q, g, spread_q, spread_g, inverse, delta, t, total = scratch
    k1, v1, k2, _ = keys

    @pl.when(at.is_first)
    def _():
        _load_queries(s, at, operands, q, g)
        _load_rows(operands, inverse, delta)
        total[...] = jnp.zeros(total.shape, total.dtype)

    at.load(operands[1:5], keys)

    def enter(own: Any) -> None:
        store(spread_q, spread(q[...], k1[own]))
        store(spread_g, spread(g[...], v1[own]))
        t[...] = jnp.zeros(t.shape, t.dtype)

    def visit(own: Any, other: Any, tile: Tile) -> None:
        _, dz = _weights(s, tile, scratch, other, inverse, delta)
        t[...] += product(dz, load(k2, other))

    def leave(own: Any) -> None:
        total[...] += gather(row_blocks(t[...], s.rows), k1[own])

    at.loop(enter, visit, leave)

    @pl.when(at.is_last)
    def _():
        unstack(out_ref, total[...] * s.scale, s.tiles.groups)


def _first_kernel(s: Shape, at: Block, refs: Sequence[Any]) -> None:
    operands, (dk_ref, dv_ref, *scratch) = refs[:8], refs[8:]
    *keys, q, g, spread_q, spread_g, inverse, delta, t, u, dk, dv = scratch
    k1, v1, k2, v2 = keys

    @pl.when(at.is_first)
    def _():
        dk[...] = jnp.zeros(dk.shape, dk.dtype)
        dv[...] = jnp.zeros(dv.shape, dv.dtype)

    _load_queries(s, at, operands, q, g)
    _load_rows(operands, inverse, delta)
    at.load(operands[1:5], keys)

    def enter(own: Any) -> None:
        store(spread_q, spread(q[...], k1[own]))
        store(spread_g, spread(g[...], v1[own]))
        t[...] = jnp.zeros(t.shape, t.dtype)
        u[...] = jnp.zeros(u.shape, u.dtype)

    def visit(own: Any, other: Any, tile: Tile) -> None:
        p, dz = _weights(s, tile, scratch, other, inverse, delta)
        t[...] += product(dz, load(k2, other))
        u[...] += product(p, load(v2, other))

    def leave(own: Any) -> None:
        dk[own] += _summed(row_blocks(t[...], s.rows), q[...])
        dv[own] += _summed(row_blocks(u[...], s.rows), g[...])

    at.loop(enter, visit, leave)

    @pl.when(at.is_last)
    def _():
        for ref, total in ((dk_ref, dk), (dv_ref, dv)):
            tiles = jnp.concatenate([total[t] for t in range(total.shape[0])], 0)
            ref[0] = tiles.astype(ref.dtype)


def _second_kernel(s: Shape, at: Block, refs: Sequence[Any]) -> None:
    operands, (dk_ref, dv_ref, *scratch) = refs[:8], refs[8:]
    *keys, q, g, spread_q, spread_g, dk, dv = scratch
    k1, v1, *_ = keys

    @pl.when(at.is_first)
    def _():
        dk[...] = jnp.zeros(dk.shape, dk.dtype)
        dv[...] = jnp.zeros(dv.shape, dv.dtype)

    _load_queries(s, at, operands, q, g)
    at.load(operands[1:5], keys)

    def enter(own: Any) -> None:
        store(spread_q, spread(q[...], k1[own]))
        store(spread_g, spread(g[...], v1[own]))

    def visit(own: Any, other: Any, tile: Tile) -> None:
        inverse, delta = (ref.at[0, 0, 0] for ref in operands[6:8])
        p, dz = _weights(s, tile, scratch, other, inverse, delta)
        dk[other] += product(dz, load(spread_q))
        dv[other] += product(p, load(spread_g))

    at.loop(enter, visit, transposed=True)

    @pl.when(at.is_last)
    def _():
        dk_ref[0] = dk[...].astype(dk_ref.dtype)
        dv_ref[0] = dv[...].astype(dv_ref.dtype)


def _weights(
    s: Shape, tile: Tile, scratch: Sequence[Any], other: Any, inverse: Any, delta: Any
) -> tuple[Pieces, Pieces]:
    """The weights of a tile and the cotangents of its scores, as bfloat16 pieces."""
    _, _, k2, v2, _, _, spread_q, spread_g, *_ = scratch

    def pairs(left: Any, right: Any) -> jax.Array:
        # Loaded just before they are multiplied, to save registers.
        if tile.transposed:
            return contract(load(right, other), load(left))
        return contract(load(left), load(right, other))

    def per_row(ref: Any, like: jax.Array) -> jax.Array:
        return ref[...] if tile.transposed else along(ref[...], like)

    z = pairs(spread_q, k2)
    p = tile.select(jnp.exp(z - per_row(inverse, z)), 0.0)
    answer = pairs(spread_g, v2)
    dz = p * (answer - per_row(delta, z))
    return s.divided(p), s.divided(dz)


def _load_queries(s: Shape, at: Block, operands: Sequence[Any], q: Any, g: Any) -> None:
    """Stores rows of scaled queries and of cotangents, 0 beyond the last query."""
    q[...] = at.queries(operands[0], s.features) * s.scale
    g[...] = at.queries(operands[5], s.values)


def _load_rows(operands: Sequence[Any], *columns: Any) -> None:
    """Stores numbers per row in all lanes, once per key multiplied into the rows."""
    for ref, column in zip(operands[6:8], columns, strict=True):
        rows = as_column(ref[0, 0, 0])
        rows = jnp.broadcast_to(rows, (rows.shape[0], LANES))
        column[...] = jnp.concatenate([rows] * (column.shape[0] // rows.shape[0]), 0)


def _summed(found: Sequence[jax.Array], rows: jax.Array) -> jax.Array:
    """Sums over rows of each of J pieces times the rows: (J, features)."""
    return jnp.concatenate([(x * rows).sum(0, keepdims=True) for x in found], 0)


def _rows_of(x: jax.Array, tiles: Tiles, fill: float) -> jax.Array:
    """Reshapes (B, T, N) to (B, N / groups, tiles of queries, 1, rows)."""
    batch, length, heads = x.shape
    over = ((0, 0), (0, -length % tiles.query), (0, 0))
    x = jnp.pad(x, over, constant_values=fill)
    x = x.reshape(batch, -1, tiles.query, heads // tiles.groups, tiles.groups)
    x = jnp.transpose(x, (0, 3, 1, 4, 2))
    return x.reshape(batch, heads // tiles.groups, -1, 1, tiles.rows)
