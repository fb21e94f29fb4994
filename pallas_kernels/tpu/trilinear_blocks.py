"""Blocks of (query, key, key) tuples in the grid of a kernel.

The grid is (batch, key heads, visited blocks, groups of heads). A block is a tile of
queries, some tiles of keys of the first axis and some of the second. Lists in scalar
memory name the blocks and their tiles that are visited (`pallas_kernels._trilinear`).
Rows of a tile are the queries of all heads that share a key head, times `combined` keys
of the first axis. Masks are evaluated in tiles that are not whole.

Arrays are (batch, length, heads * features): heads are slices of lanes and no operand
is transposed, which needs features in whole lanes.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._results import result
from pallas_kernels._trilinear import ALL, FIRST, KINDS, LAST, NONE, Masks, Visits

from .trilinear_math import divided, quotient, row_blocks, zeroed
from .trilinear_tiles import Tiles

# Keys that are read from a block at once: a whole block would exceed the registers.
STEP = 32

type Pair = tuple[jax.Array, jax.Array]


class Shape(NamedTuple):
    """The static facts of a call.

    `head_groups` is the number of groups of `tiles.groups` query heads of a key head.
    `pieces` holds the numbers of bfloat16 arrays whose sum is a float32 one: for left
    operands of products, and for keys and values of the second axis.
    """

    lengths: tuple[int, int, int]
    heads: int
    head_groups: int
    features: int
    values: int
    scale: float
    pieces: tuple[int, int]
    masks: Masks
    tiles: Tiles

    @property
    def rows(self) -> int:
        """The number of rows of a tile of queries."""
        return self.tiles.rows

    @property
    def scores(self) -> int:
        """The number of rows of a tile of scores."""
        return self.rows * self.tiles.combined

    def spread(self, features: int) -> Any:
        """Scratch for the pieces of rows times keys of the first axis."""
        return vmem(self.pieces[0], self.scores, features, dtype=jnp.bfloat16)

    def first_keys(self, features: int) -> Any:
        """Scratch for a block of the first axis by tiles; a tile may be one row."""
        return vmem(self.tiles.counts[0], self.tiles.combined, features)

    def keys(self) -> tuple[Any, ...]:
        """Scratch that `Block.load` fills."""
        second, pieces = self.tiles.second, self.pieces[1]
        sizes = (self.features, self.values)
        return (
            *(self.first_keys(n) for n in sizes),
            *(vmem(pieces, second, n, dtype=jnp.bfloat16) for n in sizes),
        )

    def divided(self, x: jax.Array) -> list[jax.Array]:
        """The bfloat16 arrays whose sum is a left operand of a product."""
        return divided(x, self.pieces[0])


class Block(NamedTuple):
    """The block of a step: its first tuple, and which of its tiles are visited."""

    shape: Shape
    starts: tuple[Any, Any, Any]
    word: Any
    is_first: Any
    is_last: Any

    def kind(self, tile: Any) -> Any:
        return lax.shift_right_logical(self.word, KINDS + 2 * tile) & 3

    def load(self, refs: Sequence[Any], scratch: Sequence[Any]) -> None:
        """Fills the scratch with keys and values of both axes, 0 beyond the ends."""
        for ref, own in zip(refs[:2], scratch[:2], strict=True):
            x = self._inside(ref[0], 1, self.starts[1])
            for t, block in enumerate(row_blocks(x, self.shape.tiles.combined)):
                own[t] = block

        def some(t: Any, _: None) -> None:
            rows = pl.ds(pl.multiple_of(t * STEP, STEP), STEP)
            for ref, own in zip(refs[2:], scratch[2:], strict=True):
                start = self.starts[2] + t * STEP
                x = self._inside(ref[0, rows], 2, start)
                for n, piece in enumerate(divided(x, own.shape[0])):
                    own[n, rows] = piece

        lax.fori_loop(0, self.shape.tiles.second // STEP, some, None)

    def _inside(self, x: jax.Array, axis: int, start: Any) -> jax.Array:
        return zeroed(x.astype(jnp.float32), start, self.shape.lengths[axis])

    def queries(self, ref: Any, features: int) -> jax.Array:
        """The rows of a tile of queries in float32, 0 beyond the last query."""
        x = zeroed(ref[0].astype(jnp.float32), self.starts[0], self.shape.lengths[0])
        heads = range(0, x.shape[1], features)
        return jnp.concatenate([x[:, h : h + features] for h in heads], 0)

    def loop(
        self,
        enter: Callable[[Any], None],
        visit: Callable[[Any, Any, "Tile"], None],
        leave: Callable[[Any], None] | None = None,
        transposed: bool = False,
    ) -> None:
        """Loops over tiles of the first axis and, in each, over those of the second.

        `enter(own)` and `leave(own)` are called around each tile of the first axis that
        is not NONE, `visit(own, other, tile)` for each tile of the second in it. `own`
        is the index of the first tile in `Shape.first_keys`, `other` the slice of the
        second.
        """
        tiles, (firsts, seconds) = self.shape.tiles, self.shape.tiles.counts

        def outer(t: Any, _: None) -> None:
            kind = self.kind(t)

            @pl.when(kind != NONE)
            def _() -> None:
                enter(t)
                lax.fori_loop(0, seconds, functools.partial(inner, t, kind), None)
                if leave is not None:
                    leave(t)

        def inner(t: Any, kind: Any, u: Any, _: None) -> None:
            other_kind = self.kind(firsts + u)
            start = pl.multiple_of(u * tiles.keys, tiles.keys)
            other = pl.ds(start, tiles.keys)
            query, first, second = self.starts
            starts = (query, first + t * tiles.combined, second + start)
            whole = other_kind == ALL
            for level, here in enumerate(
                (
                    whole & (kind == ALL),
                    whole & (kind != ALL),
                    (other_kind != ALL) & (other_kind != NONE),
                )
            ):
                tile = Tile(self.shape, starts, level, transposed)
                pl.when(here)(functools.partial(visit, t, other, tile))

        lax.fori_loop(0, firsts, outer, None)


class Tile(NamedTuple):
    """A tile of scores: whole at `level` 0, at 1 whole on the second key axis alone."""

    shape: Shape
    starts: tuple[Any, Any, Any]
    level: int
    transposed: bool

    def select(self, x: jax.Array, fill: float) -> jax.Array:
        """`x` where the tuples attend, else `fill`."""
        if self.level == 0:
            return x
        if self.transposed:
            ok = self._allowed(*self._lines(), self._second_line(0))
            return x if ok is None else jnp.where(ok, x, fill)
        # The mask is the same for all heads and broadcasts over combined keys.
        s, (query, first, _) = self.shape, self.starts
        i = query + lax.broadcasted_iota(jnp.int32, (s.tiles.query, 1), 0)
        l = self._second_line(1)
        found = []
        for step, block in enumerate(row_blocks(x, s.rows)):
            ok = self._allowed(i, first + step, l)
            for own in row_blocks(block, s.tiles.query):
                found.append(own if ok is None else jnp.where(ok, own, fill))
        return jnp.concatenate(found, 0)

    def _allowed(self, i: Any, j: Any, l: Any) -> Any:
        """True where tuples (i, j, l) attend; None if all of them do.

        `l` is not read where the second axis is whole.
        """
        s, found = self.shape, []
        if s.masks.first is not None:
            found.append(s.masks.first(i, j))
        if s.lengths[1] % s.tiles.first:
            found.append(j < s.lengths[1])
        if self.level == 2:
            if s.masks.second is not None:
                found.append(s.masks.second(i, l))
            if s.masks.joint is not None:
                found.append(s.masks.joint(i, j, l))
            if s.lengths[2] % s.tiles.second:
                found.append(l < s.lengths[2])
        return functools.reduce(jnp.logical_and, found) if found else None

    def _lines(self) -> tuple[Any, Any]:
        """The query and the first key of each row of the tile, laid along the lanes."""
        s, (query, first, _) = self.shape, self.starts
        row = lax.broadcasted_iota(jnp.int32, (1, s.scores), 1)
        step = quotient(row, s.rows, s.tiles.combined)
        row = row - step * s.rows
        head = quotient(row, s.tiles.query, s.tiles.groups)
        return query + row - head * s.tiles.query, first + step

    def _second_line(self, axis: int) -> Any:
        shape = (1, self.shape.tiles.keys)
        shape = shape if axis else shape[::-1]
        return self.starts[2] + lax.broadcasted_iota(jnp.int32, shape, axis)


def shape_of(
    query: jax.Array,
    first: Pair,
    second: Pair,
    masks: Masks,
    scale: float,
    heads: int,
    groups: int,
    pieces: tuple[int, int],
    tiles: Tiles,
) -> Shape:
    lengths = (query.shape[1], first[0].shape[1], second[0].shape[1])
    features, values = (x.shape[2] // heads for x in second)
    shared = groups // tiles.groups
    return Shape(lengths, heads, shared, features, values, scale, pieces, masks, tiles)


def call(
    kernel: Callable[[Shape, Block, Sequence[Any]], None],
    shape: Shape,
    visits: Visits,
    kinds: Sequence[str],
    operands: Sequence[jax.Array],
    out_kinds: Sequence[str],
    out_shapes: Sequence[jax.ShapeDtypeStruct],
    *,
    scratch: Sequence[Any],
    products: int,
    interpret: Any,
    name: str,
) -> Any:
    """Runs a kernel over (batch, heads, visits, groups of heads).

    `kinds` name the axis of each array.

    If results belong to queries, each group of the query heads of a key head is treated
    as a head. Otherwise groups are later steps of the same block and enter its sum.
    """
    batch, entries = operands[0].shape[0], visits.rows.size
    tiles, heads, inner = shape.tiles, shape.heads, shape.head_groups
    sizes = {"query": tiles.query, "first": tiles.first, "second": tiles.second}
    if "query" in out_kinds:
        heads, inner = heads * inner, 1

    def spec(kind: str, array: Any) -> pl.BlockSpec:
        def at(b, h, e, n, rows, firsts, seconds, words):
            where = {"first": firsts, "second": seconds}.get(kind, rows)[e]
            if kind == "rows":
                return b, h * inner + n, where, 0, 0
            if kind == "query":
                return b, where, h * inner + n
            return b, where, h if inner > 1 else lax.div(h, shape.head_groups)

        if kind == "rows":
            return pl.BlockSpec((1, 1, 1, *array.shape[3:]), at)
        count = shape.heads * (shape.head_groups if kind == "query" else 1)
        return pl.BlockSpec((1, sizes[kind], array.shape[2] // count), at)

    def body(rows, firsts, seconds, words, *refs):
        e, n = pl.program_id(2), pl.program_id(3)
        starts = (
            rows[e] * tiles.query,
            firsts[e] * tiles.first,
            seconds[e] * tiles.second,
        )
        is_first = (words[e] & FIRST != 0) & (n == 0)
        is_last = (words[e] & LAST != 0) & (n == inner - 1)
        kernel(shape, Block(shape, starts, words[e], is_first, is_last), refs)

    pairs = batch * heads * inner * entries * shape.rows * tiles.first * tiles.second
    out_shapes = [result(x.shape, x.dtype, *operands) for x in out_shapes]
    return pl.pallas_call(
        body,
        out_shape=out_shapes,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(batch, heads, entries, inner),
            in_specs=[spec(k, x) for k, x in zip(kinds, operands, strict=True)],
            out_specs=[spec(k, x) for k, x in zip(out_kinds, out_shapes, strict=True)],
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=products * (shape.features + shape.values) * pairs,
            transcendentals=pairs,
            bytes_accessed=sum(
                x.size * x.dtype.itemsize for x in (*operands, *out_shapes)
            ),
        ),
        interpret=interpret,
        name=name,
    )(*visits, *operands)


def unstack(ref: Any, x: jax.Array, groups: int) -> None:
    """Writes the rows of a tile of queries; undoes `Block.queries`."""
    features = x.shape[1]
    for g, block in enumerate(row_blocks(x, x.shape[0] // groups)):
        ref[0, :, g * features : (g + 1) * features] = block.astype(ref.dtype)


def vmem(*shape: int, dtype: Any = jnp.float32) -> Any:
    return pltpu.VMEM(shape, dtype)
