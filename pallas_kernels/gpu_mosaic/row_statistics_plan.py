"""Options of the row-statistics kernels for Hopper, and their tiles.

Hidden and weight are both bfloat16 or both float16, the weight is (V, D), and D a
multiple of 8. Numbers per row and per class are float32.
"""

import dataclasses

import jax

from pallas_kernels._devices import H100, gpu
from pallas_kernels._row_formulas import Operands as Operands, state_names

from ._row_tiles import (
    BackwardTiles,
    Shapes,
    Tiles,
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
    """

    statistics: tuple[str, ...] = ("lse",)
    softcap: float | None = None
    filter_eps: float | None = None


def tiles_of(options: Options, operands: Operands) -> Tiles | None:
    """The tiles that `forward` chooses by default; None if none fits registers."""
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
    """The tiles that `gradient` chooses by default; None if none fits registers."""
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
