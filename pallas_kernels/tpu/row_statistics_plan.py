"""Options of the row-statistics kernels for TPUs, and their tiles.

Hidden and weight are float32 or bfloat16; the weight is (V, D), or (D, V) with
`vocab_axis=1`.
"""

import dataclasses
from typing import Any

from jax import lax

from pallas_kernels._devices import tpu
from pallas_kernels._row_formulas import Operands as Operands

from ._row_tiles import Pass, Shapes, Tiles, choose_tiles


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of a call: Python values, each of which makes another kernel.

    Attributes:
        statistics: Names of the wanted statistics: `lse`, `label_logits`, `mean_logit`,
            `sum_logits`, `sum_squared_logits`, `max_logit`, `argmax`.
        softcap: c of z = c tanh(u / c), or None.
        vocab_axis: The axis of the weight that runs over classes.
        precision: Precision of float32 products; bfloat16 products are exact.
        filter_eps: Blocks of 128 rows x 128 classes, in which all |p - onehot| are
            below this, give no gradient to hidden and weight; tiles of only such blocks
            are not multiplied.
    """

    statistics: tuple[str, ...] = ("lse",)
    softcap: float | None = None
    vocab_axis: int = 0
    precision: Any = lax.Precision.HIGHEST
    filter_eps: float | None = None


def as_stored(options: Options, operands: Operands) -> tuple[Options, Operands]:
    """The same call, with the weight transposed if it lies in memory by columns.

    XLA stores a matrix in whichever order takes fewer tiles of 8 x 128 numbers, rows
    first if both are equal. A kernel reads rows of memory, for which XLA would copy a
    matrix that lies by columns; to transpose one costs nothing.
    """
    rows, columns = operands.weight.shape
    tiles = lambda rows, columns: -(-rows // 8) * -(-columns // 128)
    if tiles(rows, columns) <= tiles(columns, rows):
        return options, operands
    turned = dataclasses.replace(options, vocab_axis=1 - options.vocab_axis)
    return turned, operands._replace(weight=operands.weight.T)


def tiles_of(kind: Pass, options: Options, operands: Operands) -> Tiles | None:
    """The tiles that a kernel chooses by default; None if none fits the device."""
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
