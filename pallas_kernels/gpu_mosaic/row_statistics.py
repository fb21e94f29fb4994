"""Statistics of the logits `hidden @ weight.T` per row, and gradients, for Hopper.

Forward, one kernel: logits live in accumulators only (`row_statistics_forward`).

Backward, the classes are visited in chunks. For each chunk one kernel recomputes the
logits and stores their cotangents in the dtype of hidden (`row_statistics_cotangent`);
two more multiply these with the weight and with hidden (`row_statistics_products`), add
to a float32 gradient of hidden and write the chunk's part of the weight's gradient.
With the forward pass these are four products, the fewest without stored logits. Memory
holds the cotangents of a chunk and the float32 gradient of hidden, no copy of the
weight.

A float32 weight is rounded to the dtype of hidden, in both passes a chunk of classes at
a time (`_weight_chunks`). Its gradient is float32: sums of products, not rounded.

Every sum has one owner and one order: results are reproducible bit by bit.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap
from jax.experimental import pallas as pl

from . import _row_slice
from ._row_slice import FILTER_CLASSES, Form
from ._row_tiles import BLOCK, BackwardTiles, ForwardTiles
from ._weight_chunks import chunk_of
from .row_statistics_cotangent import SUMS, chunk_cotangents
from .row_statistics_forward import partial_states
from .row_statistics_plan import (
    Operands as Operands,
    Options as Options,
    backward_tiles_of as backward_tiles_of,
    tiles_of as tiles_of,
)
from .row_statistics_products import Kept, add_hidden_gradient, write_weight_gradient


class Gradient(NamedTuple):
    """Gradients of hidden and weight in their dtypes, of the others in float32."""

    hidden: jax.Array
    weight: jax.Array
    per_row: dict[str, jax.Array]
    bias: jax.Array | None


class Sums(NamedTuple):
    """The results that the backward pass adds to or writes in each chunk."""

    hidden: Any  # (whole tiles of rows, whole tiles of features), float32
    weight: Any
    rows: Any | None  # (numbers, padded rows)
    bias: Any | None  # (chunks, classes of a chunk)


def forward(
    options: Options,
    operands: Operands,
    *,
    tiles: ForwardTiles | None = None,
    interpret: Any = None,
) -> dict[str, jax.Array]:
    """The statistics by name: (N,) float32, argmax as int32, label_logits (N, L).

    Args:
        options: Static.
        operands: Arrays.
        tiles: Static; None chooses them.
        interpret: As of `plgpu.kernel`.
    """

    @sequential_vmap
    def call(operands: Operands) -> dict[str, jax.Array]:
        hidden, weight, axis = operands.hidden, operands.weight, options.vocab_axis
        rows, classes = hidden.shape[0], weight.shape[axis]
        if "label_logits" not in options.statistics:
            operands = operands._replace(labels=None)
        chosen = tiles_of(options, operands) if tiles is None else tiles
        assert chosen is not None
        # What tables and tiles of classes are whole multiples of.
        whole = chosen.chunk or chosen.logits.classes
        visited = chosen.chunk or pl.cdiv(classes, whole) * whole
        form, tables = _form(options, operands, whole), _tables(operands, whole)

        def states_of(
            index: jax.Array | None, weight: jax.Array
        ) -> dict[str, jax.Array]:
            return partial_states(
                index,
                hidden,
                weight,
                tables,
                form,
                visited=visited,
                **dataclasses.asdict(chosen.logits),
                interpret=interpret,
            )

        def states_of_chunk(i: jax.Array) -> dict[str, jax.Array]:
            part, index = chunk_of(weight, hidden.dtype, i, visited, axis)
            return states_of(index, part)

        if visited >= classes:
            state = states_of(None, weight.astype(hidden.dtype))
        else:
            # Chunks are further splits.
            states = lax.map(states_of_chunk, jnp.arange(pl.cdiv(classes, visited)))
            state = {name: x.reshape(-1, x.shape[-1]) for name, x in states.items()}
        found = _row_slice.merged(form, state)
        return {name: values[:rows] for name, values in found.items()}

    return _varying(call(_inverted(operands)), operands)


def gradient(
    options: Options,
    operands: Operands,
    known: dict[str, jax.Array],
    label_cotangents: jax.Array | None = None,
    *,
    tiles: BackwardTiles | None = None,
    interpret: Any = None,
) -> Gradient:
    """The gradients of hidden, weight, bias, scale and temperature.

    Args:
        options: Static.
        operands: As in `forward`.
        known: (N,) float32 each: `lse` and `mean_logit` of the forward pass if they are
            needed, and the cotangents of statistics, `g_lse` and so on, at least one of
            them or `label_cotangents`.
        label_cotangents: Cotangents of label_logits, (N, L) float32.
        tiles: Static; None chooses them.
        interpret: As of `plgpu.kernel`.
    """
    if tiles is None:
        tiles = backward_tiles_of(options, operands, known, label_cotangents)
        assert tiles is not None
    active = None
    if options.filter_eps is not None:
        active = _active(known, label_cotangents)
    per_row = {**_inverted(operands).per_row, **known}
    if "lse" in known:
        # An empty row gets +inf: exp(-inf - inf) is 0, exp(-inf + inf) NaN.
        lse = known["lse"]
        per_row["lse"] = jnp.where(lse == -jnp.inf, jnp.inf, lse)
    if label_cotangents is not None:
        for i in range(label_cotangents.shape[1]):
            per_row[f"g_label_{i}"] = label_cotangents[:, i]
    elif options.filter_eps is None:
        operands = operands._replace(labels=None)
    call = sequential_vmap(
        lambda *arrays: _gradient(options, tiles, interpret, *arrays)
    )
    found = call(operands._replace(per_row=per_row), active)
    return _varying(found, operands)


def _gradient(
    options: Options,
    tiles: BackwardTiles,
    interpret: Any,
    operands: Operands,
    active: jax.Array | None,
) -> Gradient:
    hidden, weight, axis = operands.hidden, operands.weight, options.vocab_axis
    (rows, features), classes = hidden.shape, weight.shape[axis]
    chunk, width = tiles.chunk, tiles.hidden.columns
    chunks, padded = pl.cdiv(classes, chunk), pl.cdiv(rows, BLOCK) * BLOCK
    form = _form(options, operands, chunk)
    tables = _tables(operands, chunk)
    names = tuple(name for name in SUMS if name in form.per_row)

    def visit(i: Any, sums: Sums) -> None:
        part, index = chunk_of(weight, hidden.dtype, i, chunk, axis)
        found = chunk_cotangents(
            index,
            hidden,
            part,
            tables,
            form,
            chunk=chunk,
            **dataclasses.asdict(tiles.logits),
            interpret=interpret,
        )
        of_hidden = of_weight = None
        if active is not None:
            kept = _kept(found.distance, active, options.filter_eps, chunk)
            of_hidden, of_weight = Kept.of(kept), Kept.of(kept.T)
        common = {"vocab_axis": axis, "interpret": interpret}
        own = index, found.raw, part, of_hidden
        add_hidden_gradient(sums.hidden, *own, tiles=tiles.hidden, **common)
        own = index, found.raw, hidden, of_weight
        write_weight_gradient(sums.weight, *own, tiles=tiles.weight, **common)
        if sums.rows is not None and found.sums is not None:
            sums.rows[...] += _varying(found.sums.sum(1), operands)
        if sums.bias is not None and found.bias is not None:
            sums.bias[i] = _varying(found.bias.sum(0), operands)

    def visit_all(sums: Sums) -> None:
        lax.fori_loop(0, chunks, lambda i, _: visit(i, sums), None)

    new = lambda *shape: _varying(jnp.zeros(shape, jnp.float32), operands)
    zeros = Sums(
        # A kernel accepts no reference that is declared to vary.
        jnp.zeros((padded, pl.cdiv(features, width) * width), jnp.float32),
        jnp.zeros(weight.shape, weight.dtype),
        new(len(names), padded) if names else None,
        new(chunks, chunk) if "bias" in form.per_class else None,
    )
    # Written in place through references. Those of `jax.new_ref` would not pass through
    # the derivative rules around this function.
    sums = pl.run_state(visit_all)(zeros)
    as_given = {"inverse_temperature": "temperature"}
    table = [] if sums.rows is None else sums.rows[:, :rows]
    per_row = {as_given.get(n, n): x for n, x in zip(names, table, strict=True)}
    return Gradient(
        sums.hidden[:rows, :features].astype(hidden.dtype),
        sums.weight,
        per_row,
        None if sums.bias is None else sums.bias.reshape(-1)[:classes],
    )


def _form(options: Options, operands: Operands, multiple: int) -> Form:
    classes = operands.weight.shape[options.vocab_axis]
    return Form(
        options.statistics,
        options.softcap,
        classes,
        0 if operands.labels is None else operands.labels.shape[1],
        tuple(operands.per_row),
        tuple(operands.per_class),
        overhang=classes % multiple != 0,
        filter=options.filter_eps is not None and "lse" in operands.per_row,
        vocab_axis=options.vocab_axis,
    )


def _tables(operands: Operands, multiple: int) -> list[jax.Array]:
    """Small copies of numbers per row, labels and numbers per class, in whole tiles."""

    def whole(vectors: Any, multiple: int, fill: Any) -> jax.Array:
        table = jnp.stack(vectors)
        more = -table.shape[1] % multiple
        return jnp.pad(table, ((0, 0), (0, more)), constant_values=fill)

    tables = []
    if operands.per_row:
        # In padded rows lse is +inf, so that every p is 0.
        ends = [jnp.inf if name == "lse" else 0 for name in operands.per_row]
        more = -operands.hidden.shape[0] % BLOCK
        vectors = [
            jnp.pad(values, (0, more), constant_values=end)
            for values, end in zip(operands.per_row.values(), ends, strict=True)
        ]
        tables.append(jnp.stack(vectors))
    if operands.labels is not None:
        tables.append(whole(list(operands.labels.T), BLOCK, -1))
    if operands.per_class:
        tables.append(whole(list(operands.per_class.values()), multiple, 0))
    return tables


def _inverted(operands: Operands) -> Operands:
    """The operands with 1 / temperature: kernels multiply."""
    per_row = dict(operands.per_row)
    if "temperature" in per_row:
        per_row["inverse_temperature"] = 1 / per_row.pop("temperature")
    return operands._replace(per_row=per_row)


def _active(known: dict[str, jax.Array], label_cotangents: Any) -> jax.Array:
    """True for rows with a nonzero cotangent."""
    found = [x != 0 for name, x in known.items() if name.startswith("g_")]
    if label_cotangents is not None:
        found.append((label_cotangents != 0).any(1))
    active = jnp.stack(found).any(0)
    return jnp.pad(active, (0, -active.shape[0] % BLOCK))


def _kept(distance: Any, active: jax.Array, eps: float | None, chunk: int) -> jax.Array:
    """True for blocks that the filter keeps, (tiles of rows, blocks of 128 classes)."""
    far = ((distance >= eps) & active[None]) | (distance == jnp.inf)
    blocks = chunk // FILTER_CLASSES
    return far.reshape(blocks, -1, far.shape[1] // BLOCK, BLOCK).any((1, 3)).T


def _varying(tree: Any, operands: Operands) -> Any:
    """Declares a tree to vary over every `shard_map` axis of an operand."""
    axes = frozenset[str]().union(
        *(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(operands))
    )

    def cast(x: jax.Array) -> jax.Array:
        missing = axes - jax.typeof(x).manual_axis_type.varying
        return lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x

    return jax.tree.map(cast, tree)
