"""Common code of the trilinear kernels for Hopper: loops, operands, masks, sums.

Rows of a tile of queries are the queries of `groups` heads, one head after the other.
The two compute warpgroups share the tile and divide the keys of the first axis: of each
pair one takes the first key and one the second. Their sums are added at the end, in
shared memory, in a fixed order.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._trilinear import Masks

from . import attention_ring as ring
from .attention_mask import Index, evaluate
from .attention_ring import Channel
from .attention_scores import Axis, across
from .attention_tiles import FEATURES, ROWS, WARPGROUPS
from .trilinear_lists import Runs
from .trilinear_tiles import PAIR, SLOTS, Tiles

type Pair = tuple[jax.Array, jax.Array]

# Registers per thread; copies of many heads take more than those of one.
COMPUTE_REGISTERS, MEMORY_REGISTERS = 232, 40


@dataclasses.dataclass(frozen=True)
class Form:
    """Options of a call; Python values.

    Attributes:
        masks: Evaluated on the first axis for each row, on the others where a run says
            so.
        lengths: Lengths of the queries and of both key axes; arrays may be longer.
        scale: The factor of the products.
        tiles: Sizes.
    """

    masks: Masks
    lengths: tuple[int, int, int]
    scale: float
    tiles: Tiles

    def attending(self, start: Any, key: Any, axis: int, size: int, offset: int) -> Any:
        """True for rows that attend to a key of the first axis; None for all.

        Rows are `size` from `offset` on, along `axis` of the tile of scores.
        """

        def query() -> Any:
            index = plgpu.layout_cast(
                lax.broadcasted_iota(jnp.int32, (size,), 0),
                plgpu.Layout.WGMMA.reduce(1 - axis),
            )
            return start + self._query(index, offset)

        ok = None
        if self.masks.first is not None:
            ok = evaluate(self.masks.first, Index((size,), query), key)
        if self.lengths[1] % PAIR:
            inside = jnp.full((size,), key) < self.lengths[1]
            ok = inside if ok is None else ok & inside
        return ok

    def selected(
        self, bits: Any, query: Axis, key: Any, second: Axis, offset: int
    ) -> Any:
        """`bits`, -inf where the masks of the second axis or of all three exclude.

        `offset` is that of the rows of queries.
        """

        # Indices of the whole tile: the compiler computes with equal ones only once.
        def along(axis: int) -> Any:
            return plgpu.broadcasted_iota(
                jnp.int32, bits.shape, axis, layout=plgpu.Layout.WGMMA
            )

        queries = Index(
            bits.shape, lambda: query.start + self._query(along(query.axis), offset)
        )
        seconds = Index(bits.shape, lambda: second.start + along(second.axis))
        found = []
        if self.masks.second is not None:
            found.append(evaluate(self.masks.second, queries, seconds))
        if self.masks.joint is not None:
            joint = self.masks.joint
            by_key = lambda query, second, key: joint(query, key, second)
            found.append(evaluate(by_key, queries, seconds, key))
        if self.lengths[2] % self.tiles.keys:
            found.append(seconds.form() < self.lengths[2])
        for ok in found:
            bits = jnp.where(ok, bits, -jnp.inf)
        return bits

    def _query(self, row: Any, offset: int) -> Any:
        """Index in the tile of the query of a row, counted from `offset`."""
        row = row + offset if offset else row
        return row if self.tiles.groups == 1 else row & (self.tiles.queries - 1)


@dataclasses.dataclass(frozen=True)
class Walk:
    """The runs of one tile of results; numbers are read each time they are needed.

    Attributes:
        runs: References to the arrays of `Runs`.
        at: The row of the table of tiles.
    """

    runs: Runs
    at: Any

    @property
    def tile(self) -> Any:
        return self.runs.tiles[self.at, 0]

    @property
    def count(self) -> Any:
        """Number of runs."""
        return self.runs.tiles[self.at, 3] - self.runs.tiles[self.at, 1]

    @property
    def steps(self) -> Any:
        """Number of steps of all runs."""
        return self.runs.tiles[self.at, 5]

    def streamed(self, run: Any) -> Any:
        return self.runs.runs[self.runs.tiles[self.at, 1] + run, 0]

    def span(self, run: Any) -> tuple[Any, Any]:
        """The first and last step (exclusive) of a run."""
        row = self.runs.tiles[self.at, 1] + run
        return self.runs.runs[row, 1], self.runs.runs[row, 2]

    def pair(self, step: Any) -> Any:
        """The pair of keys of a step; undefined behind the last step."""
        last = self.runs.pairs.shape[0] - 1
        return self.runs.pairs[jnp.minimum(self.runs.tiles[self.at, 4] + step, last)]

    def fold(self, run: Callable[[bool, Any, Any], Any], carry: Any) -> Any:
        """Folds `run(partial, number, carry)` over the runs, unmasked ones first."""
        whole = self.runs.tiles[self.at, 2] - self.runs.tiles[self.at, 1]
        carry = lax.fori_loop(0, whole, lambda at, x: run(False, at, x), carry)
        return lax.fori_loop(whole, self.count, lambda at, x: run(True, at, x), carry)


def feed(
    walk: Walk,
    stream: Callable[[Any, Any, Any], None],
    pairs: Channel,
    fetch: Callable[[Any, Any], None],
    *,
    rounds: int = 1,
) -> None:
    """Runs the memory warpgroup: fetches for all runs, `rounds` times.

    `stream(number, round, tile)` fetches the tile of a run, `fetch(step, pair)` the
    pair of keys of a step.
    """

    def run(turn, number, pair):
        stream(turn * walk.count + number, turn, walk.streamed(number))

        def step(at, pair):
            # Read one step early: its latency is that of the keys.
            after = walk.pair(at + 1)
            fetch(turn * walk.steps + at, pair)
            return after

        return lax.fori_loop(*walk.span(number), step, pair)

    def every(turn, carry):
        own = functools.partial(run, turn)
        lax.fori_loop(0, walk.count, own, walk.pair(0))
        return carry

    lax.fori_loop(0, rounds, every, 0)


def pair_scratch(features: tuple[int, int], dtype: Any) -> dict[str, Any]:
    """Scratch for keys and values of the first axis, which are not read by products."""
    return {
        "k1": plgpu.SMEM((SLOTS, PAIR, features[0]), dtype),
        "v1": plgpu.SMEM((SLOTS, PAIR, features[1]), dtype),
        "pair_ready": plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),
        "pair_free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=SLOTS),
    }


def pairs(scratch: dict[str, Any]) -> Channel:
    """The ring made of `pair_scratch`."""
    rings = scratch["k1"], scratch["v1"]
    return Channel(rings, scratch["pair_ready"], scratch["pair_free"])


def fetching(
    pairs: Channel, refs: Sequence[Any], head: tuple[Any, Any]
) -> Callable[[Any, Any], None]:
    """The `fetch` of `feed`, for keys and values of the first axis."""
    batch, key_head = head

    def fetch(step: Any, pair: Any) -> None:
        two = pl.ds(pair * PAIR, PAIR)
        pairs.fill(step, *(ref.at[batch, two, key_head] for ref in refs))

    return fetch


def feed_keys(
    walk: Walk,
    pairs: Channel,
    first: Sequence[Any],
    seconds: Channel,
    second: Sequence[Any],
    head: tuple[Any, Any],
    size: int,
) -> None:
    """Runs `feed` for a tile of queries: keys and values of both axes.

    `size` is the number of keys of a tile of the second axis; `first` and `second` are
    the arrays; `head` is batch entry and key head.
    """
    batch, key_head = head

    def stream(number: Any, _: Any, tile: Any) -> None:
        here = batch, pl.ds(tile * size, size), key_head
        seconds.fill(number, *(ref.at[here] for ref in second))

    feed(walk, stream, pairs, fetching(pairs, first, head))
    seconds.close()
    pairs.close()


def leave(channel: Channel, step: Any) -> None:
    """Frees a slot after ordinary loads, which need a fence before the next copies."""
    plgpu.commit_smem()
    channel.release(step)


def copies(ref: Any, slot: Any, tiles: Tiles, origin: tuple[Any, Any, Any]) -> Any:
    """Yields the queries of each head of a tile, and their slice of `slot`.

    `origin`: batch entry, first query, first head.
    """
    batch, start, head = origin
    for group in range(tiles.groups):
        rows = pl.ds(group * tiles.queries, tiles.queries)
        source = ref.at[batch, pl.ds(start, tiles.queries), head + group]
        yield source, slot.at[rows]


def store(
    total: Any, slot: Any, ref: Any, tiles: Tiles, origin: tuple[Any, Any, Any]
) -> None:
    """Stores through shared memory to the queries of all heads of a tile."""
    slot[...] = total.astype(slot.dtype)
    plgpu.commit_smem()
    for target, source in copies(ref, slot, tiles, origin):
        plgpu.copy_smem_to_gmem(source, target)


def staged(scratch: dict[str, Any], warpgroup: Any, *names: str) -> list[Any]:
    """The staging memory of `ring.operand` for this warpgroup, in the interpreter."""
    found = (scratch[f"staged_{name}"] for name in names)
    return [None if own is None else own.at[warpgroup] for own in found]


def finite(top: Any) -> Any:
    """The maximum, 0 for rows that have seen nothing: -inf - -inf is NaN."""
    return jnp.where(top == -jnp.inf, 0.0, top)


def normalised(bits: Any, norm: Any) -> Any:
    """Recomputes weights from the log-sum of their row, bounded by 1.

    The key that is multiplied into the query, and rounded, differs from pass to pass:
    rounding of a large score could give weights above 1.
    """
    return jnp.exp2(jnp.minimum(bits - norm, 0.0))


def spread(rows: Any, factors: Any, factor: float = 1.0) -> Any:
    """Rows times the features of one key, computed in float32 and rounded once."""

    def some(columns: Any, piece: Any) -> tuple[Any]:
        own = per_feature(factors, columns) * factor
        found = piece.astype(jnp.float32) * across(own, piece.shape, 1)
        return (found.astype(piece.dtype),)

    (found,) = ring.by_columns(some, plgpu.load(rows, layout=plgpu.Layout.WGMMA))
    return found


def spread_into(slot: Any, rows: Any, factors: Any, factor: float = 1.0) -> None:
    """`spread` into shared memory, slice by slice, to save registers."""
    for first in range(0, slot.shape[1], FEATURES):
        some = pl.ds(first, FEATURES)
        slot[:, some] = spread(rows.at[:, some], factors.at[some], factor)


def per_feature(factors: Any, columns: Any = None) -> Any:
    """Features of one key, in the layout of the columns of a tile."""
    columns = pl.ds(0, factors.shape[0]) if columns is None else columns
    return ring.per_column(factors, columns).astype(jnp.float32)


def summed(total: Any, scratch: dict[str, Any], warpgroup: Any, use: Any) -> None:
    """Adds the totals of both warpgroups; the first one uses the sum.

    `scratch` is `sums_scratch`, which is free again afterwards.
    """
    slot = scratch["sums"].at[:, pl.ds(0, total.shape[1])]
    # Opaque: addresses would be kept in registers from the start of the kernel on.
    ready, taken = (scratch["sums_met"].at[ring.anew(i)] for i in range(2))

    @pl.when(warpgroup == 1)
    def _():
        slot[...] = total
        plgpu.barrier_arrive(ready)
        plgpu.barrier_wait(taken)

    @pl.when(warpgroup == 0)
    def _():
        plgpu.barrier_wait(ready)
        other = plgpu.load(slot, layout=plgpu.Layout.WGMMA)
        plgpu.barrier_arrive(taken)
        use(total + other)


def sums_scratch(features: int) -> dict[str, Any]:
    """Scratch of `summed`: the sums, and barriers for ready and taken."""
    transforms = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))
    return {
        "sums": plgpu.SMEM((ROWS, features), jnp.float32, transforms=transforms),
        "sums_met": plgpu.Barrier(num_barriers=2),
    }
