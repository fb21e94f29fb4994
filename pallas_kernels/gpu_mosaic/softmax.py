"""Softmax and logsumexp of rows, for Mosaic GPU: Hopper and Blackwell.

One warpgroup has one row; the grid runs over rows. A row is read in pieces from memory
into registers, several at a time, so that many reads are in flight. The maximum and the
sum are kept for every element of a piece, and reduced over threads once, at the end of
the row. Softmax keeps the row in shared memory, from which each thread reads back its
own elements; a row that does not fit is read a second time.

The last piece starts early enough to be full. Repeated elements do not count, and are
written twice with the same value. Rows need no alignment: loads and stores are as wide
as the length of a row allows.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _devices as devices
from pallas_kernels._results import result

from .softmax_tiles import Tiles, choose_tiles

# The initial running maximum: exp(-inf - LEAST) is 0, exp(-inf - -inf) NaN.
LEAST = float(jnp.finfo(jnp.float32).min)


def softmax(
    x: jax.Array,
    *,
    out_dtype: Any = None,
    tiles: Tiles | None = None,
    interpret: Any = None,
) -> jax.Array:
    """exp(x) divided by its sum over the last axis; 0 in a row of -inf.

    Args:
        x: (rows, columns) with 128 columns or more, float32, bfloat16 or float16; -inf
            does not count, NaN and +inf make their row NaN.
        out_dtype: Dtype of the result, one of the same; None for that of `x`.
        tiles: None chooses.
        interpret: As in `plgpu.kernel`.

    Returns:
        In the shape of `x`; computed in float32.

    Cost: reads `x` and writes as much once; reads it twice if two rows do not fit the
    shared memory of a multiprocessor.
    """
    return _call(x, jnp.dtype(out_dtype or x.dtype), tiles, interpret)


def logsumexp(
    x: jax.Array, *, tiles: Tiles | None = None, interpret: Any = None
) -> jax.Array:
    """log(sum(exp(x))) over the last axis; -inf in a row of -inf, +inf in one with it.

    Args:
        x: (rows, columns) with 128 columns or more, float32, bfloat16 or float16; NaN
            makes its row NaN.
        tiles: None chooses.
        interpret: As in `plgpu.kernel`.

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
        device = devices.gpu() or devices.H100
        tiles = choose_tiles(columns, x.dtype, device, writes=writes)
    kept = pl.cdiv(columns, tiles.piece) * tiles.piece
    out = (x.shape, out_dtype) if writes else ((rows,), jnp.float32)
    return plgpu.kernel(
        functools.partial(_kernel, tiles=tiles, writes=writes),
        out_type=result(*out, x),
        scratch_types=(plgpu.SMEM((kept,), x.dtype),) if tiles.keeps else (),
        grid=(rows,),
        grid_names=("row",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        kernel_name="softmax" if writes else "logsumexp",
    )(x)


def _kernel(x_ref, out_ref, kept_ref=None, *, tiles: Tiles, writes: bool):
    columns, piece = x_ref.shape[1], tiles.piece
    layout = plgpu.Layout.WG_STRIDED((piece,), vec_size=tiles.vector)
    row = lax.axis_index("row")
    count, rest = pl.cdiv(columns, piece), columns % piece
    groups = (columns // piece) // tiles.group

    def start_of(i):
        """Start of a piece, and True for elements that are not repeated; None: all."""
        if not rest or not isinstance(i, int) or i < count - 1:
            return i * piece, None
        index = plgpu.broadcasted_iota(jnp.int32, (piece,), 0, layout=layout)
        return columns - piece, index >= piece - rest

    def read(i):
        start, _ = start_of(i)
        return plgpu.load(x_ref.at[row, pl.ds(start, piece)], layout=layout)

    def fold(pieces, state):
        top, total = state
        scores = []
        for i, x in zip(pieces, [read(i) for i in pieces], strict=True):
            if kept_ref is not None:
                kept_ref[pl.ds(i * piece, piece)] = x
            z, (_, is_new) = x.astype(jnp.float32), start_of(i)
            scores.append(z if is_new is None else jnp.where(is_new, z, -jnp.inf))
        new = functools.reduce(jnp.maximum, scores, top)
        total = total * jnp.exp(top - new)
        for z in scores:
            total = total + jnp.exp(z - new)
        return new, total

    def write(pieces, top, inverse):
        if kept_ref is None:
            found = [read(i) for i in pieces]
        else:
            spans = [pl.ds(i * piece, piece) for i in pieces]
            found = [plgpu.load(kept_ref.at[at], layout=layout) for at in spans]
        for i, x in zip(pieces, found, strict=True):
            y = jnp.exp(x.astype(jnp.float32) - top) * inverse
            out_ref[row, pl.ds(start_of(i)[0], piece)] = y.astype(out_ref.dtype)

    def visit_all(visit, carry):
        group = tiles.group
        step = lambda g, carry: visit([g * group + i for i in range(group)], carry)
        carry = lax.fori_loop(0, groups, step, carry)
        for i in range(groups * group, count):
            carry = visit([i], carry)
        return carry

    full = lambda value: plgpu.layout_cast(
        jnp.full((piece,), value, jnp.float32), layout
    )
    top, total = visit_all(fold, (full(LEAST), full(0.0)))
    row_top = top.max()
    row_total = (total * jnp.exp(top - row_top)).sum()
    if writes:
        inverse = 1 / jnp.where(row_total == 0, 1, row_total)
        visit_all(lambda pieces, _: write(pieces, row_top, inverse), None)
    else:
        # log(0) is -inf, and stays -inf in the sum.
        lse = jnp.where(row_top == jnp.inf, jnp.inf, row_top + jnp.log(row_total))
        out_ref[row] = lse
