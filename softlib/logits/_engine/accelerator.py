"""Sizes of the steps of a stream on TPUs and GPUs, which have large matrix units.

`chunks` has the sizes for a CPU, whose tiles stay in a cache. Here each step costs a
dozen launches and reads the hidden vectors of its rows, so there are few steps, each
with a tile of `STEP_BYTES`:

- Only classes are cut. A step of all R rows and C classes reads hidden and adds to its
  float32 gradient. Steps of some rows would each read the weight, and add to a float32
  gradient of it, and the weight is larger. Rows are cut only where `LEAST` classes of
  all rows exceed the tile.
- A backward step also holds the float32 gradient of its C classes, (C, D): it is not
  larger than the tile either.

So a training step needs some two tiles and the float32 gradient of hidden: 571 MiB for
16384 rows, 4096 features and 151936 classes, compiled for an H100.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from softlib._symbolic import is_symbolic

# Memory of one tile of logits, 256 MiB: 2**26 numbers of float32.
STEP_BYTES = 2**28
# Memory of the logits that a sum with gradients keeps, 384 MiB: those of all classes or
# of the first steps.
KEPT_BYTES = 3 * 2**27
# Classes per step are a multiple of this number, and at least as many.
LEAST = 256
# An unknown number of rows counts as this many.
_UNKNOWN_ROWS = 2**14


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """Steps of a program for a TPU or a GPU.

    Attributes:
        copies: Streams that run at once, under `vmap`: they share the memory of a tile.
    """

    copies: int = 1

    def most_rows(self, dtype: DTypeLike) -> int:
        """The rows of which a tile holds `LEAST` classes."""
        return max(self._numbers(STEP_BYTES, dtype) // LEAST, 1)

    def classes(
        self, rows: int, features: int, vocabulary: int, dtype: DTypeLike
    ) -> int:
        """Classes per step, in steps of about equal size."""
        rows = _UNKNOWN_ROWS if is_symbolic(rows) else rows
        most = self._numbers(STEP_BYTES, dtype) // max(rows, features, 1)
        steps = math.ceil(vocabulary / max(most // LEAST * LEAST, LEAST))
        equal = math.ceil(vocabulary / max(steps, 1) / LEAST) * LEAST
        return min(equal, vocabulary)

    def kept_classes(
        self, rows: int, vocabulary: int, size: int, dtype: DTypeLike
    ) -> int:
        """All classes, or those of the first steps, whose logits can be kept."""
        most = self._numbers(KEPT_BYTES, dtype) // max(rows, 1)
        return vocabulary if most >= vocabulary else most // size * size

    def _numbers(self, size: int, dtype: DTypeLike) -> int:
        """Numbers of each copy in an array of `size` bytes."""
        return size // jnp.dtype(dtype).itemsize // self.copies


@dataclasses.dataclass(frozen=True)
class OnAccelerator:
    """A plain implementation in the steps of an accelerator.

    It is compared by value, because it belongs to the key of compiled programs.
    """

    call: Callable[[Any, Any], Any]

    def __call__(self, options: Any, operands: Any, copies: int) -> Any:
        return self.call(options.on(Accelerator(copies)), operands)
