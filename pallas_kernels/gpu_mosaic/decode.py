"""Attention of few queries to a long cache, for Hopper.

The keys of a sequence are divided over `splits` blocks of threads per key head; each
computes its own sums, which the caller adds. A split is a share of the sequence's
length, not of the cache: keys behind the end are not read.

A block is one warpgroup. It prefetches tiles of keys and values into a ring, and
multiplies them with the query rows of the head, padded to 64: matrix units have no
smaller shape, and reading memory takes longer. Padded rows are never written.

With a unified maximum sums are those of exp(z - phi), and no tile waits for the maximum
of another. At the end a block checks that all rows are in the valid range, with finite
sums; if not, it reads its keys once more, with the running maximum.

Shared memory: `stages` tiles of keys and of values, the queries, 32 columns of the
output. Registers per thread: E / 2 for the output, `KEYS` / 2 for scores.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._results import result

from . import attention_ring as ring
from .attention_scores import across
from .attention_tiles import FEATURES, ROWS
from .decode_tiles import (
    COLUMNS,
    KEYS,
    Tiles,
)

STATISTICS = ("sum", "max", "min", "reference", "lost", "bad")


@dataclasses.dataclass(frozen=True)
class Form:
    """Options of a call: Python values, each of which makes another kernel.

    Attributes:
        softcap: c in c * tanh(z / c); None for none.
        unified: Whether sums are relative to the reference phi.
        elementwise: Whether every score must lie in the valid range.
        falls_back: Whether a block that leaves the range starts again.
    """

    softcap: float | None = None
    unified: bool = False
    elementwise: bool = False
    falls_back: bool = True


class Numbers(NamedTuple):
    """Numbers per row of queries, (heads, rows) float32 each."""

    scale: jax.Array
    phi: jax.Array
    low: jax.Array
    high: jax.Array


class Sums(NamedTuple):
    """Sums over each split of the keys: (batch, heads, splits, rows), float32.

    Attributes:
        sum: Sum of exp(z - reference).
        weighted: Sum of exp(z - reference) v, with the features of a value last.
        max: Largest score, -inf for none.
        min: Smallest score, +inf for none; not used unless `elementwise`.
        reference: phi, or the maximum if the block started again or there is no phi;
            -inf for no score.
        lost: 1 where a sum by the unified maximum is not finite.
        bad: 1 where this or the range makes the block start again.
    """

    sum: jax.Array
    weighted: jax.Array
    max: jax.Array
    min: jax.Array
    reference: jax.Array
    lost: jax.Array
    bad: jax.Array


def decode(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visible: jax.Array,
    numbers: Numbers,
    *,
    form: Form,
    tiles: Tiles,
    interpret: Any = None,
) -> Sums:
    """The sums of attention of a few rows of queries to all keys of their sequence.

    Args:
        query: (batch, heads, rows, features), at most 64 rows per key head.
        key: (batch, keys, heads, features), in the dtype of `query`; keys a multiple of
            8, features of 64.
        value: (batch, keys, heads, features of a value). Bfloat16 or float16, as all.
        visible: (batch, rows), int32: number of first keys that a row sees, clipped to
            the number of keys. Keys behind may hold anything.
        numbers: Numbers per row.
        form: Static options.
        tiles: Splits and stages.
        interpret: As in `plgpu.kernel`.

    Cost: reads the keys and values of every sequence once, those of a split with a row
    out of range twice.
    """
    batch, heads, given, features = query.shape
    keys, width = key.shape[1], value.shape[3]
    rows = pl.cdiv(given, 8) * 8
    visible = jnp.clip(visible, 0, keys).astype(jnp.int32)
    spans = jnp.stack([visible.min(1), visible.max(1)], axis=1)
    fill = lambda x, to: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, to - given)])
    query = jnp.pad(query, [(0, 0), (0, 0), (0, rows - given), (0, 0)])
    per_row = fill(jnp.stack(numbers).astype(jnp.float32), ROWS)
    operands = (query, key, value, fill(visible, ROWS), spans, per_row)
    shape = (batch, heads, tiles.splits)
    scratch: dict[str, Any] = {
        "q": ring.swizzled((ROWS, features), query.dtype),
        "k": ring.swizzled((tiles.stages, KEYS, features), key.dtype),
        "v": ring.swizzled((tiles.stages, KEYS, width), value.dtype),
        "columns": _columns(),
        "statistics": plgpu.SMEM((len(STATISTICS), ROWS), jnp.float32),
        "staging": ring.swizzled((ROWS, KEYS), value.dtype) if interpret else None,
        "q_ready": plgpu.Barrier(),
        "k_ready": plgpu.Barrier(num_barriers=tiles.stages),
        "v_ready": plgpu.Barrier(num_barriers=tiles.stages),
    }
    found, statistics = plgpu.kernel(
        functools.partial(_kernel, form=form, given=given),
        out_type=(
            result((*shape, rows, width), jnp.float32, *operands),
            result((*shape, len(STATISTICS), ROWS), jnp.float32, *operands),
        ),
        scratch_types=scratch,
        grid=(tiles.splits, heads, batch),
        grid_names=("split", "head", "batch"),
        kernel_name="decode_attention",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(*operands)
    of = {name: statistics[..., i, :given] for i, name in enumerate(STATISTICS)}
    return Sums(weighted=found[..., :given, :], **of)


def _columns() -> Any:
    transforms = (plgpu.TilingTransform((8, COLUMNS)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM((ROWS, COLUMNS), jnp.float32, transforms=transforms)


class _Tile(NamedTuple):
    """A tile of keys: its step in the ring, and the index of its first key."""

    step: Any
    first: Any


def _kernel(
    query_ref,
    key_ref,
    value_ref,
    visible_ref,
    spans_ref,
    numbers_ref,
    out_ref,
    statistics_ref,
    *,
    form: Form,
    given: int,
    q,
    k,
    v,
    columns,
    statistics,
    staging,
    q_ready,
    k_ready,
    v_ready,
):
    split, head, batch = (lax.axis_index(name) for name in ("split", "head", "batch"))
    rows, stages = query_ref.shape[2], k.shape[0]
    shortest, longest = spans_ref[batch, 0], spans_ref[batch, 1]
    count = lax.div(longest + (KEYS - 1), jnp.int32(KEYS))
    splits = jnp.int32(out_ref.shape[2])
    share = lax.div(count + (splits - 1), splits)
    begin = jnp.minimum(split * share, count)
    end = jnp.minimum(begin + share, count)
    whole = jnp.clip(lax.div(shortest, jnp.int32(KEYS)), begin, end)
    steps = end - begin

    plgpu.copy_gmem_to_smem(query_ref.at[batch, head], q.at[pl.ds(0, rows)], q_ready)
    plgpu.barrier_wait(q_ready)
    number = lambda i: _per_row(numbers_ref.at[i, head])

    def fetch(step, tile):
        slot, span = lax.rem(step, stages), pl.ds(tile * KEYS, KEYS)
        source = (batch, span, head)
        plgpu.copy_gmem_to_smem(key_ref.at[source], k.at[slot], k_ready.at[slot])
        plgpu.copy_gmem_to_smem(value_ref.at[source], v.at[slot], v_ready.at[slot])

    def scores(tile: _Tile, *, partial: bool):
        slot = lax.rem(tile.step, stages)
        plgpu.barrier_wait(k_ready.at[slot])
        z = ring.product(q, ring.transposed(k.at[slot]), KEYS)
        z = z * across(number(0), z.shape)
        if form.softcap is not None:
            z = form.softcap * _tanh(z * (1 / form.softcap))
        if partial:
            here = across(_per_row(visible_ref.at[batch]) - tile.first, z.shape)
            z = jnp.where(_iota(z.shape, 1) < here, z, -jnp.inf)
        return z

    def weigh(tile: _Tile, weights, total, *, partial: bool):
        """Adds weights times values; frees the slot."""
        slot = lax.rem(tile.step, stages)
        plgpu.barrier_wait(v_ready.at[slot])
        values = v.at[slot]
        if partial:
            # A weight of 0 does not protect from what lies behind the end.
            _clear(values, longest - tile.first)
        weights = ring.operand(weights.astype(values.dtype), staging)
        total = ring.added(total, weights, values, staging)
        # All warps have read the slot.
        plgpu.commit_smem()
        return total

    def run(first, steps, visit, carry):
        """Visits the tiles; `first` is the number of earlier visits."""

        def start(step, _):
            fetch(first + step, begin + step)

        lax.fori_loop(0, jnp.minimum(steps, stages), start, None)

        def one(partial, at, carry):
            tile = _Tile(first + at, (begin + at) * KEYS)
            carry = visit(tile, carry, partial)

            @pl.when(at + stages < steps)
            def _():
                fetch(first + at + stages, begin + at + stages)

            return carry

        full = jnp.minimum(whole - begin, steps)
        carry = lax.fori_loop(0, full, functools.partial(one, False), carry)
        return lax.fori_loop(full, steps, functools.partial(one, True), carry)

    def by_reference(tile: _Tile, carry, partial: bool):
        total, weight, top, *least = carry
        z = scores(tile, partial=partial)
        top = jnp.maximum(top, z.max(1))
        if form.elementwise:
            there = jnp.where(z == -jnp.inf, jnp.inf, z)
            least = [jnp.minimum(least[0], there.min(1))]
        p = jnp.exp(z - across(number(1), z.shape))
        weight = weight + p.sum(1)
        return weigh(tile, p, total, partial=partial), weight, top, *least

    def by_maximum(tile: _Tile, carry, partial: bool):
        total, weight, top = carry
        z = scores(tile, partial=partial)
        before, top = top, jnp.maximum(top, z.max(1))
        shift = jnp.where(top == -jnp.inf, 0.0, top)
        p = jnp.exp(z - across(shift, z.shape))
        decay = jnp.exp(before - shift)
        weight = weight * decay + p.sum(1)
        total = total * across(decay, total.shape)
        return weigh(tile, p, total, partial=partial), weight, top

    every = lambda value: ring.per_row(jnp.full((ROWS,), value, jnp.float32))
    names = {name: i for i, name in enumerate(STATISTICS)}

    def note(**numbers):
        for name, number in numbers.items():
            statistics[names[name]] = number

    start = (ring.zeros(v.shape[2]), every(0.0), every(-jnp.inf))
    if form.unified:
        least = (every(jnp.inf),) if form.elementwise else ()
        total, weight, top, *least = run(0, steps, by_reference, (*start, *least))
        phi = number(1)
        # 0 times what is not finite is NaN.
        left = weight * 0.0 + (total * 0.0).sum(1)
        lost = jnp.where((left == 0.0) | (top == -jnp.inf), 0.0, 1.0)
        distance = top - phi
        good = (distance > number(2)) & (distance < number(3)) & (lost == 0.0)
        if form.elementwise:
            good = good & (least[0] - phi > number(2))
        bad = jnp.where(good | (top == -jnp.inf), 0.0, 1.0)
        note(sum=weight, max=top, min=least[0] if least else top, lost=lost, bad=bad)
        plgpu.commit_smem()
        if form.falls_back:
            worst = lax.fori_loop(
                *(
                    0,
                    given,
                    lambda i, most: jnp.maximum(most, statistics[names["bad"], i]),
                ),
                jnp.float32(0),
            )
            is_bad = worst > 0
            again = jnp.where(is_bad, steps, 0)
            keep = jnp.where(is_bad, 0.0, 1.0)
            # A select, because what is kept may not be finite.
            pick = lambda kept, fresh: jnp.where(
                jnp.full(kept.shape, keep) > 0, kept, fresh
            )
            carry = tuple(map(pick, (total, weight, top), start))
            total, weight, top = run(steps, again, by_maximum, carry)
            note(sum=weight, reference=pick(_unless_empty(phi, top), top))
        else:
            note(reference=_unless_empty(phi, top))
    else:
        total, weight, top = run(0, steps, by_maximum, start)
        none = every(0.0)
        note(sum=weight, max=top, min=top, reference=top, lost=none, bad=none)

    plgpu.commit_smem()
    here = (batch, head, split)
    plgpu.copy_smem_to_gmem(statistics, statistics_ref.at[here])
    for first in range(0, v.shape[2], COLUMNS):
        plgpu.wait_smem_to_gmem(0)
        columns[...] = lax.slice(total, (0, first), (ROWS, first + COLUMNS))
        plgpu.commit_smem()
        target = out_ref.at[here].at[:, pl.ds(first, COLUMNS)]
        plgpu.copy_smem_to_gmem(columns.at[pl.ds(0, rows)], target)
    plgpu.wait_smem_to_gmem(0)


def _per_row(ref):
    """Reads numbers per row from global memory; `optimized` is for shared memory."""
    layout = plgpu.Layout.WGMMA.reduce(1)
    return plgpu.load(ref, layout=layout, optimized=False)


def _unless_empty(phi, top):
    return jnp.where(top == -jnp.inf, -jnp.inf, phi)


def _clear(values, end) -> None:
    """Sets the rows from `end` on to zero."""
    for first in range(0, values.shape[1], FEATURES):
        columns = values.at[:, pl.ds(first, FEATURES)]
        old = plgpu.load(columns, layout=plgpu.Layout.WGMMA)
        columns[...] = jnp.where(_iota(old.shape, 0) < end, old, jnp.zeros_like(old))
    plgpu.commit_smem()


def _iota(shape: tuple[int, ...], axis: int):
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def _tanh(x):
    """The tanh as 1 - 2 / (1 + e^2x), since the hardware's is good to 11 bits."""
    root = lax.rsqrt(1 + jnp.exp(2 * x))
    return 1 - 2 * (root * root)
