r"""Statistics of the logits `hidden @ weight` per row, and their gradients, on a TPU.

Logits live in vector memory only, a tile of rows x classes at a time:

- `forward`: grid (tiles of rows, tiles of classes[, spans of D]). A table of running
  numbers per row stays in scratch while the classes go by, and is finished at the last.
- `gradient_of_hidden`: the same grid. Each tile of logits is recomputed, turned into
  its cotangent, and multiplied by the tile of the weight; the sum over classes stays in
  float32 scratch and is written once.
- `gradient_of_weight`: tiles of classes outside, tiles of rows inside; the sum over
  rows stays and is written once, with the gradient of the bias.

Two backward kernels compute the logits twice, five products in all. A single kernel
would compute them once, but read and write a float32 sum in memory at every step.

The operands are neither padded nor copied; a weight that XLA stores by columns is read
by columns (`as_stored`). In the last tile, entries behind the end of an array are
masked: such classes count as absent, and in a sum over rows or classes both factors
become 0.

A tile is visited some rows at a time, so that intermediate values stay in registers.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from . import _row_filter as filter_, _row_math as rows_of
from ._row_call import Block, Call, Step
from ._row_math import LANES, Columns, Form, Slice
from ._row_products import span
from ._row_tiles import Tiles
from .row_statistics_plan import Operands, Options, as_stored, tiles_of

__all__ = [
    "ClassGradient",
    "Operands",
    "Options",
    "RowGradient",
    "Tiles",
    "forward",
    "gradient_of_hidden",
    "gradient_of_weight",
    "tiles_of",
]


class RowGradient(NamedTuple):
    hidden: Array
    per_row: dict[str, Array]


class ClassGradient(NamedTuple):
    weight: Array
    bias: Array | None


def forward(
    options: Options,
    operands: Operands,
    *,
    tiles: Tiles | None = None,
    interpret: Any = False,
) -> dict[str, Array]:
    """The statistics by name: (N,) float32, argmax as int32, label_logits (N, L).

    Args:
        options: Static.
        operands: Arrays.
        tiles: Static; None chooses them.
        interpret: As of `pallas_call`.
    """
    options, operands = as_stored(options, operands)
    call = Call.of("forward", options, operands, tiles)
    form, tiles = call.form, call.tiles
    carried = rows_of.state_columns(form)
    width = len(rows_of.result_columns(form))

    def kernel(step: Step) -> None:
        refs = step.refs
        state = refs["state"]

        @pl.when(step.is_first)
        def _():
            state[...] = rows_of.start(carried, state.shape)

        call.multiply(step)

        def fold(at: Any, piece: Slice) -> None:
            state[at, :] = rows_of.updated(state[at, :], carried, piece)

        @pl.when(step.span == call.spans - 1)
        def _():
            call.visit(step, fold)

        @pl.when(step.is_last)
        def _():
            def finish(i: Any, _: None) -> None:
                at = span(0, i * 8, 8)
                found = rows_of.finished(state[at, :], carried, form, width)
                refs["out"][at, :] = found

            lax.fori_loop(0, tiles.rows // 8, finish, None)

    table = call.run(
        kernel,
        {"out": ((operands.hidden.shape[0], width), jnp.float32, (tiles.rows, width))},
        {"raw": call.raw_scratch(), "state": (tiles.rows, LANES)},
        interpret,
    )["out"]
    return _by_name(table, form)


def gradient_of_hidden(
    options: Options,
    operands: Operands,
    known: dict[str, Array],
    label_cotangents: Array | None = None,
    *,
    tiles: Tiles | None = None,
    interpret: Any = False,
) -> RowGradient:
    """The gradient of hidden, and those of scale and temperature per row.

    Args:
        options: Static.
        operands: As in `forward`.
        known: (N,) float32 each: `lse` and `mean_logit` of the forward pass if they are
            needed, and the cotangents of statistics, `g_lse` and so on.
        label_cotangents: Cotangents of label_logits, (N, L) float32.
        tiles: Static; None chooses them.
        interpret: As of `pallas_call`.
    """
    options, operands = as_stored(options, operands)
    operands = _with_known(operands, known, label_cotangents)
    call = Call.of("hidden", options, operands, tiles)
    tiles, hidden = call.tiles, operands.hidden
    asked = Columns(tuple(n for n in ("scale", "temperature") if n in operands.per_row))

    def kernel(step: Step) -> None:
        refs = step.refs

        @pl.when(step.is_first)
        def _():
            refs["sum"][...] = jnp.zeros_like(refs["sum"])
            if len(asked):
                refs["row_sums"][...] = jnp.zeros_like(refs["row_sums"])

        call.multiply(step)

        def turn(at: Any, piece: Slice) -> None:
            found = rows_of.cotangents(piece)
            call.note_cotangents(step, at, found.raw)
            filter_.note_distance(refs, at, found)
            if len(asked):
                table = refs["row_sums"][at, :]
                more = {
                    n: asked.of_rows(table, n) + getattr(found, n) for n in asked.names
                }
                refs["row_sums"][at, :] = asked.replaced(table, more)

        def add(index: Any) -> None:
            axis, every = options.vocab_axis, slice(None)

            def at(rows: Any, features: Any) -> Any:
                weight = (every, features) if axis == 0 else (features, every)
                return (rows, every), weight

            call.add_product(step, "sum", (index,), ("draw", "weight"), (1, axis), at)

        call.turn_and_add(step, turn, add)

        @pl.when(step.is_last)
        def _():
            call.write_sum(refs, axis=1)
            if len(asked):
                refs["rows_out"][...] = refs["row_sums"][:, : len(asked)]

    results: dict[str, Block] = {
        "out": (hidden.shape, hidden.dtype, (tiles.rows, hidden.shape[1]))
    }
    scratch = call.backward_scratch((tiles.rows, tiles.features))
    if len(asked):
        results["rows_out"] = (
            (hidden.shape[0], len(asked)),
            jnp.dtype(jnp.float32),
            (tiles.rows, len(asked)),
        )
        scratch["row_sums"] = (tiles.rows, LANES)
    found = call.run(kernel, results, scratch, interpret)
    per_row = {n: found["rows_out"][:, i] for i, n in enumerate(asked.names)}
    return RowGradient(found["out"], per_row)


def gradient_of_weight(
    options: Options,
    operands: Operands,
    known: dict[str, Array],
    label_cotangents: Array | None = None,
    *,
    tiles: Tiles | None = None,
    interpret: Any = False,
) -> ClassGradient:
    """The gradient of the weight in its layout, and of the bias if there is one.

    The arguments are those of `gradient_of_hidden`.
    """
    given = options
    options, operands = as_stored(options, operands)
    operands = _with_known(operands, known, label_cotangents)
    call = Call.of("weight", options, operands, tiles)
    tiles, weight = call.tiles, operands.weight
    has_bias = "bias" in operands.per_class

    def kernel(step: Step) -> None:
        refs = step.refs

        @pl.when(step.is_first)
        def _():
            refs["sum"][...] = jnp.zeros_like(refs["sum"])
            if has_bias:
                refs["class_sums"][...] = jnp.zeros_like(refs["class_sums"])

        call.multiply(step)

        def turn(at: Any, piece: Slice) -> None:
            found = rows_of.cotangents(piece)
            call.note_cotangents(step, at, found.raw)
            filter_.note_distance(refs, at, found)
            if has_bias:
                summed = found.biased.reshape(-1, 8, tiles.classes).sum(0)
                refs["class_sums"][...] += summed

        def add(index: Any) -> None:
            names = (
                ("draw", "hidden") if options.vocab_axis == 0 else ("hidden", "draw")
            )
            at = lambda first, second: ((slice(None), first), (slice(None), second))
            call.add_product(step, "sum", (index,), names, (0, 0), at)

        call.turn_and_add(step, turn, add)

        @pl.when(step.is_last)
        def _():
            call.write_sum(refs, axis=1 - options.vocab_axis)
            if has_bias:
                total = refs["class_sums"][...].sum(0, keepdims=True)
                refs["bias_out"][...] = total

    block = [tiles.classes, tiles.classes]
    block[1 - options.vocab_axis] = weight.shape[1 - options.vocab_axis]
    results: dict[str, Block] = {"out": (weight.shape, weight.dtype, tuple(block))}
    shape = [tiles.classes, tiles.classes]
    shape[1 - options.vocab_axis] = tiles.features
    scratch = call.backward_scratch(tuple(shape))
    if has_bias:
        classes = weight.shape[options.vocab_axis]
        results["bias_out"] = ((1, classes), jnp.dtype(jnp.float32), (1, tiles.classes))
        scratch["class_sums"] = (8, tiles.classes)
    found = call.run(kernel, results, scratch, interpret)
    gradient = found["out"] if options == given else found["out"].T
    return ClassGradient(gradient, found["bias_out"][0] if has_bias else None)


def _with_known(
    operands: Operands, known: dict[str, Array], label_cotangents: Array | None
) -> Operands:
    per_row = {**operands.per_row, **known}
    if label_cotangents is not None:
        for i in range(label_cotangents.shape[1]):
            per_row[f"g_label_{i}"] = label_cotangents[:, i]
    return operands._replace(per_row=per_row)


def _by_name(table: Array, form: Form) -> dict[str, Array]:
    columns = rows_of.result_columns(form).names
    found: dict[str, Array] = {}
    for name in form.statistics:
        if name == "label_logits":
            at = [columns.index(f"label_{i}") for i in range(form.labels)]
            found[name] = table[:, min(at) : max(at) + 1]
        else:
            column = table[:, columns.index(name)]
            found[name] = column.astype(jnp.int32) if name == "argmax" else column
    return found
