"""Options of the row-statistics kernels for Hopper, and their tiles.

Hidden is bfloat16 or float16. The weight is of the same dtype, or float32 and rounded
to it; it is (V, D), or (D, V) with `vocab_axis=1`. Rows of memory begin at multiples of
16 bytes: D is a multiple of 8, and of (D, V) V too. Numbers per row and per class are
float32.
"""

import dataclasses

import jax

from pallas_kernels._devices import H100, gpu
from pallas_kernels._row_formulas import Operands as Operands, state_names

from ._row_tiles import (
    BackwardTiles,
    ForwardTiles,
    Shapes,
    choose_backward_tiles,
    choose_tiles,
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of a call: Python values, each of which makes another kernel.

    Attributes:
        statistics: Names of the wanted statistics: `lse`, `label_logits`, `mean_logit`,
            `sum_logits`, `sum_squared_logits`, `max_logit`, `argmax`.
        softcap: c of z = c tanh(u / c), or None.
        filter_eps: Blocks of 128 rows x 128 classes, in which all |p - onehot| are
            below this, give no gradient to hidden and weight, and are not multiplied.
        vocab_axis: The axis of the weight that runs over classes.
    """

    statistics: tuple[str, ...] = ("lse",)
    softcap: float | None = None
    filter_eps: float | None = None
    vocab_axis: int = 0


def tiles_of(options: Options, operands: Operands) -> ForwardTiles | None:
    """The tiles that `forward` chooses by default; None if none fits registers."""
    labels = 0 if operands.labels is None else operands.labels.shape[1]
    carried = state_names(options.statistics, labels)
    numbers = len(operands.per_row) + len(operands.per_class) + len(carried)
    numbers += operands.weight.dtype != operands.hidden.dtype  # the first class
    return choose_tiles(_shapes(options, operands, numbers), gpu() or H100)


def backward_tiles_of(
    options: Options,
    operands: Operands,
    known: dict[str, jax.Array],
    label_cotangents: jax.Array | None = None,
) -> BackwardTiles | None:
    """The tiles that `gradient` chooses by default; None if none fits registers."""
    filtered = options.filter_eps is not None
    numbers = len(operands.per_row) + len(operands.per_class) + len(known) + filtered
    numbers += "temperature" in operands.per_row  # its sum costs one more
    if operands.labels is not None:
        labels = operands.labels.shape[1]
        of_labels = label_cotangents is not None
        numbers += labels * (of_labels + (of_labels or filtered))
    return choose_backward_tiles(_shapes(options, operands, numbers), gpu() or H100)


def _shapes(options: Options, operands: Operands, numbers: int) -> Shapes:
    hidden, weight = operands.hidden, operands.weight
    rows, features = hidden.shape
    return Shapes(
        rows,
        features,
        weight.shape[options.vocab_axis],
        numbers,
        options.vocab_axis,
        rounded=weight.dtype != hidden.dtype,
        filtered=options.filter_eps is not None,
    )
