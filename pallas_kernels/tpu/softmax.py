"""Softmax and logsumexp of rows, for Mosaic TPU.

The grid is (blocks of rows, passes, tiles of columns). A block of whole rows that fits
VMEM is read once and written once; its grid has one pass and one tile. Longer rows are
streamed by tiles: the first pass keeps the running maximum and sum of each lane in
VMEM, 128 lanes per row; the second reads the tiles again and writes the result.
Logsumexp needs the first pass only.

Within a block the kernel works strip by strip: some rows by some columns that fill 16
registers in float32, so that nothing spills. Maxima and sums are kept per lane until a
row ends, because reducing over lanes costs far more than adding registers.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import _devices as devices
from pallas_kernels._results import result

from .softmax_tiles import (
    LANES,
    SLACK_BYTES,
    Tiles,
    choose_tiles,
    held_bytes,
    up,
)

# The initial running maximum: exp(-inf - LEAST) is 0, exp(-inf - -inf) NaN.
LEAST = float(jnp.finfo(jnp.float32).min)


def softmax(
    x: jax.Array,
    *,
    out_dtype: Any = None,
    tiles: Tiles | None = None,
    interpret: Any = False,
) -> jax.Array:
    """exp(x) divided by its sum over the last axis; 0 in a row of -inf.

    Args:
        x: (rows, columns), float32 or bfloat16; -inf does not count, NaN and +inf make
            their row NaN.
        out_dtype: Dtype of the result, float32 or bfloat16; None for that of `x`.
        tiles: None chooses.
        interpret: As in `pallas_call`.

    Returns:
        In the shape of `x`; computed in float32.

    Cost: reads `x` and writes as much once; reads it twice if 8 rows do not fit VMEM.
    """
    return _call(x, jnp.dtype(out_dtype or x.dtype), tiles, interpret)


def logsumexp(
    x: jax.Array, *, tiles: Tiles | None = None, interpret: Any = False
) -> jax.Array:
    """log(sum(exp(x))) over the last axis; -inf in a row of -inf, +inf in one with it.

    Args:
        x: (rows, columns), float32 or bfloat16; NaN makes its row NaN.
        tiles: None chooses.
        interpret: As in `pallas_call`.

    Returns:
        (rows,) in float32.

    Cost: reads `x` once.
    """
    return _call(x, None, tiles, interpret)


def _call(
    x: jax.Array, out_dtype: Any, tiles: Tiles | None, interpret: Any
) -> jax.Array:
    (rows, columns), writes = x.shape, out_dtype is not None
    if tiles is None:
        tiles = choose_tiles(rows, columns, x.dtype, out_dtype, devices.tpu())
    blocks, count = pl.cdiv(rows, tiles.rows), pl.cdiv(columns, tiles.columns)
    passes = 2 if writes and count > 1 else 1
    if writes:
        out_shape = result(x.shape, out_dtype, x)
        # In the first pass, which writes nothing, the first block of the second pass.
        out_spec = pl.BlockSpec(
            (tiles.rows, tiles.columns),
            lambda block, phase, tile: (
                block,
                lax.select(phase == passes - 1, tile, jnp.zeros_like(tile)),
            ),
        )
    else:
        lanes = up(tiles.rows, LANES)
        out_shape = result((blocks, 1, lanes), jnp.float32, x)
        out_spec = pl.BlockSpec((1, 1, lanes), lambda block, phase, tile: (block, 0, 0))
    block_bytes = tiles.rows * tiles.columns * held_bytes(x.dtype, out_dtype)
    found = pl.pallas_call(
        functools.partial(_kernel, columns=columns, tiles=tiles, writes=writes),
        out_shape=out_shape,
        grid=(blocks, passes, count),
        in_specs=[
            pl.BlockSpec(
                (tiles.rows, tiles.columns), lambda block, phase, tile: (block, tile)
            )
        ],
        out_specs=out_spec,
        scratch_shapes=[pltpu.VMEM((tiles.rows, LANES), jnp.float32)] * 2,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=block_bytes + SLACK_BYTES,
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * x.size,
            transcendentals=(1 + writes) * x.size,
            bytes_accessed=(passes + writes) * x.nbytes,
        ),
        interpret=interpret,
        name="softmax" if writes else "logsumexp",
    )(x)
    return found if writes else found[:, 0, : tiles.rows].reshape(-1)[:rows]


def _kernel(
    x_ref, out_ref, max_ref, sum_ref, *, columns: int, tiles: Tiles, writes: bool
):
    phase, tile = pl.program_id(1), pl.program_id(2)
    count = pl.cdiv(columns, tiles.columns)
    is_last = tile == count - 1
    # Only the last tile is ragged, and its end is static.
    here = columns - (count - 1) * tiles.columns
    ragged_chunks, rest = divmod(here, tiles.chunk)
    chunks = ragged_chunks
    if count > 1:
        chunks = jnp.where(is_last, ragged_chunks, tiles.columns // tiles.chunk)
    tail = up(rest, LANES)

    def scores(rows, start, width):
        return x_ref[rows, pl.ds(start, width)].astype(jnp.float32)

    def tail_scores(rows):
        z = scores(rows, ragged_chunks * tiles.chunk, tail)
        column = lax.broadcasted_iota(jnp.int32, z.shape, 1)
        return jnp.where(column < rest, z, -jnp.inf)

    def fold(rows, state):
        def visit(i, state):
            start = pl.multiple_of(i * tiles.chunk, LANES)
            return _folded(state, scores(rows, start, tiles.chunk))

        return lax.fori_loop(0, chunks, visit, state)

    def fold_tail(rows, state):
        return _folded(state, tail_scores(rows)) if rest else state

    def write(rows, top, inverse):
        def visit(i, _):
            start = pl.multiple_of(i * tiles.chunk, LANES)
            _write(out_ref, rows, start, scores(rows, start, tiles.chunk), top, inverse)

        lax.fori_loop(0, chunks, visit, None)

    def write_tail(rows, top, inverse):
        if rest:
            start = ragged_chunks * tiles.chunk
            _write(out_ref, rows, start, tail_scores(rows), top, inverse)

    nothing = (
        jnp.full((tiles.strip, LANES), LEAST, jnp.float32),
        jnp.zeros((tiles.strip, LANES), jnp.float32),
    )
    if count == 1:

        @_for_strips(tiles)
        def _(rows):
            state = fold_tail(rows, fold(rows, nothing))
            if writes:
                top, inverse = _normalizer(*state)
                write(rows, top, inverse)
                write_tail(rows, top, inverse)
            else:
                max_ref[rows] = _logsumexp(*state)

    else:

        @pl.when((phase == 0) & (tile == 0))
        def _():
            max_ref[...] = jnp.full_like(max_ref, LEAST)
            sum_ref[...] = jnp.zeros_like(sum_ref)

        @pl.when(phase == 0)
        def _():
            @_for_strips(tiles)
            def _(rows):
                state = fold(rows, (max_ref[rows], sum_ref[rows]))
                max_ref[rows], sum_ref[rows] = state

        @pl.when((phase == 0) & is_last)
        def _():
            @_for_strips(tiles)
            def _(rows):
                state = fold_tail(rows, (max_ref[rows], sum_ref[rows]))
                if writes:
                    max_ref[rows], sum_ref[rows] = _normalizer(*state)
                else:
                    max_ref[rows] = _logsumexp(*state)

        if writes:

            @pl.when(phase == 1)
            def _():
                _for_strips(tiles)(
                    lambda rows: write(rows, max_ref[rows], sum_ref[rows])
                )

            @pl.when((phase == 1) & is_last)
            def _():
                _for_strips(tiles)(
                    lambda rows: write_tail(rows, max_ref[rows], sum_ref[rows])
                )

    if not writes:

        @pl.when(is_last)
        def _():
            _write_along_lanes(out_ref, max_ref)


def _for_strips(tiles: Tiles):
    def run(visit):
        def step(strip, _):
            visit(pl.ds(pl.multiple_of(strip * tiles.strip, 8), tiles.strip))

        lax.fori_loop(0, tiles.rows // tiles.strip, step, None)

    return run


def _folded(state, z):
    """Maximum and sum per lane, with more columns added."""
    top, total = state
    registers = _registers(z)
    new = functools.reduce(jnp.maximum, registers, top)
    terms = [jnp.exp(register - new) for register in registers]
    return new, total * jnp.exp(top - new) + _tree_sum(terms)


def _normalizer(top, total):
    """Each row's number to subtract and factor to multiply with, in all lanes."""
    row_top, row_total = _over_lanes(top, total)
    inverse = 1 / jnp.where(row_total == 0, 1, row_total)
    return (jnp.broadcast_to(a, top.shape) for a in (row_top, inverse))


def _logsumexp(top, total):
    row_top, row_total = _over_lanes(top, total)
    # log(0) is -inf, and stays -inf in the sum.
    lse = jnp.where(row_top == jnp.inf, jnp.inf, row_top + jnp.log(row_total))
    return jnp.broadcast_to(lse, top.shape)


def _over_lanes(top, total):
    row_top = top.max(1, keepdims=True)
    return row_top, (total * jnp.exp(top - row_top)).sum(1, keepdims=True)


def _write(out_ref, rows, start, z, top, inverse):
    for i, register in enumerate(_registers(z)):
        y = jnp.exp(register - top) * inverse
        out_ref[rows, pl.ds(start + i * LANES, LANES)] = y.astype(out_ref.dtype)


def _write_along_lanes(out_ref, per_row_ref):
    """Writes per-row numbers, equal in all lanes, along lanes."""
    rows = per_row_ref.shape[0]
    row, lane = (lax.broadcasted_iota(jnp.int32, (8, LANES), i) for i in (0, 1))
    offset = lane - row
    for start in range(0, rows, LANES):

        def visit(i, own, start=start):
            eight = per_row_ref[pl.ds(pl.multiple_of(start + i * 8, 8), 8)]
            return jnp.where(offset == i * 8, eight, own)

        steps = min(LANES, rows - start) // 8
        own = lax.fori_loop(0, steps, visit, jnp.zeros((8, LANES), jnp.float32))
        out_ref[0, :, pl.ds(start, LANES)] = own.sum(0, keepdims=True)


def _registers(z):
    return [z[:, i : i + LANES] for i in range(0, z.shape[1], LANES)]


def _tree_sum(terms):
    while len(terms) > 1:
        pairs = zip(terms[::2], terms[1::2], strict=False)
        odd = terms[-1:] if len(terms) % 2 else []
        terms = [a + b for a, b in pairs] + odd
    return terms[0]
