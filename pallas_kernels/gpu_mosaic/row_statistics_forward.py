"""Forward kernel of row statistics for Hopper: logits live in accumulators only.

The grid is (tiles of 128 rows, splits of the classes). Two warpgroups multiply 64 rows
each with a tile of classes, in steps of 64 features; a third one copies. The ring holds
(128 + classes of a tile) x 128 bytes per slot. After each tile of classes the
accumulator is folded, slice by slice, into a few numbers per row in registers. Each
split writes them, (numbers, splits, rows); a few XLA operations merge the splits in
order, so that results are reproducible.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._row_formulas import state_names

from . import _ring, _row_slice
from ._logit_tiles import LogitTiles, tile_of_weight
from ._ring import Ring, Tile
from ._row_slice import Form, Rows, Slice
from ._row_tiles import BLOCK, ROWS, SPAN, WARPGROUPS
from ._weight_chunks import first_class, place_of_first


def partial_states(
    index: jax.Array | None,
    hidden: jax.Array,
    weight: jax.Array,
    tables: list[jax.Array],
    form: Form,
    *,
    visited: int,
    classes: int,
    columns: int,
    stages: int,
    splits: int,
    interpret: Any,
) -> dict[str, jax.Array]:
    """The state of `_row_slice.updated` of every split, (splits, padded rows) by name.

    Of a `Chunk` of `visited` classes, which `index` and `weight` are of, or of all
    classes if `index` is None, which saves registers. `tables` are numbers per row,
    labels and numbers per class, if there are any.
    """
    rows, features = hidden.shape
    tiles = pl.cdiv(visited, classes)
    per_split = pl.cdiv(tiles, splits)
    assert per_split * (splits - 1) < tiles  # no split is empty
    steps = pl.cdiv(features, SPAN)
    names = state_names(form.statistics, form.labels)
    of_hidden = Tile(BLOCK, SPAN, _ring.is_aligned(hidden))
    of_weight = tile_of_weight(weight, classes, form.vocab_axis)
    given = [hidden, weight] if index is None else [index, hidden, weight]

    def body(*refs, hidden_memory, weight_memory, ready, free, states):
        *index_refs, hidden_ref, weight_ref = refs[: len(given)]
        *table_refs, result_ref = refs[len(given) :]
        row_ref, label_ref, class_ref = unpacked(form, table_refs)
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
            def place(tile):
                first = (first_tile + tile) * classes
                return first + place_of_first(*index_refs) if index_refs else first

            logits.fetch(count, hidden_ref, weight_ref, block, place)

        @pl.when(warpgroup < WARPGROUPS)
        def _():
            plgpu.set_max_registers(_ring.COMPUTE_REGISTERS, action="increase")
            mine = pl.ds(warpgroup * ROWS, ROWS)
            own_rows = block * BLOCK + warpgroup * ROWS

            def fold(tile, state):
                raw = logits.product(tile, mine)
                first = (first_tile + tile) * classes
                if index_refs:
                    first = first + first_class(*index_refs)
                for column in range(0, classes, columns):
                    # Loaded again for each slice, to save registers between slices.
                    numbers = Rows.load(form, row_ref, label_ref, own_rows, ROWS)
                    piece = Slice.load(
                        form,
                        raw.columns(column, columns),
                        numbers,
                        class_ref,
                        first + column,
                    )
                    state = _row_slice.updated(state, piece)
                return state

            state = lax.fori_loop(0, count, fold, _row_slice.start(form, ROWS))
            for at, name in enumerate(names):
                states[warpgroup, at] = state[name]
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(
                states.at[warpgroup], result_ref.at[:, split, pl.ds(own_rows, ROWS)]
            )
            plgpu.wait_smem_to_gmem(0)

    padded = pl.cdiv(rows, BLOCK) * BLOCK
    result = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((len(names), splits, padded), jnp.float32),
        scratch_types={
            "hidden_memory": of_hidden.memory(stages, hidden.dtype, interpret),
            "weight_memory": of_weight.memory(stages, weight.dtype, interpret),
            **_ring.barriers(stages, of_hidden.boxes + of_weight.boxes),
            "states": plgpu.SMEM((WARPGROUPS, len(names), ROWS), jnp.float32),
        },
        grid=(pl.cdiv(rows, BLOCK), splits),
        grid_names=("rows", "split"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name="row_statistics_forward",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(*given, *tables)
    return dict(zip(names, result, strict=True))


def unpacked(form: Form, refs: Any) -> tuple[Any, Any, Any]:
    """The tables of the form, None for those that it lacks."""
    refs = iter(refs)
    of_rows = next(refs) if form.per_row else None
    labels = next(refs) if form.labels else None
    of_classes = next(refs) if form.per_class else None
    return of_rows, labels, of_classes
