r"""The gradients of the keys and values of block-sparse attention.

    dv_j = sum_i p_ij do_i                         dk_j = a sum_i ds_ij q_i

in the notation of `attention_query_gradient`; summed along columns of blocks. The last
grid axis visits the query heads of a key head in turn, while the block of keys stays.
Tiles of scores have keys as rows: then no product has a transposed left operand, and
numbers per query lie along lanes, as they do in memory.
"""

import functools
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
    cost,
    passes,
    stored_length,
    taken,
    widths,
    zero_beyond,
)
from .attention_extras import Layout, operands_of
from .attention_form import Form
from .attention_gradient import flat, inputs, store, weights_and_slopes
from .attention_lists import ALL, NOTHING as NO_PAIR, SOME, Entry
from .attention_pieces import Stage, by_buffer, chunk_of, over_pieces, over_slices
from .attention_tiles import LANES, Tiles, parts_of
from .bfloat16_parts import product


def key_value_gradient(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    cotangent: jax.Array,
    inverse: jax.Array,
    delta: jax.Array,
    entries: Any,
    *,
    form: Form,
    tiles: Tiles,
    out_dtypes: tuple[Any, Any],
    mask_scalars: jax.Array | None = None,
    extras: Extras = NOTHING,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """The gradients of keys and values.

    Args:
        query: As in `query_gradient`; so are the following.
        key: (B, S, K, H).
        value: (B, S, K, E).
        cotangent: (B, T, N, E).
        inverse: (B, T, N).
        delta: (B, T, N).
        entries: Result of `lists` by rows of blocks of keys. A block that reaches
            beyond the last query is not whole.
        form: Static options.
        tiles: Sizes.
        out_dtypes: Dtypes of the two gradients.
        mask_scalars: Arguments of the mask besides positions.
        extras: A boolean array, a bias, and arguments of the mask per position.
        interpret: As in `pallas_call`.

    Returns:
        (B, S, K, H) and (B, S, K, E).
    """
    batch, query_length, heads, features = query.shape
    _, length, key_heads, value_features = value.shape
    groups = heads // key_heads
    rows = lambda width: pl.BlockSpec(
        (None, None, tiles.query, width),
        lambda b, n, i, g, entries, *_: (
            *(b, n * groups + g),
            *(Entry(entries[i]).column, 0),
        ),
    )
    columns = lambda width: pl.BlockSpec(
        (None, None, tiles.key, width),
        lambda b, n, i, g, entries, *_: (b, n, Entry(entries[i]).row, 0),
    )
    per_row = pl.BlockSpec(
        (None, None, 1, tiles.query),
        lambda b, n, i, g, entries, *_: (
            *(b, n * groups + g),
            *(0, Entry(entries[i]).column),
        ),
    )
    blocks = lambda b, n, i, g, entries, *_: (
        *(b, n * groups + g),
        *(Entry(entries[i]).column, Entry(entries[i]).row),
    )
    operands = (query, key, value, cotangent, inverse, delta)
    more = operands_of(extras)
    layout = Layout(parts_of(extras), tiles, is_transposed=True)
    varying = (*operands, *more)
    wide = lambda *shape: pltpu.VMEM(shape, jnp.float32)
    stored = stored_length(length, tiles.key, entries)
    row_bytes = features * query.dtype.itemsize
    row_bytes += value_features * cotangent.dtype.itemsize
    found = Call(
        functools.partial(
            _key_kernel,
            form=form,
            layout=layout,
            query_length=query_length,
            has_mask_scalars=mask_scalars is not None,
        ),
        (batch, key_heads, entries.shape[1], groups),
        flat(mask_scalars),
        [*inputs(form, *operands), *more],
        [
            *(rows(features), columns(features), columns(value_features)),
            *(rows(value_features), per_row, per_row),
            *layout.specs(blocks),
        ],
        [
            result((batch, key_heads, stored, size), dtype, *varying)
            for size, dtype in zip((features, value_features), out_dtypes, strict=True)
        ],
        [columns(features), columns(value_features)],
        [
            wide(tiles.key, features),
            wide(tiles.key, value_features),
            *layout.scratch(),
            *[wide(tiles.keys, tiles.rows)] * (2 * tiles.buffers),
            *[pltpu.VMEM((tiles.keys, tiles.rows), cotangent.dtype)] * tiles.buffers,
            *[pltpu.VMEM((tiles.keys, tiles.rows), query.dtype)] * tiles.buffers,
        ],
        ("parallel", "parallel", "arbitrary", "arbitrary"),
        cost(
            batch * heads * entries.shape[0] * entries.shape[1],
            tiles,
            products=2 * (features + value_features),
            column_bytes=row_bytes * tiles.query // tiles.key,
        ),
        "block_attention_key_gradient",
        interpret,
    ).run(entries)
    dk, dv = (jnp.swapaxes(x[:, :, :length], 1, 2) for x in found)
    return dk, dv


def _key_kernel(entries_ref, *refs, form, layout, query_length, has_mask_scalars):
    refs, tiles = list(refs), layout.tiles
    mask_ref = refs.pop(0) if has_mask_scalars else None
    query_ref, key_ref, value_ref, cotangent_ref = taken(refs, 4)
    inverse_ref, delta_ref = taken(refs, 2)
    extras_refs = layout.taken(refs)
    key_out_ref, value_out_ref, key_sum_ref, value_sum_ref = taken(refs, 4)
    extras = layout.reader(extras_refs, refs)
    scores_refs, answers_refs, weights_refs, slopes_refs = by_buffer(
        refs, tiles.buffers
    )
    chunks = tiles.rows // tiles.chunk
    batch, step, group = (pl.program_id(axis) for axis in (0, 2, 3))
    entry = Entry(entries_ref[step])
    weights, masking = form.weights, form.masking

    @pl.when(entry.is_first & (group == 0))
    def _():
        key_sum_ref[...] = jnp.zeros_like(key_sum_ref)
        value_sum_ref[...] = jnp.zeros_like(value_sum_ref)
        extras.start_row()

    if layout.turns_blocks:
        pl.when(entry.kind != NO_PAIR)(lambda: extras.start_block(group == 0))

    def visit(partial: bool) -> None:
        light = layout.is_light(form) and form.softcap is None
        straight = tiles.overlapped and light and not partial

        def queries_of(ref: Any, chunk: Any, width: Any = slice(None)) -> Any:
            x = ref[chunk, width]
            if not partial:
                return x
            start = entry.column * tiles.query + chunk.start
            return zero_beyond(x, start, query_length, tiles.query)

        def multiply(left_ref: Any, right_ref: Any, out_refs: Any) -> list[Stage]:
            def one(
                take: Any, fresh: bool, buffer: int, at: tuple[Any, Any], i: Any
            ) -> None:
                rows, chunk = pl.ds(at[0], tiles.keys), chunk_of(at[1], i, tiles.chunk)
                left = take(0, left_ref[rows, :])
                right = take(1, queries_of(right_ref, chunk))
                here = (slice(None), chunk_of(0, i, tiles.chunk))
                add(out_refs[buffer], here, product(left, right, (1, 1)), fresh)

            return passes((left_ref.dtype, right_ref.dtype), form.precision, one)

        def weigh(buffer: int, at: tuple[Any, Any], i: Any) -> None:
            def group(columns: Any, here: Any, rows: Any) -> None:
                start = entry.column * tiles.query + at[1] + columns.start
                lane = pl.ds(at[1] + columns.start, columns.size)
                inverse, delta, real = inverse_ref[:, lane], delta_ref[:, lane], None
                if partial and query_length % tiles.query:
                    # A padded query is made an empty row.
                    query = start + lax.broadcasted_iota(jnp.int32, delta.shape, 1)
                    nothing = jnp.inf if weights.is_log else 0.0
                    real = query < query_length
                    inverse = jnp.where(real, inverse, nothing)
                    delta = jnp.where(real, delta, 0.0)

                def masked(numbers: Any) -> Any:
                    starts = (start, entry.row * tiles.key + rows.start)
                    return masking.of(
                        *(products.shape, starts, batch, mask_ref, numbers),
                        transposed=True,
                    )

                products = scores_refs[buffer][here, columns]
                z, bent, ok = extras.scores(
                    form, products, rows, lane, masked if partial else None, real
                )
                p, slope = weights_and_slopes(form, z, ok, inverse)
                weights_refs[buffer][here, columns] = p.astype(cotangent_ref.dtype)
                ds = slope * (answers_refs[buffer][here, columns] - delta)
                ds = ds if bent is None else ds * bent
                slopes_refs[buffer][here, columns] = ds.astype(query_ref.dtype)

            # Rows are not summed: fewer columns at a time take fewer registers.
            width = tiles.rows if straight else min(tiles.rows, 2 * LANES)
            over_slices(
                (tiles.keys, tiles.rows), chunks, at[0], i, straight, group, width
            )

        def gather(ref: Any, pairs_refs: Any, total_ref: Any) -> list[Stage]:
            def one(
                take: Any, _: bool, buffer: int, at: tuple[Any, Any], i: Any
            ) -> None:
                rows, chunk = pl.ds(at[0], tiles.keys), chunk_of(at[1], i, tiles.chunk)
                here = take(0, pairs_refs[buffer][:, chunk_of(0, i, tiles.chunk)])
                for width in widths(ref.shape[1]):
                    x = take(1, queries_of(ref, chunk, width))
                    total_ref[rows, width] += product(here, x, (1, 0))

            return passes((ref.dtype,) * 2, form.precision, one)

        over_pieces(
            (tiles.key, tiles.query),
            (tiles.keys, tiles.rows),
            chunks,
            straight,
            (
                [
                    *multiply(key_ref, query_ref, scores_refs),
                    *multiply(value_ref, cotangent_ref, answers_refs),
                ],
                [weigh],
                [
                    *gather(cotangent_ref, weights_refs, value_sum_ref),
                    *gather(query_ref, slopes_refs, key_sum_ref),
                ],
            ),
        )

    pl.when(entry.kind == ALL)(functools.partial(visit, False))
    pl.when(entry.kind == SOME)(functools.partial(visit, True))

    @pl.when(entry.is_last & (group == pl.num_programs(3) - 1))
    def _():
        store(key_out_ref, key_sum_ref, form.scale)
        store(value_out_ref, value_sum_ref, 1.0)
