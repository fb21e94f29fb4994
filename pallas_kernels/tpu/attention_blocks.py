"""Slices of blocks, products and the call, shared by attention kernels for TPUs."""

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
    """`x`, the rows of a block of `size` from `start` on, with 0 in padding.

    Padding may hold NaN, and 0 * NaN is NaN: both operands of a contraction over rows
    need zeros there.
    """
    if length % size == 0:
        return x
    row = start + lax.broadcasted_iota(jnp.int32, (x.shape[0], 1), 0)
    return jnp.where(row < length, x, jnp.zeros_like(x))


# A pass of a product: gets a function that takes the bfloat16 part of an operand (by
# its index), whether it is the first pass, and the arguments of a stage.
type Product = Callable[[Callable[[int, Any], Any], bool, int, Any, Any], None]


def passes(dtypes: tuple[Any, Any], precision: Any, body: Product) -> list[Stage]:
    """A stage for each bfloat16 product that makes up a product of two dtypes."""
    counts = [part_count(dtype, precision) for dtype in dtypes]

    def one(n: int, which: tuple[int, int]) -> Stage:
        def take(side: int, x: Any) -> Any:
            return list(parts_of(x, counts[side]))[which[side]]

        return functools.partial(body, take, n == 0)

    return [one(n, which) for n, which in enumerate(pairs((counts[0], counts[1])))]


def add(ref: Any, at: Any, x: Any, fresh: bool) -> None:
    """Adds `x` to a slice of `ref`, or replaces the slice if `fresh`."""
    ref[at] = x if fresh else ref[at] + x


def widths(features: int) -> list[Any]:
    """Slices of lanes whose products are separate, since more exceed the registers."""
    starts = range(0, features, LANES)
    return [pl.ds(start, min(LANES, features - start)) for start in starts]


def lanes(x: Any, width: int) -> Any:
    """Widens (rows, 128), equal along lanes, to (rows, width)."""
    if width <= LANES:
        return x[:, :width]
    if width % LANES == 0:
        return jnp.concatenate([x] * (width // LANES), axis=1)
    return jnp.broadcast_to(x[:, :1], (x.shape[0], width))


def column(row: Any) -> Any:
    """Turns (1, rows) into (rows, 128), equal along lanes."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def cost(
    steps: int, tiles: Tiles, *, products: int, column_bytes: int
) -> pl.CostEstimate:
    """The cost of `steps` with `products` over features."""
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
        kernel: Takes references of entries, scalars, inputs, outputs and scratch.
        grid: The grid of one list, including the axis of its entries.
        scalars: Arrays in scalar memory besides the entries.
        inputs: Arrays.
        in_specs: Specs of inputs; index maps get the grid indices and the scalar refs.
        out_shapes: Shapes of the results.
        out_specs: Specs of the results.
        scratch: Shapes in vector memory.
        semantics: Semantics of the grid axes.
        cost: For the compiler's scheduler.
        name: The kernel's name.
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
            # Results share memory with those of earlier lists.
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
    """Block specs of arrays of queries and of keys, and of numbers per query.

    Blocks of queries stay along a row of the list. The first two take a number of
    features. `groups`: query heads per key head.
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


def blocks_by_row(b: Any, n: Any, i: Any, entries: Any, *_: Any) -> Any:
    """Batch entry, head, and blocks of queries and keys of a step of such a grid."""
    entry = Entry(entries[i])
    return b, n, entry.row, entry.column


def taken(refs: list[Any], count: int) -> list[Any]:
    """The first references, which leave the list."""
    return [refs.pop(0) for _ in range(count)]


def stored_length(length: int, size: int, entries: Any) -> int:
    """Number of rows of a result: whole blocks if several lists write it in place."""
    return length if entries.shape[0] == 1 else -(-length // size) * size


def _filled(shape: jax.ShapeDtypeStruct) -> jax.Array:
    zeros = jnp.zeros(shape.shape, shape.dtype)
    axes = tuple(sorted(shape.manual_axis_type.varying))
    return lax.pcast(zeros, axes, to="varying") if axes else zeros
