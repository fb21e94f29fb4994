"""Attention tile by tile: two loops over the blocks that a mask leaves.

The blocks form flat lists, one step each, so that no list is padded and the time is
that of the visited blocks. The first loop takes the blocks in which every pair attends
and evaluates no mask. The state of all rows is carried: a tile of it is read, added to,
and written back in place. Trip counts are static, which keeps the loops differentiable;
the backward pass below is what makes that unnecessary at first order.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from softlib._sharding import match_varying

from ._plan import BlockPlan
from ._scores import Kind, Result, Softmax
from ._tiles import Operands, Options, Pairs, Tiler, product, scores


class BackwardOperands(NamedTuple):
    """The operands, what the forward pass found, and the cotangents of it."""

    operands: Operands
    out: Float[Array, "B T N E"] | None
    normalizer: Float[Array, "B T N"]
    out_cotangent: Float[Array, "B T N E"] | None
    normalizer_cotangent: Float[Array, "B T N"]


class Gradient(NamedTuple):
    """Cotangents of the operands that have one."""

    query: Array
    key: Array
    value: Array | None
    bias: Array | None
    sinks: Array | None
    rows: tuple[Array, ...]


def forward(options: Options, operands: Operands) -> Result:
    tiler, pairs = _prepare(operands)
    kind, plan = options.kind, operands.plan
    query, key = _scaled(options, tiler, operands), tiler.key(operands.key)
    value = None if operands.value is None else tiler.key(operands.value)
    rows = [tiler.query(row)[..., None] for row in operands.rows]

    def visit(partial: bool, row: Array, column: Array, state: Any) -> Any:
        tile = scores(
            options,
            pairs,
            query[row],
            key[column],
            row,
            column,
            partial=partial,
            key_axis=-1,
        )
        entries = kind.entries(tile.z, tuple(r[row] for r in rows))
        if tile.ok is not None:
            entries = jnp.where(tile.ok, entries, kind.absent)
        weigh = None
        if value is not None:
            weigh = lambda weights: product(weights, value[column], options)
        before = jax.tree.map(lambda leaf: leaf[row], state)
        after = kind.accumulator.update(before, entries, weigh=weigh)
        return jax.tree.map(lambda leaf, new: leaf.at[row].set(new), state, after)

    sinks = operands.sinks
    if sinks is not None:
        sinks = jnp.broadcast_to(
            sinks.astype(operands.dtype)[None, None, :], operands.query.shape[:-1]
        )
        sinks = tiler.query(sinks)
    state = initial_state(kind, query.shape[:-1], operands.dtype, value, sinks)
    state = _fold(plan, visit, match_varying(state, operands.query))
    found = kind.finalize(state)
    out = found.out
    if out is not None:
        out = tiler.query_back(out).astype(options.out_dtype)
    top = None if found.max is None else tiler.query_back(found.max)
    return Result(out, tiler.query_back(found.normalizer), top)


def backward(options: Options, backward: BackwardOperands) -> Gradient:
    """One pass, five products per tile, with the gradients of all rows carried.

    Tiles have the keys first: then no product has a transposed left operand, given the
    keys with their features first and a gradient of the queries in that layout.
    """
    operands = backward.operands
    tiler, pairs = _prepare(operands)
    kind, plan, dtype = options.kind, operands.plan, operands.dtype
    query, key = _scaled(options, tiler, operands), tiler.key(operands.key)
    key_features_first = key.swapaxes(-1, -2)
    inverse, delta = row_constants(options, backward)
    sinks = operands.sinks
    if sinks is not None:
        sinks = sinks_gradient(sinks, inverse, delta)
    # A row of padding is an empty one: a bias that all queries share is not 0 there.
    inverse = tiler.query(inverse, fill=jnp.inf if kind.is_log else 0)
    delta = tiler.query(delta)
    rows = [tiler.query(row)[..., None, :] for row in operands.rows]
    value = cotangent = None
    if operands.value is not None:
        assert backward.out_cotangent is not None
        value = tiler.key(operands.value)
        cotangent = tiler.query(backward.out_cotangent)

    def visit(partial: bool, row: Array, column: Array, total: Gradient) -> Gradient:
        q, k = query[row], key[column]
        tile = scores(options, pairs, q, k, row, column, partial=partial, key_axis=-2)
        select = lambda x: x if tile.ok is None else jnp.where(tile.ok, x, 0)
        weights = kind.weights(
            tile.z, tuple(r[row] for r in rows), inverse[row][..., None, :]
        )
        answer = -delta[row][..., None, :]
        dv = total.value
        if value is not None:
            assert cotangent is not None
            assert dv is not None
            do = cotangent[row]
            answer = product(value[column], do.swapaxes(-1, -2), options) + answer
            dv = dv.at[column].add(product(select(weights.p), do, options))
        dz = select(weights.slope * answer)
        bias = total.bias
        if bias is not None:
            bias = pairs.sum_bias(bias, dz, row, column, -2)
        row_gradients = total.rows
        if weights.row_slope is not None:
            first = select(weights.row_slope * answer).sum(-2)
            row_gradients = (row_gradients[0].at[row].add(first), *row_gradients[1:])
        if tile.slope is not None:
            dz = dz * tile.slope
        return total._replace(
            query=total.query.at[row].add(
                product(key_features_first[column], dz, options)
            ),
            key=total.key.at[column].add(product(dz, q, options)),
            value=dv,
            bias=bias,
            rows=row_gradients,
        )

    zeros = Gradient(
        jnp.zeros(query.swapaxes(-1, -2).shape, dtype),
        jnp.zeros(key.shape, dtype),
        None if value is None else jnp.zeros(value.shape, dtype),
        None if pairs.bias is None else jnp.zeros(pairs.bias.shape, dtype),
        None,
        tuple(jnp.zeros(inverse.shape, dtype) for _ in rows),
    )
    total = _fold(plan, visit, match_varying(zeros, operands.query))
    wide = options.wide_gradients
    like = lambda x, y: x if wide else x.astype(y.dtype)
    dq = total.query.swapaxes(-1, -2) * options.scale
    if sinks is not None:
        assert operands.sinks is not None
        sinks = like(sinks, operands.sinks)
    dv = bias = None
    if total.value is not None:
        dv = like(tiler.key_back(total.value), operands.value)
    if total.bias is not None:
        assert operands.bias is not None
        bias = like(tiler.pairs_back(total.bias, operands.bias), operands.bias)
    return Gradient(
        like(tiler.query_back(dq), operands.query),
        like(tiler.key_back(total.key), operands.key),
        dv,
        bias,
        sinks,
        tuple(
            like(tiler.query_back(x), y)
            for x, y in zip(total.rows, operands.rows, strict=True)
        ),
    )


def row_constants(options: Options, backward: BackwardOperands) -> tuple[Array, Array]:
    """Per row: what normalises the weights again, and what `<dO, v>` is compared with.

    The cotangent of a score is `slope * (<dO, v> - delta)`, where `delta` holds
    `<dO, out>` and the cotangent of the normalizer.
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
    """A sink is one more score without a value: its p times minus delta, summed."""
    p = jnp.exp(sinks.astype(inverse.dtype)[None, None, :] - inverse)
    return (-p * delta).sum((0, 1))


def _scaled(options: Options, tiler: Tiler, operands: Operands) -> Array:
    """Tiles of the queries, in which the scale costs nothing per pair."""
    return tiler.query(operands.query) * options.scale


def _prepare(operands: Operands) -> tuple[Tiler, Pairs]:
    tiler = Tiler(operands.plan, operands.groups, operands.dtype)
    dense = None if operands.dense is None else tiler.pairs(operands.dense)
    bias = None if operands.bias is None else tiler.pairs(operands.bias)
    return tiler, Pairs(operands.plan, operands.groups, dense, bias)


def initial_state(
    kind: Kind,
    shape: tuple[int, ...],
    dtype: Any,
    value: Array | None,
    sinks: Array | None,
) -> Any:
    """The state of rows that have seen nothing but the sinks, given per row."""
    weighted = None
    if value is not None:
        weighted = jnp.zeros((*shape, value.shape[-1]), dtype)
    state: Any = kind.accumulator.init(shape, dtype, weighted=weighted)
    if sinks is None:
        return state
    assert isinstance(kind, Softmax)
    # A score that is seen first, with the weight exp(0) = 1 and no value.
    return state._replace(max=sinks, sum=jnp.where(sinks == -jnp.inf, 0.0, 1.0))


def _fold(plan: BlockPlan, visit: Callable[..., Any], state: Any) -> Any:
    for i, blocks in enumerate((plan.whole, plan.partial)):
        count = blocks.shape[-1]
        if count == 0:
            continue
        blocks = match_varying(jnp.asarray(blocks), *jax.tree.leaves(state))
        stop = count if plan.counts is None else plan.counts[i]

        def step(at: Array, state: Any, partial=i == 1, blocks=blocks) -> Any:
            return visit(partial, blocks[0, at], blocks[1, at], state)

        state = lax.fori_loop(0, stop, step, state)
    return state
