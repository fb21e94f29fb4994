"""Backward, first half, for Hopper: the cotangents of the logits of a chunk.

The logits of a chunk of classes are recomputed as in the forward pass, in the same
tiles with the same ring. Results are the cotangents of the raw products in the dtype of
the operands, (padded rows, chunk), 0 in padding, and a few sums:

    scale, temperature   per row and split            (numbers, splits, padded rows)
    bias                 per class and warpgroup      (2 x tiles of rows, chunk)
    distance             per row and block            (blocks, padded rows)

The gradient filter compares `distance` with its threshold; a block is a tile, or 128
classes of a larger one. Sums over the rows of a warpgroup use shared memory that Mosaic
reserves once per block of threads, so the two warpgroups take turns.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import _ring, _row_slice
from ._logit_tiles import LogitTiles, tile_of_weight
from ._ring import Ring, Tile
from ._row_slice import FILTER_CLASSES, Form, Rows, Slice
from ._row_tiles import BLOCK, ROWS, SPAN, WARPGROUPS
from ._weight_chunks import first_class, place_of_first
from .row_statistics_forward import unpacked

SUMS = ("scale", "inverse_temperature")  # numbers per row that have a gradient


@dataclasses.dataclass(frozen=True)
class Chunk:
    """The results of the cotangent kernel; None for those that are not needed."""

    raw: jax.Array
    sums: jax.Array | None = None
    bias: jax.Array | None = None
    distance: jax.Array | None = None


def chunk_cotangents(
    index: jax.Array,
    hidden: jax.Array,
    weight: jax.Array,
    tables: list[jax.Array],
    form: Form,
    *,
    chunk: int,
    classes: int,
    columns: int,
    stages: int,
    splits: int,
    interpret: Any,
) -> Chunk:
    """Cotangents of a chunk of classes; `index` and `weight` are of its `Chunk`.

    `tables` as in `row_statistics_forward.partial_states`, with the cotangents among
    the numbers per row. `columns` divides 128, `classes` divides `chunk`.
    """
    rows, features = hidden.shape
    tiles = chunk // classes
    per_split = pl.cdiv(tiles, splits)
    assert per_split * (splits - 1) < tiles  # no split is empty
    steps = pl.cdiv(features, SPAN)
    sums = tuple(name for name in SUMS if name in form.per_row)
    biased = "bias" in form.per_class
    width = min(classes, FILTER_CLASSES)
    of_hidden = Tile(BLOCK, SPAN, _ring.is_aligned(hidden))
    of_weight = tile_of_weight(weight, classes, form.vocab_axis)
    padded = pl.cdiv(rows, BLOCK) * BLOCK
    wide = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    results = {"raw": jax.ShapeDtypeStruct((padded, chunk), hidden.dtype)}
    if sums:
        results["sums"] = wide(len(sums), splits, padded)
    if biased:
        results["bias"] = wide(padded // ROWS, chunk)
    if form.filter:
        results["distance"] = wide(chunk // width, padded)

    def body(
        index_ref,
        hidden_ref,
        weight_ref,
        *refs,
        hidden_memory,
        weight_memory,
        ready,
        free,
        staging,
        turn=None,
    ):
        row_ref, label_ref, class_ref = unpacked(form, refs[: len(tables)])
        result_refs = dict(zip(results, refs[len(tables) :], strict=True))
        block, split = lax.axis_index("rows"), lax.axis_index("split")
        warpgroup = lax.axis_index("warpgroup")
        first_tile = split * per_split
        count = jnp.minimum(per_split, tiles - first_tile)
        ring = Ring(ready, free, stages)
        logits = LogitTiles(
            ring,
            (of_hidden, of_weight),
            (
                of_hidden.views(hidden_memory, interpret),
                of_weight.views(weight_memory, interpret),
            ),
            steps,
            classes,
            form.vocab_axis,
        )

        @pl.when(warpgroup == WARPGROUPS)
        def _():
            start = place_of_first(index_ref)
            place = lambda tile: start + (first_tile + tile) * classes
            logits.fetch(count, hidden_ref, weight_ref, block, place)

        @pl.when(warpgroup < WARPGROUPS)
        def _():
            plgpu.set_max_registers(_ring.COMPUTE_REGISTERS, action="increase")
            mine = pl.ds(warpgroup * ROWS, ROWS)
            own_rows = block * BLOCK + warpgroup * ROWS
            start = first_class(index_ref)

            def visit(tile, totals):
                raw = logits.product(tile, mine)
                first = (first_tile + tile) * classes  # in this chunk
                if biased:
                    _take_turn(turn, warpgroup, tile)
                distance: Any = None
                for at, column in enumerate(range(0, classes, columns)):
                    # Loaded again for each slice, to save registers between slices.
                    numbers = Rows.load(form, row_ref, label_ref, own_rows, ROWS)
                    piece = Slice.load(
                        form,
                        raw.columns(column, columns),
                        numbers,
                        class_ref,
                        start + first + column,
                    )
                    found = _row_slice.cotangents(piece)
                    at_columns = pl.ds(first + column, columns)
                    slot = staging.at[warpgroup, at % 2]
                    # Waits for the slot's previous copy, two slices ago.
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                    slot[...] = found.raw.astype(slot.dtype)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(
                        slot, result_refs["raw"].at[pl.ds(own_rows, ROWS), at_columns]
                    )
                    if biased:
                        at_rows = 2 * block + warpgroup
                        result_refs["bias"][at_rows, at_columns] = found.biased.sum(0)
                    more = {
                        "scale": found.scale,
                        "inverse_temperature": found.temperature,
                    }
                    totals = {name: totals[name] + more[name] for name in sums}
                    if form.filter:
                        far = found.distance
                        if column % width:
                            far = jnp.maximum(distance, far)
                        distance = far
                        if (column + columns) % width == 0:
                            at_block = lax.div(first + column, width)
                            own = pl.ds(own_rows, ROWS)
                            result_refs["distance"][at_block, own] = distance
                if biased:
                    _pass_turn(turn, warpgroup)
                return totals

            zero = jnp.zeros((ROWS,), jnp.float32)
            zero = plgpu.layout_cast(zero, plgpu.Layout.WGMMA.reduce(1))
            totals = lax.fori_loop(0, count, visit, dict.fromkeys(sums, zero))
            for at, name in enumerate(sums):
                result_refs["sums"][at, split, pl.ds(own_rows, ROWS)] = totals[name]
            if biased:
                _see_last_turn(turn, warpgroup)
            plgpu.wait_smem_to_gmem(0)

    memory = {
        "hidden_memory": of_hidden.memory(stages, hidden.dtype, interpret),
        "weight_memory": of_weight.memory(stages, weight.dtype, interpret),
        **_ring.barriers(stages, of_hidden.boxes + of_weight.boxes),
        "staging": _ring.swizzled((WARPGROUPS, 2, ROWS, columns), hidden.dtype),
    }
    if biased:
        memory["turn"] = plgpu.Barrier(num_arrivals=1, num_barriers=WARPGROUPS)
    found = plgpu.kernel(
        body,
        out_type=tuple(results.values()),
        scratch_types=memory,
        grid=(pl.cdiv(rows, BLOCK), splits),
        grid_names=("rows", "split"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name="row_statistics_cotangent",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(index, hidden, weight, *tables)
    return Chunk(**dict(zip(results, found, strict=True)))


def _take_turn(turn: Any, warpgroup: Any, tile: Any) -> None:
    """Waits until the other warpgroup's turn ends; the first warpgroup begins."""

    @pl.when(warpgroup == 1)
    def _():
        plgpu.barrier_wait(turn.at[0])

    @pl.when((warpgroup == 0) & (tile > 0))
    def _():
        plgpu.barrier_wait(turn.at[1])


def _pass_turn(turn: Any, warpgroup: Any) -> None:
    plgpu.barrier_arrive(turn.at[warpgroup])


def _see_last_turn(turn: Any, warpgroup: Any) -> None:
    @pl.when(warpgroup == 0)
    def _():
        plgpu.barrier_wait(turn.at[1])
