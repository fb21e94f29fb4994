"""Raw logits of a block of rows, tile by tile of classes, with a ring over features."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import _ring
from ._ring import Ring, Tile
from ._row_tiles import BLOCK, ROWS, SPAN


@dataclasses.dataclass(frozen=True)
class LogitTiles:
    """Tiles of logits of one block of threads, and the memory that feeds them.

    Attributes:
        ring: The ring, whose slots hold a span of features of both operands.
        operands: Layouts of hidden and weight in a slot.
        memory: Views of both for copies, and for products.
        steps: Spans of features per tile.
        classes: Classes per tile.
    """

    ring: Ring
    operands: tuple[Tile, Tile]
    memory: tuple[tuple[Any, Any], tuple[Any, Any]]
    steps: int
    classes: int

    def fetch(
        self,
        count: Any,
        hidden_ref: Any,
        weight_ref: Any,
        block: Any,
        first_class: Callable[[Any], Any],
    ) -> None:
        """Copies `count` tiles of classes, in the memory warpgroup."""
        plgpu.set_max_registers(_ring.MEMORY_REGISTERS, action="decrease")
        (of_hidden, of_weight), ready = self.operands, self.ring.ready
        (hidden, _), (weight, _) = self.memory

        def copy(step: Any, slot: Any) -> None:
            column = lax.rem(step, self.steps) * SPAN
            first = first_class(lax.div(step, self.steps))
            of_hidden.fetch(hidden, slot, hidden_ref, block * BLOCK, column, ready)
            of_weight.fetch(weight, slot, weight_ref, first, column, ready)

        self.ring.fill(count * self.steps, copy)

    def product(self, tile: Any, rows: Any) -> Any:
        """The float32 logits of a compute warpgroup's `rows` of the block."""
        ring, steps = self.ring, self.steps
        (_, hidden), (_, weight) = self.memory

        def scope(total: Any) -> Any:
            def start(slot: Any) -> None:
                classes = _ring.transposed(weight.at[slot, 0])
                plgpu.wgmma(total, hidden.at[slot, 0, rows], classes)

            ring.multiply(tile * steps, steps, start, 1)
            raw = total[...]  # waits for every product
            ring.release(tile * steps + steps - 1)
            return raw

        return pl.run_scoped(scope, plgpu.ACC((ROWS, self.classes), jnp.float32))
