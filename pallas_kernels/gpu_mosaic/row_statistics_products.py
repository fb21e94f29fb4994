"""Backward, second half, for Hopper: gradients from the cotangents of a chunk.

    over classes   dhidden += cotangents @ weight[chunk]     tiles (rows, features)
    over rows      dweight[chunk] = cotangents^T @ hidden    tiles (classes, features)
                   or hidden^T @ cotangents for (D, V)       tiles (features, classes)

All have the same body: a block of threads owns 128 rows of the result and some of its
columns, steps over the summed axis in spans of 64, and writes once per chunk. `dhidden`
is a float32 buffer of whole tiles, read and written by the warpgroup that owns the
tile; `dweight` is complete after its chunk and stored in its own dtype.

A list per tile names the blocks of 128 along the summed axis that the gradient filter
kept; without a filter all are kept.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import _ring
from ._ring import Ring, Tile
from ._row_tiles import BLOCK, ROWS, SPAN, WARPGROUPS, ProductTiles
from ._weight_chunks import first_class, place_of_first


@dataclasses.dataclass(frozen=True)
class Kept:
    """The kept blocks along the summed axis, per tile of the result.

    Attributes:
        order: Indices of kept blocks, then of the others, (tiles, blocks) int32.
        count: Numbers of kept blocks, (tiles,) int32.
    """

    order: jax.Array
    count: jax.Array

    @classmethod
    def of(cls, kept: jax.Array) -> "Kept":
        """Makes it from (tiles, blocks) booleans; ascending, so sums are repeatable."""
        order = jnp.argsort(~kept, axis=1, stable=True).astype(jnp.int32)
        return cls(order, kept.sum(1, dtype=jnp.int32))


@dataclasses.dataclass(frozen=True)
class Factor:
    """A factor of a product, and the layout of its tiles.

    Attributes:
        array: In global memory.
        summed_axis: Of its two axes.
        size: Length of a tile along the other axis.
    """

    array: jax.Array
    summed_axis: int
    size: int

    @property
    def tile(self) -> Tile:
        shape = (self.size, SPAN) if self.summed_axis == 1 else (SPAN, self.size)
        return Tile(*shape, _ring.is_aligned(self.array))

    def position(self, own: Any, summed: Any) -> tuple[Any, Any]:
        return (own, summed) if self.summed_axis == 1 else (summed, own)


def add_hidden_gradient(
    total_ref: Any,
    index: jax.Array,
    cotangents: jax.Array,
    weight: jax.Array,
    kept: Kept | None,
    *,
    vocab_axis: int,
    tiles: ProductTiles,
    interpret: Any,
) -> None:
    """Adds those of a `Chunk` to the float32 gradient, (padded rows and features)."""
    factors = (
        Factor(cotangents, 1, BLOCK),
        Factor(weight, vocab_axis, tiles.columns),
    )
    _multiply(total_ref, index, factors, kept, "hidden", vocab_axis, tiles, interpret)


def write_weight_gradient(
    gradient_ref: Any,
    index: jax.Array,
    cotangents: jax.Array,
    hidden: jax.Array,
    kept: Kept | None,
    *,
    vocab_axis: int,
    tiles: ProductTiles,
    interpret: Any,
) -> None:
    """Writes the classes of a `Chunk`."""
    factors = Factor(cotangents, 0, BLOCK), Factor(hidden, 0, tiles.columns)
    if vocab_axis == 1:
        factors = Factor(hidden, 0, BLOCK), Factor(cotangents, 0, tiles.columns)
    _multiply(
        gradient_ref, index, factors, kept, "weight", vocab_axis, tiles, interpret
    )


def _multiply(
    result_ref: Any,
    index: jax.Array,
    factors: tuple[Factor, Factor],
    kept: Kept | None,
    of: str,
    vocab_axis: int,
    tiles: ProductTiles,
    interpret: Any,
) -> None:
    left, right = factors
    of_left, of_right = left.tile, right.tile
    over_classes = of == "hidden"
    rows, columns = (f.array.shape[1 - f.summed_axis] for f in factors)
    # Of cotangents, which are whole tiles: operands may end before.
    cotangents = right if not over_classes and vocab_axis == 1 else left
    whole = cotangents.array.shape[cotangents.summed_axis] // SPAN
    per_block = BLOCK // SPAN  # steps
    lists = () if kept is None else (kept.order, kept.count)
    # Of the weight (D, V) every list is of a column of tiles.
    listed = "piece" if cotangents is right else "tile"
    assert kept is None or cotangents is left or tiles.columns == BLOCK
    dtype = jax.typeof(result_ref).dtype
    span = SPAN if over_classes else _ring.span_of(dtype)
    out = Tile(ROWS, span, _ring.is_aligned(jax.typeof(result_ref)), span)
    # Accumulators: boxes of the right factor, or one if its tiles are transposed.
    boxes, width = of_right.boxes, of_right.width
    if right.summed_axis == 1:
        boxes, width = 1, right.size

    def body(
        index_ref,
        left_ref,
        right_ref,
        *refs,
        left_memory,
        right_memory,
        ready,
        free,
        staging=None,
    ):
        *list_refs, result_ref = refs
        block, piece = lax.axis_index("tile"), lax.axis_index("piece")
        warpgroup = lax.axis_index("warpgroup")
        first_row, first_column = block * BLOCK, piece * tiles.columns
        steps, own_list = whole, lax.axis_index(listed)
        if list_refs:
            steps = list_refs[1][own_list] * per_block
        ring = Ring(ready, free, tiles.stages)
        left_written, left_read = of_left.views(left_memory, interpret)
        right_written, right_read = of_right.views(right_memory, interpret)

        @pl.when(warpgroup == WARPGROUPS)
        def _():
            plgpu.set_max_registers(_ring.MEMORY_REGISTERS, action="decrease")

            def copy(step, slot):
                position = step * SPAN
                if list_refs:
                    at = list_refs[0][own_list, lax.div(step, per_block)]
                    position = at * BLOCK + lax.rem(step, per_block) * SPAN
                at = left.position(first_row, position)
                of_left.fetch(left_written, slot, left_ref, *at, ready)
                if over_classes:
                    position = place_of_first(index_ref) + position
                at = right.position(first_column, position)
                of_right.fetch(right_written, slot, right_ref, *at, ready)

            ring.fill(steps, copy)

        @pl.when(warpgroup < WARPGROUPS)
        def _():
            plgpu.set_max_registers(_ring.COMPUTE_REGISTERS, action="increase")
            mine = pl.ds(warpgroup * ROWS, ROWS)

            def rows_of(slot):
                if left.summed_axis == 1:
                    return left_read.at[slot, 0, mine]
                if of_left.boxes == 1:
                    return _ring.transposed(left_read.at[slot, 0, :, mine])
                return _ring.transposed(left_read.at[slot, warpgroup])

            def columns_of(slot, box):
                part = right_read.at[slot, box]
                return part if right.summed_axis == 0 else _ring.transposed(part)

            def scope(*totals):
                def start(slot):
                    own = rows_of(slot)
                    for box, total in enumerate(totals):
                        plgpu.wgmma(total, own, columns_of(slot, box))

                ring.multiply(0, steps, start, boxes)
                return tuple(total[...] for total in totals)  # waits for the products

            accumulator = plgpu.ACC((ROWS, width), jnp.float32)
            totals = pl.run_scoped(scope, *[accumulator] * boxes)

            @pl.when(steps > 0)
            def _():
                ring.release(steps - 1)

            own = first_row + warpgroup * ROWS
            for at in range(tiles.columns // span):
                box, column = divmod(at * span, width)
                found = totals[box][:, column : column + span]
                found = plgpu.layout_cast(found, plgpu.Layout.WGMMA)
                if over_classes:
                    place = pl.ds(own, ROWS), pl.ds(first_column + at * span, span)
                    before = _ring.read(result_ref.at[place], plgpu.Layout.WGMMA)
                    result_ref[place] = before + found
                else:
                    row, column = own, first_column + at * span
                    if vocab_axis == 0:
                        row = first_class(index_ref) + row
                    else:
                        column = first_class(index_ref) + column
                    place = pl.ds(row, ROWS), pl.ds(column, span)
                    copied, written = out.views(staging, interpret)
                    slot = 2 * warpgroup + at % 2
                    # Waits for the slot's previous copy, two columns ago.
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                    written[slot, 0] = found.astype(dtype)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(copied.at[slot, 0], result_ref.at[place])
            if not over_classes:
                plgpu.wait_smem_to_gmem(0)

    memory = {
        "left_memory": of_left.memory(tiles.stages, left.array.dtype, interpret),
        "right_memory": of_right.memory(tiles.stages, right.array.dtype, interpret),
        **_ring.barriers(tiles.stages, of_left.boxes + of_right.boxes),
    }
    if not over_classes:
        memory["staging"] = out.memory(2 * WARPGROUPS, dtype, interpret)
    plgpu.kernel(
        body,
        out_type=(),
        scratch_types=memory,
        grid=(pl.cdiv(rows, BLOCK), pl.cdiv(columns, tiles.columns)),
        grid_names=("tile", "piece"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name=f"row_statistics_{of}_gradient",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(index, left.array, right.array, *lists, result_ref)
