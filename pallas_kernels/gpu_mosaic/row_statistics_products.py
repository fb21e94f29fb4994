"""Backward, second half, for Hopper: gradients from the cotangents of a chunk.

    over classes   dhidden += cotangents @ weight[chunk]     tiles (rows, features)
    over rows      dweight[chunk] = cotangents^T @ hidden    tiles (classes, features)

Both have the same body: a block of threads owns 128 rows of the result and some of its
features, steps over the summed axis in spans of 64, and writes once per chunk.
`dhidden` is a float32 buffer of whole tiles, read and written by the warpgroup that
owns the tile; `dweight` is complete after its chunk and stored in its own dtype.

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
from ._row_tiles import BLOCK, ROWS, SPAN, WARPGROUPS


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


def add_hidden_gradient(
    total_ref: Any,
    index: jax.Array,
    cotangents: jax.Array,
    weight: jax.Array,
    kept: Kept | None,
    **tiles: Any,
) -> None:
    """Adds chunk `index` to the float32 gradient, (padded rows, padded features)."""
    _multiply(total_ref, index, cotangents, weight, kept, over="classes", **tiles)


def write_weight_gradient(
    gradient_ref: Any,
    index: jax.Array,
    cotangents: jax.Array,
    hidden: jax.Array,
    kept: Kept | None,
    **tiles: Any,
) -> None:
    """Writes the rows of (V, D) that belong to chunk `index`."""
    _multiply(gradient_ref, index, cotangents, hidden, kept, over="rows", **tiles)


def _multiply(
    result_ref: Any,
    index: jax.Array,
    cotangents: jax.Array,
    operand: jax.Array,
    kept: Kept | None,
    *,
    over: str,
    features: int,
    stages: int,
    interpret: Any,
) -> None:
    rows, chunk = cotangents.shape
    over_classes = over == "classes"
    summed, owned = (chunk, rows) if over_classes else (rows, chunk)
    dtype = cotangents.dtype
    per_block = BLOCK // SPAN  # steps
    whole = pl.cdiv(summed, BLOCK) * per_block
    if over_classes:
        of_left = Tile(BLOCK, SPAN, aligned=True)
    else:
        of_left = Tile(SPAN, BLOCK, aligned=True)
    of_right = Tile(SPAN, features, _ring.is_aligned(operand))
    lists = () if kept is None else (kept.order, kept.count)
    out = Tile(ROWS, SPAN, over_classes or _ring.is_aligned(operand_like(result_ref)))

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
        block, piece = lax.axis_index("tile"), lax.axis_index("features")
        warpgroup = lax.axis_index("warpgroup")
        feature = piece * features
        # Products, so that the compiler sees that they are multiples.
        first = index_ref[0] * chunk
        steps = whole
        if list_refs:
            steps = list_refs[1][block] * per_block
        ring = Ring(ready, free, stages)
        left_written, left_read = of_left.views(left_memory, interpret)
        right_written, right_read = of_right.views(right_memory, interpret)

        @pl.when(warpgroup == WARPGROUPS)
        def _():
            plgpu.set_max_registers(_ring.MEMORY_REGISTERS, action="decrease")

            def copy(step, slot):
                position = step * SPAN
                if list_refs:
                    at = list_refs[0][block, lax.div(step, per_block)]
                    position = at * BLOCK + lax.rem(step, per_block) * SPAN
                own = block * BLOCK
                left = (own, position) if over_classes else (position, own)
                right = first + position if over_classes else position
                of_left.fetch(left_written, slot, left_ref, *left, ready)
                of_right.fetch(right_written, slot, right_ref, right, feature, ready)

            ring.fill(steps, copy)

        @pl.when(warpgroup < WARPGROUPS)
        def _():
            plgpu.set_max_registers(_ring.COMPUTE_REGISTERS, action="increase")
            mine = pl.ds(warpgroup * ROWS, ROWS)

            def scope(*totals):
                def start(slot):
                    if over_classes:
                        left = left_read.at[slot, 0, mine]
                    else:
                        left = _ring.transposed(left_read.at[slot, 0, :, mine])
                    for box, total in enumerate(totals):
                        plgpu.wgmma(total, left, right_read.at[slot, box])

                ring.multiply(0, steps, start, of_right.boxes)
                return tuple(total[...] for total in totals)  # waits for the products

            accumulator = plgpu.ACC((ROWS, of_right.width), jnp.float32)
            totals = pl.run_scoped(scope, *[accumulator] * of_right.boxes)

            @pl.when(steps > 0)
            def _():
                ring.release(steps - 1)

            own = block * BLOCK + warpgroup * ROWS
            for at in range(features // SPAN):
                box, column = divmod(at * SPAN, of_right.width)
                found = totals[box][:, column : column + SPAN]
                found = plgpu.layout_cast(found, plgpu.Layout.WGMMA)
                columns = pl.ds(feature + at * SPAN, SPAN)
                if over_classes:
                    rows = pl.ds(own, ROWS)
                    owned_ref = result_ref.at[rows, columns]
                    before = _ring.read(owned_ref, plgpu.Layout.WGMMA)
                    result_ref[rows, columns] = before + found
                else:
                    rows = pl.ds(first + own, ROWS)
                    copied, written = out.views(staging, interpret)
                    slot = 2 * warpgroup + at % 2
                    # Waits for the slot's previous copy, two columns ago.
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                    written[slot, 0] = found.astype(dtype)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(
                        copied.at[slot, 0], result_ref.at[rows, columns]
                    )
            if not over_classes:
                plgpu.wait_smem_to_gmem(0)

    memory = {
        "left_memory": of_left.memory(stages, dtype, interpret),
        "right_memory": of_right.memory(stages, dtype, interpret),
        **_ring.barriers(stages, of_left.boxes + of_right.boxes),
    }
    if not over_classes:
        memory["staging"] = out.memory(2 * WARPGROUPS, dtype, interpret)
    name = "hidden" if over_classes else "weight"
    plgpu.kernel(
        body,
        out_type=(),
        scratch_types=memory,
        grid=(owned // BLOCK, pl.cdiv(operand.shape[1], features)),
        grid_names=("tile", "features"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name=f"row_statistics_{name}_gradient",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(index, cotangents, operand, *lists, result_ref)


def operand_like(ref: Any) -> Any:
    """The shape and dtype of the array behind a reference."""
    return jax.typeof(ref)
