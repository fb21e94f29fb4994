"""Attention of few queries to a long cache, for Mosaic TPU.

The cache is (batch, keys, heads, features), and is read in this layout: a block is all
heads of some keys, (keys * heads, features), and a single product gives the scores of
all rows of queries with it. Scores of a row with keys of other heads are masked. They
cost nothing, since the matrix unit is loaded with the keys anyway.

The grid is (batch, blocks of keys). Blocks behind the end of a sequence are neither
copied nor visited. A block is processed chunk by chunk (`decode_chunk`).

With a unified maximum sums are those of exp(z - phi), and no chunk waits for the
maximum of another. At the end of a sequence the kernel checks that every row is in the
valid range, with finite sums; if not, it copies the keys once more and recomputes the
other rows by the running maximum. That second pass also separates heads: a value that
is infinite or NaN, times a weight of 0, would be NaN in the rows of all heads.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._results import result

from .decode_chunk import State, count_of, strip_of, visit_chunk
from .decode_tiles import (
    LANES,
    Form,
    Tiles,
    up,
    vmem_bytes,
)


class Numbers(NamedTuple):
    """Float32 numbers per row, or one for all."""

    scale: jax.Array
    phi: jax.Array | float = 0.0
    low: jax.Array | float = 0.0
    high: jax.Array | float = 0.0


class Sums(NamedTuple):
    """Sums of rows (batch, rows), float32.

    Attributes:
        sum: Sum of exp(z - reference).
        weighted: Sum of exp(z - reference) v, (batch, rows, features of a value).
        max: Largest score, -inf for none.
        min: Smallest score, +inf for none; not used unless `elementwise`.
        again: 1 where the reference is `max` instead of phi.
    """

    sum: jax.Array
    weighted: jax.Array
    max: jax.Array
    min: jax.Array
    again: jax.Array


def decode(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visible: jax.Array,
    numbers: Numbers,
    *,
    form: Form,
    tiles: Tiles,
    interpret: Any = False,
) -> Sums:
    """The sums of attention of a few rows of queries to all keys of their sequence.

    Args:
        query: (batch, rows, features), the rows of one key head side by side.
        key: (batch, keys, heads, features), in the dtype of `query`.
        value: (batch, keys, heads, features of a value). Float32 or bfloat16, as all.
        visible: (batch, rows), int32: number of first keys that a row sees, clipped to
            the number of keys. Keys behind may hold anything.
        numbers: Numbers per row.
        form: Static options.
        tiles: Sizes of the blocks of keys.
        interpret: As in `pallas_call`.

    Cost: reads the keys and values of every sequence once, to the end of a block; twice
    for a sequence with a row out of range. 4 rows keys features heads operations, of
    which one in `heads` is needed.
    """
    batch, given, size = query.shape
    # Rows of each head are padded to fill a register.
    shared = given // form.heads
    rows = up(given, strip_of(value.dtype))
    keys, heads, width = key.shape[1], form.heads, value.shape[3]
    flat = lambda x: x.reshape(batch, keys * heads, x.shape[3])
    visible = jnp.clip(visible, 0, keys)
    longest, shortest = visible.max(1), visible.min(1)
    last = jnp.maximum(count_of(longest, tiles.keys) - 1, 0)
    scalars = jnp.stack([shortest, longest, last]).astype(jnp.int32)
    every = lambda x: jnp.broadcast_to(jnp.asarray(x, jnp.float32), (given,))
    fill = lambda x, value=0: jnp.pad(
        x, [(0, 0), (0, rows - given)], constant_values=value
    )
    # Padded rows must never be out of range.
    ends: tuple[Any, ...] = (0, 0, -jnp.inf, jnp.inf)
    per_row = jnp.concatenate(
        [fill(every(x)[None], end) for x, end in zip(numbers, ends, strict=True)]
    ).T
    query = jnp.pad(query, [(0, 0), (0, rows - given), (0, 0)])
    block = tiles.keys * heads
    of_keys = lambda b, j, scalars: (b, jnp.minimum(j, scalars[2, b]), 0)
    of_batch = lambda b, j, scalars: (b, 0, 0)
    in_place = pl.BlockSpec(memory_space=pl.ANY)
    operands = (query, flat(key), flat(value), fill(visible)[:, :, None], per_row)
    vectors = pltpu.VMEM((rows, LANES), jnp.float32)
    found, statistics = pl.pallas_call(
        functools.partial(_kernel, form=form, tiles=tiles, shared=shared),
        out_shape=(
            result((batch, rows, width), jnp.float32, operands),
            result((batch, rows, 4), jnp.float32, operands),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, pl.cdiv(keys, tiles.keys)),
            in_specs=[
                pl.BlockSpec((1, rows, size), of_batch),
                pl.BlockSpec((1, block, size), of_keys),
                pl.BlockSpec((1, block, width), of_keys),
                pl.BlockSpec((1, rows, 1), of_batch),
                pl.BlockSpec((rows, 4), lambda b, j, scalars: (0, 0)),
                *([in_place] * 2 if form.falls_back else []),
            ],
            out_specs=[
                pl.BlockSpec((1, rows, width), of_batch),
                pl.BlockSpec((1, rows, 4), of_batch),
            ],
            scratch_shapes=[
                pltpu.VMEM((rows, width), jnp.float32),
                *(vectors, vectors, vectors),
                pltpu.VMEM((rows, tiles.chunk * heads), jnp.float32),
                pltpu.VMEM((rows, tiles.chunk * heads), value.dtype),
                *(_second_pass(block, key, value) if form.falls_back else []),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=vmem_bytes(tiles, key, value),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * batch * rows * keys * heads * (size + width),
            transcendentals=batch * rows * keys * heads,
            bytes_accessed=key.nbytes + value.nbytes,
        ),
        interpret=interpret,
        name="decode_attention",
    )(scalars, *operands, *(operands[1:3] if form.falls_back else ()))
    found, statistics = found[:, :given], statistics[:, :given]
    return Sums(statistics[..., 0], found, *(statistics[..., i] for i in (1, 2, 3)))


def _second_pass(block: int, *arrays: jax.Array) -> list[Any]:
    buffers = [pltpu.VMEM((block, x.shape[3]), x.dtype) for x in arrays]
    return [*buffers, pltpu.SemaphoreType.DMA((2,))]


def _kernel(
    scalars_ref,
    query_ref,
    key_ref,
    value_ref,
    visible_ref,
    numbers_ref,
    *refs,
    form: Form,
    tiles: Tiles,
    shared: int,
):
    batch, block = pl.program_id(0), pl.program_id(1)
    sources, refs = (refs[:2], refs[2:]) if form.falls_back else ((), refs)
    out_ref, statistics_ref, *scratch = refs
    state = State(*scratch[:6])
    shortest, longest, last = (scalars_ref[i, batch] for i in range(3))
    chunk = functools.partial(
        *(visit_chunk, query_ref, visible_ref, numbers_ref, state, longest),
        *(form, tiles, shared),
    )

    def visit(index, key_ref, value_ref, *, again: bool):
        """Visits a block of keys, (keys * heads, features)."""
        first, most = index * tiles.keys, tiles.keys // tiles.chunk
        whole = jnp.clip(lax.div(shortest - first, tiles.chunk), 0, most)
        end = jnp.clip(count_of(longest - first, tiles.chunk), 0, most)
        step = lambda masked: (
            lambda i, _: chunk(key_ref, value_ref, first, i, masked=masked, again=again)
        )
        lax.fori_loop(0, whole, step(False), None)
        lax.fori_loop(whole, end, step(True), None)

    @pl.when(block == 0)
    def _():
        state.start()

    @pl.when(block <= last)
    def _():
        visit(block, key_ref.at[0], value_ref.at[0], again=False)

    strip = strip_of(state.weights.dtype)

    def by_strips(visit, carry=None):
        """Visits a few rows at a time, since there are few registers."""
        step = lambda i, carry: visit(
            pl.ds(pl.multiple_of(i * strip, strip), strip), carry
        )
        return lax.fori_loop(0, query_ref.shape[1] // strip, step, carry)

    def finish(rows, worst):
        weighted = state.weighted[rows]
        top = state.top[rows].max(1, keepdims=True)
        total = state.total[rows].sum(1, keepdims=True)
        least = state.least[rows].min(1, keepdims=True)
        good = _is_finite(weighted).min(1, keepdims=True) > 0
        if form.unified:
            good = good & _in_range(form, numbers_ref[rows], top, least, total)
        bad = jnp.where(good | (top == -jnp.inf), 0.0, 1.0)
        out_ref[0, rows] = weighted
        for i, column in enumerate((total, top, least, bad)):
            statistics_ref[0, rows, i : i + 1] = column
        return jnp.maximum(worst, bad.max())

    def replace(rows, _):
        bad = statistics_ref[0, rows, 3:4] > 0
        total = state.total[rows].sum(1, keepdims=True)
        top = state.top[rows].max(1, keepdims=True)
        for i, column in enumerate((total, top)):
            old = statistics_ref[0, rows, i : i + 1]
            statistics_ref[0, rows, i : i + 1] = jnp.where(bad, column, old)
        out_ref[0, rows] = jnp.where(bad, state.weighted[rows], out_ref[0, rows])

    def fetch(index, _):
        buffers, semaphores = scratch[6:8], scratch[8]
        size = tiles.keys * form.heads
        span = pl.ds(pl.multiple_of(index * size, size), size)
        copies = [
            pltpu.make_async_copy(source.at[batch, span], buffer, semaphores.at[i])
            for i, (source, buffer) in enumerate(zip(sources, buffers, strict=True))
        ]
        for copy in copies:
            copy.start()
        for copy in copies:
            copy.wait()
        visit(index, *buffers, again=True)

    @pl.when(block == last)
    def _():
        worst = by_strips(finish, jnp.float32(0))
        if not form.falls_back:
            return

        @pl.when(worst > 0)
        def _():
            state.start()
            # The last block is loaded already; those before it are full.
            visit(block, key_ref.at[0], value_ref.at[0], again=True)
            lax.fori_loop(0, last, fetch, None)
            by_strips(replace)


def _in_range(form: Form, numbers, top, least, total):
    """True for rows in range of the unified maximum; False for NaN."""
    phi, low, high = (numbers[:, i : i + 1] for i in (1, 2, 3))
    good = (top - phi > low) & (top - phi < high) & (jnp.abs(total) < jnp.inf)
    return good & (least - phi > low) if form.elementwise else good


def _is_finite(x):
    """1 where `x` is finite, else 0."""
    return jnp.where(jnp.abs(x) < jnp.inf, 1.0, 0.0)
