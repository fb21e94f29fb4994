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

So a training step needs some two tiles, the float32 gradient of hidden, and on a GPU
what is kept for the backward pass: 735 MiB for 16384 rows, 4096 features and 151936
classes, compiled for an H100.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from softlib._symbolic import is_symbolic

# Memory of one tile of logits, 256 MiB: 2**26 numbers of float32.
STEP_BYTES = 2**28
# Memory of what an operation keeps for its backward pass, 384 MiB, of all classes or of
# the first steps: exponentials, or the logits of a sum with gradients.
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
        """All classes, or those of the first steps, of which a number can be kept."""
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


def platform_that_keeps() -> str | None:
    """The platform for which a program is traced, if it is to keep exponentials.

    A program is traced for the mesh's device, or for the default device. Only GPUs
    keep any: for a TPU, XLA stores what it computes from them, so that a training step
    of the size above takes 2.2 GiB instead of 537 MiB.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    device = device or jax.config.jax_default_device or jax.devices()[0]
    name = device if isinstance(device, str) else device.platform
    return "cuda" if name in ("gpu", "cuda") else None
