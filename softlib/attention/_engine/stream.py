"""Attention tile by tile: two loops over the blocks that a mask leaves.

The blocks form flat lists with one step each, so that the time is that of the visited
blocks. The first loop takes the blocks in which every pair attends and evaluates no
mask. The carry is the state of all rows: a tile of it is read, added to, and written
back in place. Trip counts are static, which keeps the loops differentiable; at first
order the backward pass below is used instead.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from softlib._barrier import barrier_on_cpu
from softlib._sharding import match_varying

from .plan import BlockPlan
from .scores import Kind, Result, Softmax
from .tiles import (
    Index,
    Operands,
    Options,
    Pairs,
    Tiler,
    add_at,
    factor_cotangents,
    gather,
    product,
    scores,
    set_slice,
    slice_at,
    spread,
    spread_first,
    tile_at,
)

# Maps the index of a block on an axis to its tile.
type _Reader = Callable[[Array], Array]


class BackwardOperands(NamedTuple):
    """The operands, the results of the forward pass, and their cotangents."""

    operands: Operands
    out: Float[Array, "B T N E"] | None
    normalizer: Float[Array, "B T N"]
    out_cotangent: Float[Array, "B T N E"] | None
    normalizer_cotangent: Float[Array, "B T N"]


class Gradient(NamedTuple):
    """Cotangents of the differentiable operands."""

    query: Array
    key: Array
    value: Array | None
    bias: Array | None
    sinks: Array | None
    rows: tuple[Array, ...]
    outer: Any = ()


def forward(options: Options, operands: Operands) -> Result:
    tiler, pairs = _prepare(options, operands)
    kind, plan = options.kind, operands.plan
    query = _scaled(options, tiler, operands)
    key, value = _key_readers(options, tiler, operands)
    outer_keys, outer_values = _outer(tiler, operands)
    rows = _rows(tiler, operands)

    def visit(partial: bool, at: Index, state: Any) -> Any:
        row, column = at[0], at[-1]
        q = spread(tile_at(query, row), _tiles_at(outer_keys, at))
        tile = scores(options, pairs, q, key(column), at, partial=partial)
        entries = kind.entries(tile.z, tuple(tile_at(r, row) for r in rows))
        if tile.ok is not None:
            entries = jnp.where(tile.ok, entries, kind.absent)

        def weigh(weights: Array) -> Array:
            assert value is not None
            weights = _flat(lax.squeeze(weights, (0,))).astype(tiler.dtype)
            weighted = product(weights, value(column), options)
            weighted = gather(weighted, _tiles_at(outer_values, at))
            return lax.expand_dims(weighted, (0,))

        # Keeps the axis of tiles: so XLA fuses reading, adding and writing a tile.
        before = store.read(jax.tree.map(lambda leaf: slice_at(leaf, row), state))
        entries = lax.expand_dims(entries, (0,))
        after = kind.accumulator.update(
            before, entries, axis=(-3, -1), weigh=None if value is None else weigh
        )
        after = store.written(after)
        return jax.tree.map(lambda leaf, new: set_slice(leaf, row, new), state, after)

    sinks = operands.sinks
    if sinks is not None:
        sinks = jnp.broadcast_to(
            sinks.astype(operands.dtype)[None, None, :], operands.query.shape[:-1]
        )
        sinks = tiler.rows(sinks)
    dtype, shape = operands.dtype, query.shape[:-1]
    state = initial_state(kind, shape, dtype, operands.value, sinks)
    store = _Separate() if options.is_for_cpu else _Packed.of(state)
    state = match_varying(store.written(state), operands.query)
    found = kind.finalize(store.read(_fold(plan, visit, state)))
    out = found.out
    if out is not None:
        out = tiler.query_back(out).astype(options.out_dtype)
    top = None if found.max is None else tiler.query_back(found.max)
    return Result(out, tiler.query_back(found.normalizer), top)


def backward(options: Options, backward: BackwardOperands) -> Gradient:
    """The gradient in one pass: five products per tile, six with several key axes.

    The carry holds the gradients of all rows. Gradients of keys and values, and copies
    of queries and cotangents, have features first: so no product has a transposed left
    operand, which is slow on a CPU.
    """
    operands = backward.operands
    tiler, pairs = _prepare(options, operands)
    kind, plan, dtype = options.kind, operands.plan, operands.dtype
    query, key = _scaled(options, tiler, operands), tiler.key(operands.key)
    query_first = query.swapaxes(-1, -2) if options.is_for_cpu else None
    outer_keys, outer_values = _outer(tiler, operands)
    inverse, delta = row_constants(options, backward)
    sinks = operands.sinks
    if sinks is not None:
        sinks = sinks_gradient(sinks, inverse, delta)
    # A padded row is made empty: a bias that all queries share is not 0 there.
    inverse = tiler.rows(inverse, fill=jnp.inf if kind.is_log else 0)
    inverse, delta = inverse[..., None, :, None], tiler.rows(delta)[..., None, :, None]
    inverse_at, delta_at = _readers(options, inverse, delta)
    rows = _rows(tiler, operands)
    value = cotangent = cotangent_first = None
    if operands.value is not None:
        assert backward.out_cotangent is not None
        value = tiler.key(operands.value)
        cotangent = tiler.query(backward.out_cotangent)
        if options.is_for_cpu:
            cotangent_first = cotangent.swapaxes(-1, -2)

    def visit(partial: bool, at: Index, total: Gradient) -> Gradient:
        row, column = at[0], at[-1]
        keys, values = (_tiles_at(tiles, at) for tiles in (outer_keys, outer_values))
        q, k = tile_at(query, row), tile_at(key, column)
        tile = scores(options, pairs, spread(q, keys), k, at, partial=partial)
        shape = tile.z.shape
        select = lambda x: x if tile.ok is None else jnp.where(tile.ok, x, 0)
        weights = kind.weights(
            tile.z, tuple(tile_at(r, row) for r in rows), inverse_at(row)
        )
        centred = -delta_at(row)
        dv, outer = total.value, total.outer
        if value is not None:
            assert cotangent is not None
            assert dv is not None
            do = tile_at(cotangent, row)
            p = _flat(select(weights.p)).astype(tiler.dtype)
            v, do_first = tile_at(value, column), _tile_first(cotangent_first, do, row)
            products = product(spread(do, values), v.swapaxes(-1, -2), options)
            centred = products.reshape(shape) + centred
            dv = add_at(dv, column, product(_first(do_first, values), p, options))
            if outer:
                found = product(p, v, options)
                outer = _added(outer, 1, factor_cotangents(do, values, found), at)
        dz = select(weights.slope * centred)
        bias = total.bias
        if bias is not None:
            bias = pairs.sum_bias(bias, dz, at)
        row_gradients = total.rows
        if weights.row_slope is not None:
            first = select(weights.row_slope * centred).sum((-3, -1))
            row_gradients = (add_at(row_gradients[0], row, first), *row_gradients[1:])
        if tile.slope is not None:
            dz = dz * tile.slope
        dz = _flat(dz).astype(tiler.dtype)
        q_first = _first(_tile_first(query_first, q, row), keys)
        dq = product(dz, k, options)
        if outer:
            outer = _added(outer, 0, factor_cotangents(q, keys, dq), at)
        return total._replace(
            query=add_at(total.query, row, gather(dq, keys)),
            key=add_at(total.key, column, product(q_first, dz, options)),
            value=dv,
            bias=bias,
            rows=row_gradients,
            outer=outer,
        )

    zeros = lambda x: jnp.zeros(x.shape, dtype)
    nothing = Gradient(
        zeros(query),
        zeros(key.swapaxes(-1, -2)),
        None if value is None else zeros(value.swapaxes(-1, -2)),
        None if pairs.bias is None else zeros(pairs.bias),
        None,
        tuple(zeros(inverse[..., 0, :, 0]) for _ in rows),
        tuple(
            (zeros(keys), zeros(values))
            for keys, values in zip(outer_keys, outer_values, strict=True)
        ),
    )
    total = _fold(plan, visit, match_varying(nothing, operands.query))
    wide = options.wide_gradients
    like = lambda x, y: x if wide else x.astype(y.dtype)
    if sinks is not None:
        assert operands.sinks is not None
        sinks = like(sinks, operands.sinks)
    dv = bias = None
    if total.value is not None:
        dv = like(tiler.key_back(total.value.swapaxes(-1, -2)), operands.value)
    if total.bias is not None:
        assert operands.bias is not None
        bias = like(tiler.pairs_back(total.bias, operands.bias), operands.bias)
    # On a CPU queries are scaled.
    of_keys = lambda x: x if options.is_for_cpu else x * options.scale
    outer = [(of_keys(keys), values) for keys, values in total.outer]
    return Gradient(
        like(tiler.query_back(total.query * options.scale), operands.query),
        like(tiler.key_back(of_keys(total.key.swapaxes(-1, -2))), operands.key),
        dv,
        bias,
        sinks,
        tuple(
            like(tiler.query_back(x), y)
            for x, y in zip(total.rows, operands.rows, strict=True)
        ),
        tuple(
            tuple(
                like(tiler.key_back(x, axis + 1), y)
                for x, y in zip(found, given, strict=True)
            )
            for axis, (found, given) in enumerate(
                zip(outer, operands.outer, strict=True)
            )
        ),
    )


class _Separate:
    """Keeps the state of rows as it is."""

    def written(self, state: Any) -> Any:
        return state

    def read(self, stored: Any) -> Any:
        return stored


class _Packed(NamedTuple):
    """Keeps what a state has per row, such as sums, in one array on axis 1.

    So a step reads and writes it in one launch of a GPU.

    Attributes:
        structure: Of the state.
        ranks: Of its leaves.
    """

    structure: Any
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, state: Any) -> "_Packed":
        leaves, structure = jax.tree.flatten(state)
        return cls(structure, tuple(leaf.ndim for leaf in leaves))

    def written(self, state: Any) -> tuple[Array, list[Array]]:
        leaves, least = jax.tree.leaves(state), min(self.ranks)
        per_row = [leaf for leaf in leaves if leaf.ndim == least]
        return jnp.stack(per_row, 1), [leaf for leaf in leaves if leaf.ndim > least]

    def read(self, stored: tuple[Array, list[Array]]) -> Any:
        packed, others = iter(jnp.unstack(stored[0], axis=1)), iter(stored[1])
        leaves = [
            next(packed if rank == min(self.ranks) else others) for rank in self.ranks
        ]
        return jax.tree.unflatten(self.structure, leaves)


def row_constants(options: Options, backward: BackwardOperands) -> tuple[Array, Array]:
    """Per row: the inverse normalizer of the weights, and `delta`.

    The cotangent of a score is `slope * (<dO, v> - delta)`, where `delta` is
    `<dO, out>` minus the cotangent of the normalizer.
    """
    operands, dtype = backward.operands, backward.operands.dtype
    normalizer = backward.normalizer.astype(dtype)
    delta = -backward.normalizer_cotangent.astype(dtype)
    if not options.kind.is_log:
        delta = delta * normalizer
    if operands.value is not None:
        assert backward.out is not None
        assert backward.out_cotangent is not None
        out, cotangent = backward.out, backward.out_cotangent
        delta = delta + (out.astype(dtype) * cotangent.astype(dtype)).sum(-1)
    return options.kind.inverse(normalizer), delta


def sinks_gradient(sinks: Array, inverse: Array, delta: Array) -> Array:
    """The gradient of the sinks, which are scores without values: sums of -p delta."""
    p = jnp.exp(sinks.astype(inverse.dtype)[None, None, :] - inverse)
    return (-p * delta).sum((0, 1))


def _scaled(options: Options, tiler: Tiler, operands: Operands) -> Array:
    """Tiles of the queries, scaled on a CPU: so the scale costs nothing per pair.

    Elsewhere scores are scaled, because queries of 16 bits would be rounded again.
    """
    query = tiler.query(operands.query)
    return query * options.scale if options.is_for_cpu else query


def _rows(tiler: Tiler, operands: Operands) -> list[Array]:
    """Tiles of what is given per row, with axes for the pairs of a tile."""
    return [
        tiler.rows(row.astype(operands.dtype))[..., None, :, None]
        for row in operands.rows
    ]


def _prepare(options: Options, operands: Operands) -> tuple[Tiler, Pairs]:
    dtype = options.product_dtype(operands)
    tiler = Tiler(operands.plan, operands.groups, dtype)
    dense = None if operands.dense is None else tiler.pairs(operands.dense)
    bias = None if operands.bias is None else tiler.pairs(operands.bias)
    pairs = Pairs(operands.plan, operands.groups, dense, bias, options.is_for_cpu)
    return tiler, pairs


def _outer(tiler: Tiler, operands: Operands) -> tuple[list[Array], list[Array]]:
    """Tiles of the keys, and of the values, of the key axes before the last."""
    keys, values = (
        [tiler.key(pair[i], axis + 1) for axis, pair in enumerate(operands.outer)]
        for i in range(2)
    )
    return keys, values


def _flat(scores: Array) -> Array:
    """Reshapes (B, K, J, M, s) to (B, K, J * M, s), the rows of one product."""
    batch, heads, outer, rows, size = scores.shape
    return scores.reshape(batch, heads, outer * rows, size)


def _tiles_at(tiles: Sequence[Array], at: Index) -> list[Array]:
    return [tile_at(tile, column) for tile, column in zip(tiles, at[1:-1], strict=True)]


def _tile_first(copy: Array | None, tile: Array, row: Array) -> Array:
    """A tile with features first, from the copy if there is one."""
    return tile.swapaxes(-1, -2) if copy is None else tile_at(copy, row)


def _key_readers(
    options: Options, tiler: Tiler, operands: Operands
) -> tuple[_Reader, _Reader | None]:
    """Tiles of the keys and of the values, as functions of the column."""
    arrays = [x for x in (operands.key, operands.value) if x is not None]
    if options.is_for_cpu or tiler.plan.grid[0] == 1:
        found = [tiler.key_at(x) for x in arrays]
    else:
        found = _readers(options, *map(tiler.key, arrays))
    return found[0], found[1] if len(found) > 1 else None


def _readers(options: Options, *tiles: Array) -> list[_Reader]:
    """`tile_at` of several arrays that are read at the same place."""
    first = tiles[0]
    alike = all((x.shape, x.dtype) == (first.shape, first.dtype) for x in tiles)
    if options.is_for_cpu or not alike:
        return [functools.partial(tile_at, each) for each in tiles]
    packed = jnp.stack(tiles, 1)  # read in one launch of a GPU
    return [lambda index, i=i: tile_at(packed, index)[i] for i in range(len(tiles))]


def _first(rows: Array, factors: Sequence[Array]) -> Array:
    return spread_first(rows, [factor.swapaxes(-1, -2) for factor in factors])


def _added(total: Any, which: int, found: Sequence[Array], at: Index) -> Any:
    """Adds to the gradients of the outer keys (`which` 0) or values (`which` 1)."""
    added = []
    for pair, tile, column in zip(total, found, at[1:-1], strict=True):
        new = add_at(pair[which], column, tile)
        added.append((new, pair[1]) if which == 0 else (pair[0], new))
    return tuple(added)


def initial_state(
    kind: Kind,
    shape: tuple[int, ...],
    dtype: Any,
    value: Array | None,
    sinks: Array | None,
) -> Any:
    """The state of rows that have seen only the sinks, which are given per row."""
    weighted = None
    if value is not None:
        weighted = jnp.zeros((*shape, value.shape[-1]), dtype)
    state: Any = kind.accumulator.init(shape, dtype, weighted=weighted)
    if sinks is None:
        return state
    assert isinstance(kind, Softmax)
    # A sink is the first score: weight exp(0) = 1, no value.
    return state._replace(max=sinks, sum=jnp.where(sinks == -jnp.inf, 0.0, 1.0))


def _fold(plan: BlockPlan, visit: Callable[..., Any], state: Any) -> Any:
    for i, blocks in enumerate((plan.whole, plan.partial)):
        count = blocks.shape[-1]
        if count == 0:
            continue
        lines = [jnp.asarray(line) for line in blocks]
        lines = match_varying(lines, *jax.tree.leaves(state))
        stop = count if plan.counts is None else plan.counts[i]

        def step(entry: Array, state: Any, partial=i == 1, lines=lines) -> Any:
            # XLA compiles equal instructions of a loop once. The barrier keeps it from
            # fusing the slices of tiles, which are equal, with the sources of indices.
            at = barrier_on_cpu([tile_at(line, entry) for line in lines])
            return visit(partial, at, state)

        state = lax.fori_loop(0, stop, step, state)
    return state
