"""Operands and options of the row-statistics kernels for TPUs, and their tiles."""

import dataclasses
from typing import Any, NamedTuple

from jax import Array, lax

from pallas_kernels._devices import tpu

from ._row_tiles import Pass, Shapes, Tiles, choose_tiles


class Operands(NamedTuple):
    """Arrays of one call.

    Attributes:
        hidden: (N, D), float32 or bfloat16.
        weight: (V, D), or (D, V) with `vocab_axis=1`; float32 or bfloat16.
        labels: (N, L) int32, or None; a label outside [0, V) is in no class.
        per_row: Numbers of every row, (N,) each, by name: `logit_scale`, `temperature`.
        per_class: Numbers of every class, (V,) each: `bias`, and `where`, which is 0
            for a class that is not selected.
    """

    hidden: Array
    weight: Array
    labels: Array | None
    per_row: dict[str, Array]
    per_class: dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Options:
    """What is static.

    Attributes:
        statistics: Names of those that are asked for: `lse`, `label_logits`,
            `mean_logit`, `sum_logits`, `sum_squared_logits`, `max_logit`, `argmax`.
        logit_softcap: c of z = c tanh(u / c), or None.
        vocab_axis: The axis of the weight that runs over classes.
        precision: Of products of float32; those of bfloat16 are exact.
        filter_eps: Blocks of 128 rows x 128 classes, all of whose probabilities are
            closer than this to what the labels ask, give no gradient to hidden and
            weight; tiles of nothing else are not multiplied.
    """

    statistics: tuple[str, ...] = ("lse",)
    logit_softcap: float | None = None
    vocab_axis: int = 0
    precision: Any = lax.Precision.HIGHEST
    filter_eps: float | None = None


def tiles_of(kind: Pass, options: Options, operands: Operands) -> Tiles | None:
    """The tiles that a kernel takes by itself; None if no tiles fit the device."""
    rows, features = operands.hidden.shape
    shapes = Shapes(
        rows,
        features,
        operands.weight.shape[options.vocab_axis],
        operands.hidden.dtype.itemsize,
        operands.weight.dtype.itemsize,
        labels=operands.labels is not None,
        filtered=options.filter_eps is not None,
    )
    return choose_tiles(kind, shapes, tpu())
