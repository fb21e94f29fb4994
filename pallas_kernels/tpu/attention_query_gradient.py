r"""The gradient of the queries of block-sparse attention.

With $p$ the weights, $\delta_i = \langle do_i, o_i \rangle$ minus the cotangent of the
normalizer, and $f'$ the slope of the weights,

    ds_ij = f'_ij (<do_i, v_j> - delta_i)          dq_i = a sum_j ds_ij k_j

Weights are recomputed from the scores and the normalizers. The gradient is summed along
rows of blocks: a kernel owns what it writes, so that there are neither partial results
in memory nor atomic sums.
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
    blocks_by_row,
    by_row,
    column,
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
from .attention_gradient import flat, inputs, store, weights_and_slopes
from .attention_lists import ALL, SOME, Entry
from .attention_pieces import Stage, by_buffer, chunk_of, over_pieces, over_slices
from .attention_tiles import LANES, Tiles, parts_of
from .bfloat16_parts import product


def query_gradient(
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
    out_dtype: Any,
    mask_scalars: jax.Array | None = None,
    extras: Extras = NOTHING,
    interpret: Any = False,
) -> jax.Array:
    """The gradient of the queries.

    Args:
        query: (B, T, N, H).
        key: (B, S, K, H), N a multiple of K.
        value: (B, S, K, E).
        cotangent: Cotangent of the output, (B, T, N, E).
        inverse: Per row, float32 (B, T, N): the logsumexp in nats, +inf for an empty
            row, or one over the sum of the weights, 0 for an empty row.
        delta: Per row, float32 (B, T, N).
        entries: Result of `lists` by rows of blocks of queries.
        form: As in `attention`; so are the other options.
        tiles: Sizes.
        out_dtype: The dtype of the gradient.
        mask_scalars: Arguments of the mask besides positions.
        extras: A boolean array, a bias, and arguments of the mask per position.
        interpret: As in `pallas_call`.

    Returns:
        (B, T, N, H).
    """
    batch, length, heads, features = query.shape
    _, _, key_heads, value_features = value.shape
    groups = heads // key_heads
    rows, columns, per_row = by_row(tiles, groups)
    operands = (query, key, value, cotangent, inverse, delta)
    more, layout = operands_of(extras), Layout(parts_of(extras), tiles)
    wide = lambda *shape: pltpu.VMEM(shape, jnp.float32)
    stored = stored_length(length, tiles.query, entries)
    (found,) = Call(
        functools.partial(
            _query_kernel,
            form=form,
            layout=layout,
            has_mask_scalars=mask_scalars is not None,
        ),
        (batch, heads, entries.shape[1]),
        flat(mask_scalars),
        [*inputs(form, *operands), *more],
        [
            *(rows(features), columns(features), columns(value_features)),
            *(rows(value_features), per_row, per_row),
            *layout.specs(blocks_by_row),
        ],
        [result((batch, heads, stored, features), out_dtype, *operands, *more)],
        [rows(features)],
        [
            wide(tiles.query, LANES),
            wide(tiles.query, LANES),
            wide(tiles.query, features),
            *layout.scratch(),
            *[wide(tiles.rows, tiles.keys)] * (2 * tiles.buffers),
            *[pltpu.VMEM((tiles.rows, tiles.keys), key.dtype)] * tiles.buffers,
        ],
        ("parallel", "parallel", "arbitrary"),
        cost(
            batch * heads * entries.shape[0] * entries.shape[1],
            tiles,
            products=2 * features + value_features,
            column_bytes=features * key.dtype.itemsize
            + value_features * value.dtype.itemsize,
        ),
        "block_attention_query_gradient",
        interpret,
    ).run(entries)
    return jnp.swapaxes(found[:, :, :length], 1, 2)


def _query_kernel(entries_ref, *refs, form, layout, has_mask_scalars):
    refs, tiles = list(refs), layout.tiles
    mask_ref = refs.pop(0) if has_mask_scalars else None
    query_ref, key_ref, value_ref, cotangent_ref = taken(refs, 4)
    inverse_ref, delta_ref = taken(refs, 2)
    extras_refs = layout.taken(refs)
    out_ref, inverse_column_ref, delta_column_ref, sum_ref = taken(refs, 4)
    extras = layout.reader(extras_refs, refs)
    scores_refs, answers_refs, slopes_refs = by_buffer(refs, tiles.buffers)
    chunks = tiles.keys // tiles.chunk
    batch, step = pl.program_id(0), pl.program_id(2)
    entry = Entry(entries_ref[step])
    masking = form.masking

    @pl.when(entry.is_first)
    def _():
        def start(i: Any, _: None) -> None:
            rows = chunk_of(0, i, LANES)
            inverse_column_ref[rows, :] = column(inverse_ref[:, rows])
            delta_column_ref[rows, :] = column(delta_ref[:, rows])

        lax.fori_loop(0, tiles.query // LANES, start, None)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        extras.start_row()

    def visit(partial: bool) -> None:
        straight = tiles.overlapped and layout.is_light(form) and not partial

        def keys_of(ref: Any, chunk: Any, width: Any = slice(None)) -> Any:
            x = ref[chunk, width]
            if not partial:
                return x
            start = entry.column * tiles.key + chunk.start
            return zero_beyond(x, start, masking.key_length, tiles.key)

        def multiply(left_ref: Any, right_ref: Any, out_refs: Any) -> list[Stage]:
            def one(
                take: Any, fresh: bool, buffer: int, at: tuple[Any, Any], i: Any
            ) -> None:
                rows, chunk = pl.ds(at[0], tiles.rows), chunk_of(at[1], i, tiles.chunk)
                left = take(0, left_ref[rows, :])
                right = take(1, keys_of(right_ref, chunk))
                here = (slice(None), chunk_of(0, i, tiles.chunk))
                add(out_refs[buffer], here, product(left, right, (1, 1)), fresh)

            return passes((left_ref.dtype, right_ref.dtype), form.precision, one)

        def weigh(buffer: int, at: tuple[Any, Any], i: Any) -> None:
            # Rows are not summed: fewer columns at a time take fewer registers.
            width = tiles.keys if straight else min(tiles.keys, 2 * LANES)

            def group(columns: Any, here: Any, rows: Any) -> None:
                def masked(numbers: Any) -> Any:
                    starts = (
                        entry.row * tiles.query + rows.start,
                        entry.column * tiles.key + lane.start,
                    )
                    return masking.of(products.shape, starts, batch, mask_ref, numbers)

                per_pair = lambda ref: lanes(ref[rows, :], width)
                lane = pl.ds(at[1] + columns.start, columns.size)
                products = scores_refs[buffer][here, columns]
                z, bent, ok = extras.scores(
                    form, products, rows, lane, masked if partial else None
                )
                _, slope = weights_and_slopes(form, z, ok, per_pair(inverse_column_ref))
                ds = slope * (
                    answers_refs[buffer][here, columns] - per_pair(delta_column_ref)
                )
                ds = ds if bent is None else ds * bent
                slopes_refs[buffer][here, columns] = ds.astype(key_ref.dtype)

            over_slices(
                (tiles.rows, tiles.keys), chunks, at[0], i, straight, group, width
            )

        def gather(
            take: Any, _: bool, buffer: int, at: tuple[Any, Any], i: Any
        ) -> None:
            rows, chunk = pl.ds(at[0], tiles.rows), chunk_of(at[1], i, tiles.chunk)
            ds = take(0, slopes_refs[buffer][:, chunk_of(0, i, tiles.chunk)])
            for width in widths(key_ref.shape[1]):
                k = take(1, keys_of(key_ref, chunk, width))
                sum_ref[rows, width] += product(ds, k, (1, 0))

        over_pieces(
            (tiles.query, tiles.key),
            (tiles.rows, tiles.keys),
            chunks,
            straight,
            (
                [
                    *multiply(query_ref, key_ref, scores_refs),
                    *multiply(cotangent_ref, value_ref, answers_refs),
                ],
                [weigh],
                passes((key_ref.dtype,) * 2, form.precision, gather),
            ),
        )

    pl.when(entry.kind == ALL)(functools.partial(visit, False))
    pl.when(entry.kind == SOME)(functools.partial(visit, True))

    @pl.when(entry.is_last)
    def _():
        store(out_ref, sum_ref, form.scale)
