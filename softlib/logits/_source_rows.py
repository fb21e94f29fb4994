"""Conversions of batches of any shape to rows of the engine, and back."""

import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from ._engine.tile import Modifiers, Options, Ranked, RowStatistics, logits_of, select

type Shape = tuple[int, ...]


def masked_modifiers(modifiers: Modifiers, where: Array) -> Modifiers:
    """The modifiers with 1 in rows that do not count."""
    ones = lambda value: (
        value if value is None or value.ndim == 0 else jnp.where(where, value, 1)
    )
    return modifiers._replace(
        scale=ones(modifiers.scale),
        temperature=ones(modifiers.temperature),
        centre=ones(modifiers.centre),
    )


def all_of(masks: Iterable[Array | None]) -> Array | None:
    """True where every mask over classes, or rows and classes, is; None is all True."""
    given = [mask for mask in masks if mask is not None]
    if not given:
        return None
    axes = max(mask.ndim for mask in given)
    alike = [mask.reshape(*(1,) * (axes - mask.ndim), *mask.shape) for mask in given]
    return functools.reduce(jnp.logical_and, alike)


def collapsed(array: Array, batch: Shape) -> Array:
    """Reshapes the batch axes to one axis of rows; a scalar stays one."""
    if array.ndim == 0 and batch:
        return array
    return array.reshape(math.prod(batch), *array.shape[len(batch) :])


def collapsed_modifiers(modifiers: Modifiers, shape: Shape) -> Modifiers:
    batch = shape[:-1]
    where = modifiers.class_where
    if where is not None and where.ndim > 1:
        where = collapsed(jnp.broadcast_to(where, shape), batch)
    collapse = functools.partial(collapsed, batch=batch)
    return Modifiers(
        modifiers.bias,
        jax.tree.map(collapse, modifiers.scale),
        jax.tree.map(collapse, modifiers.temperature),
        where,
        modifiers.class_log_weights,
        jax.tree.map(collapse, modifiers.centre),
    )


def final_logits(
    raw: Array, batch: Shape, options: Options, modifiers: Modifiers
) -> Array:
    modifiers = collapsed_modifiers(modifiers, raw.shape)
    z = logits_of(collapsed(raw, batch), options, modifiers).z
    return select(z, modifiers.class_where, -jnp.inf).reshape(raw.shape)


def label_rows(labels: Array | None, batch: Shape) -> Array | None:
    """The labels in the shape (rows, L)."""
    if labels is None:
        return None
    rows = collapsed(labels, batch)
    return rows if labels.ndim > len(batch) else rows.reshape(-1, 1)


def ranked_rows(
    labels: Array | None, label_logits: Array | None, batch: Shape
) -> Ranked | None:
    if labels is None or label_logits is None:
        return None
    rows = math.prod(batch)
    return Ranked(labels.reshape(rows, -1), label_logits.reshape(rows, -1))


def shaped(
    statistics: RowStatistics, batch: Shape, labels: Array | None
) -> RowStatistics:
    """Reshapes statistics to the batch shape, those of labels to the labels' shape."""
    found = jax.tree.map(
        lambda leaf: leaf.reshape(batch),
        statistics._replace(label_logits=None, label_rank=None),
    )
    if labels is None:
        return found
    per_label = lambda leaf: leaf.reshape(labels.shape)
    return found._replace(
        label_logits=jax.tree.map(per_label, statistics.label_logits),
        label_rank=jax.tree.map(per_label, statistics.label_rank),
    )


def modifier_specs(modifiers: Modifiers, rows: PartitionSpec) -> Modifiers:
    """Specs that divide modifiers per row, and leave those per class whole."""
    per_row = lambda array: rows if array.ndim else PartitionSpec()
    whole = lambda array: PartitionSpec()
    of_entries: Any = lambda array: rows if array.ndim > 1 else PartitionSpec()
    return Modifiers(
        jax.tree.map(whole, modifiers.bias),
        jax.tree.map(per_row, modifiers.scale),
        jax.tree.map(per_row, modifiers.temperature),
        jax.tree.map(of_entries, modifiers.class_where),
        jax.tree.map(whole, modifiers.class_log_weights),
        jax.tree.map(per_row, modifiers.centre),
    )


def row_specs(
    options: Options, batch: Shape, labels: Array | None, spec: PartitionSpec
) -> RowStatistics:
    """Specs of the statistics: those of the batch axes of hidden or logits."""
    rows = PartitionSpec(*spec[: len(batch)])
    specs: dict[str, Any] = dict.fromkeys(options.statistics, rows)
    if labels is not None and labels.ndim > len(batch):
        for name in specs.keys() & {"label_logits", "label_rank"}:
            specs[name] = PartitionSpec(*rows, None)
    return RowStatistics(**specs)
