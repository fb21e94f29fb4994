"""Flax modules; each owns parameters and calls public functions of softlib.

- `OutputHead` (NNX), `LinenOutputHead` (linen): the output layer of a language model.
"""

from ._linen_output_head import LinenOutputHead as LinenOutputHead
from ._output_head import OutputHead as OutputHead

__all__ = ["LinenOutputHead", "OutputHead"]
