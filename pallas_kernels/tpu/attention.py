r"""Attention over the blocks that a mask leaves, forward.

The grid is (batch entry, query head, entry of a list of blocks); see
`attention_lists.py` for the list. A step holds a block of queries, of keys and of
values, double-buffered, and the state of its rows in scratch: the maximum and the sum
per lane, (block_query, 128) each, and the weighted sum of values, (block_query, E), all
float32. The state starts at the first entry of a row of blocks and is written at the
last one. Scores are computed in pieces of some queries by some keys, which stay in
registers as far as they fit.

Arrays in the user's layout, (B, T, N, H), are transposed to (B, N, T, H), in which the
rows of one head are a block. Inside a program the compiler produces projections in that
layout; arguments of the program are copied once.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._attention_extras import NOTHING, Extras
from pallas_kernels._results import result

from .attention_blocks import (
    Call,
    add,
    blocks_by_row,
    by_row,
    cost,
    lanes,
    passes,
    stored_length,
    taken,
    widths,
    zero_beyond,
)
from .attention_extras import Layout, operands_of
from .attention_form import Form
from .attention_lists import ALL, SOME, Entry
from .attention_pieces import by_buffer, chunk_of, over_pieces, over_slices
from .attention_tiles import LANES, Tiles, parts_of
from .attention_weights import LOG2_E
from .bfloat16_parts import product


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    entries: Any,
    *,
    form: Form,
    tiles: Tiles,
    out_dtype: Any,
    sinks: jax.Array | None = None,
    mask_scalars: jax.Array | None = None,
    extras: Extras = NOTHING,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Weighted means of values, and the normalizers.

    Args:
        query: (B, T, N, H).
        key: (B, S, K, H), N a multiple of K.
        value: (B, S, K, E).
        entries: Result of `lists` by rows of blocks of queries, (lists, entries).
        form: Static options.
        tiles: Sizes of blocks, as in the lists, and of pieces.
        out_dtype: The dtype of the means.
        sinks: (N,); one more score per head. Only for softmax.
        mask_scalars: (B, n) int32, arguments of the mask besides positions.
        extras: A boolean array, a bias, and arguments of the mask per position.
        interpret: As in `pallas_call`.

    Returns:
        (B, T, N, E), and float32 (B, T, N): the logsumexp in nats, or the sum.
    """
    batch, length, heads, features = query.shape
    _, _, key_heads, value_features = value.shape
    groups = heads // key_heads
    scalars = []
    if mask_scalars is not None:
        scalars.append(mask_scalars.reshape(-1))
    if sinks is not None:
        scalars.append(sinks.astype(jnp.float32))
    rows, columns, per_row = by_row(tiles, groups)
    operands = (query, key, value)
    more, layout = operands_of(extras), Layout(parts_of(extras), tiles)
    varying = (*operands, *more)
    count = entries.shape[0] * entries.shape[1]
    stored = stored_length(length, tiles.query, entries)
    wide = lambda *shape: pltpu.VMEM(shape, jnp.float32)
    found = Call(
        functools.partial(
            _forward_kernel,
            form=form,
            layout=layout,
            has_mask_scalars=mask_scalars is not None,
            has_sinks=sinks is not None,
        ),
        (batch, heads, entries.shape[1]),
        scalars,
        [*(jnp.swapaxes(x, 1, 2) for x in operands), *more],
        [
            *(rows(features), columns(features), columns(value_features)),
            *layout.specs(blocks_by_row),
        ],
        [
            result((batch, heads, stored, value_features), out_dtype, *varying),
            result((batch, heads, 1, stored), jnp.float32, *varying),
        ],
        [rows(value_features), per_row],
        [
            wide(tiles.query, LANES),
            wide(tiles.query, LANES),
            wide(tiles.query, value_features),
            *layout.scratch(),
            *[wide(tiles.rows, tiles.keys)] * tiles.buffers,
            *[pltpu.VMEM((tiles.rows, tiles.keys), value.dtype)] * tiles.buffers,
            *[wide(tiles.rows, LANES)] * tiles.buffers,
        ],
        ("parallel", "parallel", "arbitrary"),
        cost(
            batch * heads * count,
            tiles,
            products=features + value_features,
            column_bytes=features * key.dtype.itemsize
            + value_features * value.dtype.itemsize,
        ),
        "block_attention",
        interpret,
    ).run(entries)
    out, normalizer = found
    out, normalizer = out[:, :, :length], normalizer[:, :, 0, :length]
    return jnp.swapaxes(out, 1, 2), jnp.swapaxes(normalizer, 1, 2)


def _forward_kernel(entries_ref, *refs, form, layout, has_mask_scalars, has_sinks):
    refs, tiles = list(refs), layout.tiles
    mask_ref = refs.pop(0) if has_mask_scalars else None
    sinks_ref = refs.pop(0) if has_sinks else None
    query_ref, key_ref, value_ref = taken(refs, 3)
    extras_refs = layout.taken(refs)
    out_ref, normalizer_ref, top_ref, sum_ref, out_sum_ref = taken(refs, 5)
    extras = layout.reader(extras_refs, refs)
    scores_refs, weights_refs, factor_refs = by_buffer(refs, tiles.buffers)
    chunks = tiles.keys // tiles.chunk
    batch, head, step = (pl.program_id(axis) for axis in range(3))
    entry = Entry(entries_ref[step])
    weights, masking = form.weights, form.masking

    @pl.when(entry.is_first)
    def _():
        top_ref[...] = jnp.full_like(top_ref, -jnp.inf)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        out_sum_ref[...] = jnp.zeros_like(out_sum_ref)
        extras.start_row()
        if sinks_ref is not None:
            # A sink is the first score: weight 1, no value.
            sink = sinks_ref[head] * LOG2_E
            lane = lax.broadcasted_iota(jnp.int32, sum_ref.shape, 1)
            one = jnp.where(sink == -jnp.inf, 0.0, 1.0)
            top_ref[...] = jnp.full_like(top_ref, sink)
            sum_ref[...] = jnp.where(lane == 0, one, 0.0)

    def visit(partial: bool) -> None:
        straight = tiles.overlapped and layout.is_light(form) and not partial

        def multiply(
            take: Any, fresh: bool, buffer: int, at: tuple[Any, Any], i: Any
        ) -> None:
            q = take(0, query_ref[pl.ds(at[0], tiles.rows), :])
            k = take(1, key_ref[chunk_of(at[1], i, tiles.chunk), :])
            here = (slice(None), chunk_of(0, i, tiles.chunk))
            add(scores_refs[buffer], here, product(q, k, (1, 1)), fresh)

        def weigh(buffer: int, at: tuple[Any, Any], i: Any) -> None:
            def one(_: Any, here: Any, rows: Any) -> None:
                def masked(numbers: Any) -> Any:
                    starts = (
                        entry.row * tiles.query + rows.start,
                        entry.column * tiles.key + at[1],
                    )
                    return masking.of(products.shape, starts, batch, mask_ref, numbers)

                products = scores_refs[buffer][here, :]
                columns = pl.ds(at[1], tiles.keys)
                z, _, ok = extras.scores(
                    form, products, rows, columns, masked if partial else None
                )
                e = weights.entries(z)
                if ok is not None:
                    e = jnp.where(ok, e, weights.absent)
                p, total = e, sum_ref[rows, :]
                if weights.is_log:
                    before = top_ref[rows, :]
                    top = jnp.maximum(before, e.max(1, keepdims=True))
                    shift = jnp.where(top == -jnp.inf, 0.0, top)
                    factor = jnp.exp2(before - shift)
                    p = jnp.exp2(e - lanes(shift, tiles.keys))
                    total = total * factor
                    top_ref[rows, :] = top
                    factor_refs[buffer][here, :] = factor
                sum_ref[rows, :] = total + _by_lanes(p)
                weights_refs[buffer][here, :] = p.astype(value_ref.dtype)

            over_slices((tiles.rows, tiles.keys), chunks, at[0], i, straight, one)

        def shrink(buffer: int, at: tuple[Any, Any], i: Any) -> None:
            def one(_: Any, here: Any, rows: Any) -> None:
                kept = out_sum_ref[rows, :]
                factor = lanes(factor_refs[buffer][here, :], kept.shape[1])
                out_sum_ref[rows, :] = kept * factor

            over_slices((tiles.rows, tiles.keys), chunks, at[0], i, straight, one)

        def gather(
            take: Any, _: bool, buffer: int, at: tuple[Any, Any], i: Any
        ) -> None:
            rows, chunk = pl.ds(at[0], tiles.rows), chunk_of(at[1], i, tiles.chunk)
            p = take(0, weights_refs[buffer][:, chunk_of(0, i, tiles.chunk)])
            for width in widths(value_ref.shape[1]):
                v = value_ref[chunk, width]
                if partial:
                    start = entry.column * tiles.key + chunk.start
                    v = zero_beyond(v, start, masking.key_length, tiles.key)
                out_sum_ref[rows, width] += product(p, take(1, v), (1, 0))

        over_pieces(
            (tiles.query, tiles.key),
            (tiles.rows, tiles.keys),
            chunks,
            straight,
            (
                passes((query_ref.dtype, key_ref.dtype), form.precision, multiply),
                [weigh],
                passes((value_ref.dtype,) * 2, form.precision, gather),
            ),
            shrink if weights.is_log else None,
        )

    pl.when(entry.kind == ALL)(functools.partial(visit, False))
    pl.when(entry.kind == SOME)(functools.partial(visit, True))

    @pl.when(entry.is_last)
    def _():
        def finish(i: Any, _: None) -> None:
            rows = chunk_of(0, i, LANES)
            sums = sum_ref[rows, :]
            total = sums.sum(1, keepdims=True)
            empty = total == 0
            safe = jnp.where(empty, 1.0, total)
            out = jnp.where(empty, 0.0, out_sum_ref[rows, :] / safe)
            out_ref[rows, :] = out.astype(out_ref.dtype)
            normalizer = jnp.broadcast_to(total, sums.shape)
            if weights.is_log:
                lse = top_ref[rows, :] * math.log(2.0) + jnp.log(safe)
                normalizer = jnp.where(empty, -jnp.inf, lse)
            normalizer_ref[:, rows] = normalizer.T[:1]

        lax.fori_loop(0, tiles.query // LANES, finish, None)


def _by_lanes(x: Any) -> Any:
    """Sums (rows, columns) to (rows, 128), by additions of registers only."""
    registers = [x[:, i : i + LANES] for i in range(0, x.shape[1], LANES)]
    return functools.reduce(jnp.add, registers)
