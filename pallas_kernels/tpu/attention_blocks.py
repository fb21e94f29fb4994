"""The blocks that an attention kernel visits, as a flat list that fits scalar memory.

A grid step is an entry of the list, and index maps read it: only blocks of the list are
ever fetched, and the pipeline of the grid fetches the next one meanwhile. An entry is
one int32:

    row (13 bits) | column (13) | kind (2) | first of its row (1) | last of its row (1)

"Row" is the axis whose results are summed over the list: of queries for the output and
the gradient of the queries, of keys for the gradients of keys and values.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .attention_pieces import Stage
from .attention_tiles import LANES, Tiles
from .attention_weights import Weights
from .bfloat16_parts import pairs, part_count, parts_of

# Blocks along an axis that 13 bits can tell apart.
MOST_BLOCKS = 1 << 13
# Entries of one call: a quarter of the megabyte of scalar memory.
MOST_ENTRIES = 1 << 16
NOTHING, SOME, ALL = 0, 1, 2


def lists(
    rows: np.ndarray,
    columns: np.ndarray,
    whole: np.ndarray,
    row_count: int,
    *,
    most_entries: int = MOST_ENTRIES,
) -> np.ndarray:
    """Lists of at most so many entries, (lists, entries); no row is divided.

    Args:
        rows: Of each block that is visited, in any order.
        columns: Likewise.
        whole: Whether every pair of the block attends.
        row_count: Rows in all. One without blocks gets an entry that computes nothing:
            its results have to be written all the same.
        most_entries: At least the number of columns.

    Returns:
        int32. Shorter lists end in entries that do nothing.
    """
    empty = np.setdiff1d(np.arange(row_count), rows)
    kinds = np.where(whole, ALL, SOME)
    rows = np.concatenate([rows, empty]).astype(np.int32)
    columns = np.concatenate([columns, np.zeros_like(empty)]).astype(np.int32)
    kinds = np.concatenate([kinds, np.full_like(empty, NOTHING)]).astype(np.int32)
    order = np.lexsort((columns, rows))
    rows, columns, kinds = rows[order], columns[order], kinds[order]
    borders = np.diff(rows, prepend=-1, append=row_count) != 0
    first, last = borders[:-1], borders[1:]
    entries = _packed(rows, columns, kinds, first, last)

    # As many whole rows in a list as fit.
    stops = np.flatnonzero(last) + 1
    parts, start = [], 0
    while start < len(entries):
        fitting = stops[(stops > start) & (stops <= start + most_entries)]
        stop = int(fitting[-1])
        parts.append(entries[start:stop])
        start = stop
    length = max(map(len, parts))
    found = np.empty((len(parts), length), np.int32)
    for out, part in zip(found, parts, strict=True):
        out[: len(part)] = part
        # The blocks of the last entry, which are there already.
        out[len(part) :] = part[-1] & ~_FLAGS
    return found


_FLAGS = 0b1111


def _packed(
    rows: np.ndarray,
    columns: np.ndarray,
    kinds: np.ndarray,
    first: np.ndarray,
    last: np.ndarray,
) -> np.ndarray:
    return (rows << 17) | (columns << 4) | (kinds << 2) | (first << 1) | last


@dataclasses.dataclass(frozen=True)
class Entry:
    """One entry of a list, as a kernel reads it."""

    packed: Any

    @property
    def row(self) -> Any:
        return lax.shift_right_logical(self.packed, 17)

    @property
    def column(self) -> Any:
        return lax.shift_right_logical(self.packed, 4) & (MOST_BLOCKS - 1)

    @property
    def kind(self) -> Any:
        return lax.shift_right_logical(self.packed, 2) & 3

    @property
    def is_first(self) -> Any:
        return (self.packed & 2) != 0

    @property
    def is_last(self) -> Any:
        return (self.packed & 1) != 0


@dataclasses.dataclass(frozen=True)
class Masking:
    """Which pairs of a block attend.

    Attributes:
        attends: `attends(query, key, *scalars)`, of positions (rows, 1) and
            (1, columns) or the other way round; broadcasts.
        key_length: Keys in all.
        scalars: How many integers per batch entry `attends` takes.
    """

    attends: Callable[..., Any]
    key_length: int
    scalars: int = 0

    def of(
        self,
        shape: tuple[int, int],
        starts: tuple[Any, Any],
        batch: Any,
        scalars_ref: Any,
        *,
        transposed: bool = False,
    ) -> Any:
        """Booleans of a part of a block, whose rows are keys if `transposed`.

        `starts`: the positions of the first query and the first key.
        """
        queries, keys = (1, 0) if transposed else (0, 1)
        query, key = (
            start + lax.broadcasted_iota(jnp.int32, _along(shape, axis), axis)
            for start, axis in zip(starts, (queries, keys), strict=True)
        )
        scalars = [scalars_ref[batch * self.scalars + i] for i in range(self.scalars)]
        ok = self.attends(query, key, *scalars) & (key < self.key_length)
        return jnp.broadcast_to(ok, shape)


def _along(shape: tuple[int, int], axis: int) -> tuple[int, ...]:
    return tuple(size if i == axis else 1 for i, size in enumerate(shape))


def zero_beyond(x: Any, start: Any, length: int, size: int) -> Any:
    """Zeros in the rows, from `start` on, that a block has beyond the array.

    They hold anything, and 0 * NaN is NaN: both operands of a contraction over rows
    need zeros there. `size` is that of the block.
    """
    if length % size == 0:
        return x
    row = start + lax.broadcasted_iota(jnp.int32, (x.shape[0], 1), 0)
    return jnp.where(row < length, x, jnp.zeros_like(x))


# Of a product of some operands: takes the part of an operand, by its place, that
# belongs to a pass; tells the first pass; then the arguments of a stage.
type Product = Callable[[Callable[[int, Any], Any], bool, int, Any, Any], None]


def passes(dtypes: tuple[Any, Any], precision: Any, body: Product) -> list[Stage]:
    """A stage for each product of bfloat16 that a product of two dtypes consists of."""
    counts = [part_count(dtype, precision) for dtype in dtypes]

    def one(n: int, which: tuple[int, int]) -> Stage:
        def take(place: int, x: Any) -> Any:
            return list(parts_of(x, counts[place]))[which[place]]

        return functools.partial(body, take, n == 0)

    return [one(n, which) for n, which in enumerate(pairs((counts[0], counts[1])))]


def add(ref: Any, at: Any, x: Any, fresh: bool) -> None:
    """Adds to what is there, or replaces it."""
    ref[at] = x if fresh else ref[at] + x


def widths(features: int) -> list[Any]:
    """Lanes of an array whose products are made apart: more exceed the registers."""
    starts = range(0, features, LANES)
    return [pl.ds(start, min(LANES, features - start)) for start in starts]


def lanes(x: Any, width: int) -> Any:
    """(rows, 128), equal along lanes, as (rows, width)."""
    if width <= LANES:
        return x[:, :width]
    if width % LANES == 0:
        return jnp.concatenate([x] * (width // LANES), axis=1)
    return jnp.broadcast_to(x[:, :1], (x.shape[0], width))


def column(row: Any) -> Any:
    """(1, rows) as (rows, 128), equal along lanes."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


@dataclasses.dataclass(frozen=True)
class Form:
    """What is static of an attention.

    Attributes:
        weights: The positive function.
        scale: Of the products.
        logit_softcap: None for none.
        precision: Of products of float32.
        masking: Which pairs attend.
    """

    weights: Weights
    scale: float
    logit_softcap: float | None
    precision: Any
    masking: Masking

    def scores(self, products: Any) -> tuple[Any, Any]:
        """Scores, and the slope of the softcap, None without."""
        return self.weights.scores(products, self.scale, self.logit_softcap)


def cost(
    steps: int, tiles: Tiles, *, products: int, column_bytes: int
) -> pl.CostEstimate:
    """Of so many steps with products over so many features."""
    pairs = tiles.query * tiles.key
    return pl.CostEstimate(
        flops=2 * steps * pairs * products,
        transcendentals=steps * pairs,
        bytes_accessed=steps * tiles.key * column_bytes,
    )


@dataclasses.dataclass(frozen=True)
class Call:
    """A kernel over lists of blocks.

    Attributes:
        kernel: Of the references of entries, scalars, inputs, outputs and scratch.
        grid: Of one list, the axis of its entries included.
        scalars: Arrays in scalar memory besides the entries.
        inputs: Arrays.
        in_specs: Of the inputs; index maps get the grid indices and the scalar refs.
        out_shapes: Of the results.
        out_specs: Likewise.
        scratch: Shapes in vector memory.
        semantics: Of the axes of the grid.
        cost: For the compiler's scheduler.
        name: Of the kernel.
        interpret: As in `pallas_call`.
    """

    kernel: Callable[..., None]
    grid: tuple[int, ...]
    scalars: Sequence[Any]
    inputs: Sequence[Any]
    in_specs: Sequence[pl.BlockSpec]
    out_shapes: Sequence[Any]
    out_specs: Sequence[pl.BlockSpec]
    scratch: Sequence[Any]
    semantics: Any
    cost: pl.CostEstimate
    name: str
    interpret: Any

    def run(self, entries: Any) -> Sequence[jax.Array]:
        """The results, of all lists."""
        if entries.shape[0] == 1:
            return self._one(entries[0], ())
        # Each list writes its own rows, in place.
        entries = jnp.asarray(entries)
        start = [_filled(shape) for shape in self.out_shapes]
        body = lambda i, found: tuple(self._one(entries[i], found))
        return lax.fori_loop(0, entries.shape[0], body, tuple(start))

    def _one(self, entries: Any, before: Sequence[Any]) -> Sequence[jax.Array]:
        prefetched = 1 + len(self.scalars)
        count = len(before)
        kernel = self.kernel
        if count:
            # What earlier lists wrote is the same memory as the results.
            first = prefetched + len(self.inputs)
            kernel = lambda *refs: self.kernel(*refs[:first], *refs[first + count :])
        return pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=prefetched,
                grid=self.grid,
                in_specs=[
                    *self.in_specs,
                    *[pl.BlockSpec(memory_space=pltpu.HBM)] * count,
                ],
                out_specs=list(self.out_specs),
                scratch_shapes=list(self.scratch),
            ),
            out_shape=list(self.out_shapes),
            input_output_aliases={
                prefetched + len(self.inputs) + i: i for i in range(count)
            },
            compiler_params=pltpu.CompilerParams(dimension_semantics=self.semantics),
            cost_estimate=self.cost,
            interpret=self.interpret,
            name=self.name,
        )(jnp.asarray(entries), *self.scalars, *self.inputs, *before)


def by_row(
    tiles: Any, groups: int
) -> tuple[Callable[[int], Any], Callable[[int], Any], Any]:
    """How arrays are cut where rows of blocks stay: those of queries, those of keys.

    Both for a number of features; then numbers per query. `groups`: heads of queries
    of a head of keys.
    """
    rows = lambda width: pl.BlockSpec(
        (None, None, tiles.query, width),
        lambda b, n, i, entries, *_: (b, n, Entry(entries[i]).row, 0),
    )
    columns = lambda width: pl.BlockSpec(
        (None, None, tiles.key, width),
        lambda b, n, i, entries, *_: (
            b,
            lax.div(n, groups),
            Entry(entries[i]).column,
            0,
        ),
    )
    per_row = pl.BlockSpec(
        (None, None, 1, tiles.query),
        lambda b, n, i, entries, *_: (b, n, 0, Entry(entries[i]).row),
    )
    return rows, columns, per_row


def stored_length(length: int, size: int, entries: Any) -> int:
    """Rows of a result: whole blocks where several lists write it in place."""
    return length if entries.shape[0] == 1 else -(-length // size) * size


def _filled(shape: jax.ShapeDtypeStruct) -> jax.Array:
    zeros = jnp.zeros(shape.shape, shape.dtype)
    axes = tuple(sorted(shape.manual_axis_type.varying))
    return lax.pcast(zeros, axes, to="varying") if axes else zeros
