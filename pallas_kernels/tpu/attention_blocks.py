"""Parts of blocks, products and the call, shared by attention kernels for TPUs."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .attention_lists import Entry
from .attention_pieces import Stage
from .attention_tiles import LANES, Tiles
from .bfloat16_parts import pairs, part_count, parts_of


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
