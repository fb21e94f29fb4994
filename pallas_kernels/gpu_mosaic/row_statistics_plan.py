"""Operands and options of the row-statistics kernels for Hopper, and their tiles."""

import dataclasses
from typing import NamedTuple

import jax

from pallas_kernels._devices import H100, gpu
from pallas_kernels._row_formulas import state_names

from ._row_tiles import (
    BackwardTiles,
    Shapes,
    Tiles,
    choose_backward_tiles,
    choose_tiles,
)


class Operands(NamedTuple):
    """Arrays of one call.

    Attributes:
        hidden: (N, D), bfloat16 or float16, D a multiple of 8.
        weight: (V, D), of the same dtype.
        labels: (N, L) int32, or None; a label outside [0, V) is in no class.
        per_row: Numbers of every row, (N,) float32 each, by name: `logit_scale`,
            `temperature`.
        per_class: Numbers of every class, (V,) float32 each: `bias`, and `where`, which
            is 0 for a class that is not selected.
    """

    hidden: jax.Array
    weight: jax.Array
    labels: jax.Array | None
    per_row: dict[str, jax.Array]
    per_class: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Options:
    """What is static.

    Attributes:
        statistics: Names of those that are asked for: `lse`, `label_logits`,
            `mean_logit`, `sum_logits`, `sum_squared_logits`, `max_logit`, `argmax`.
        logit_softcap: c of z = c tanh(u / c), or None.
        filter_eps: Blocks of 128 rows x 128 classes, all of whose probabilities are
            closer than this to what the labels ask, give no gradient to hidden and
            weight, and are not multiplied.
    """

    statistics: tuple[str, ...] = ("lse",)
    logit_softcap: float | None = None
    filter_eps: float | None = None


def tiles_of(options: Options, operands: Operands) -> Tiles | None:
    """The tiles that `forward` takes by itself; None if none has enough registers."""
    labels = 0 if operands.labels is None else operands.labels.shape[1]
    carried = state_names(options.statistics, labels)
    numbers = len(operands.per_row) + len(operands.per_class) + len(carried)
    return choose_tiles(_shapes(operands, numbers), gpu() or H100)


def backward_tiles_of(
    options: Options,
    operands: Operands,
    known: dict[str, jax.Array],
    label_cotangents: jax.Array | None = None,
) -> BackwardTiles | None:
    """The tiles that `gradient` takes by itself; None if none has enough registers."""
    filtered = options.filter_eps is not None
    numbers = len(operands.per_row) + len(operands.per_class) + len(known) + filtered
    numbers += "temperature" in operands.per_row  # its sum costs one more
    if operands.labels is not None:
        labels = operands.labels.shape[1]
        of_labels = label_cotangents is not None
        numbers += labels * (of_labels + (of_labels or filtered))
    return choose_backward_tiles(_shapes(operands, numbers), gpu() or H100)


def _shapes(operands: Operands, numbers: int) -> Shapes:
    rows, features = operands.hidden.shape
    return Shapes(rows, features, operands.weight.shape[0], numbers)
