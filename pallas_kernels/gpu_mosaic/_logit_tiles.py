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
        vocab_axis: The axis of the weight that runs over classes.
    """

    ring: Ring
    operands: tuple[Tile, Tile]
    memory: tuple[tuple[Any, Any], tuple[Any, Any]]
    steps: int
    classes: int
    vocab_axis: int

    def fetch(
        self,
        count: Any,
        hidden_ref: Any,
        weight_ref: Any,
        block: Any,
        place: Callable[[Any], Any],
    ) -> None:
        """Copies `count` tiles of classes, in the memory warpgroup.

        `place(tile)` is where the classes of a tile begin in the given weight.
        """
        plgpu.set_max_registers(_ring.MEMORY_REGISTERS, action="decrease")
        (of_hidden, of_weight), ready = self.operands, self.ring.ready
        (hidden, _), (weight, _) = self.memory

        def copy(step: Any, slot: Any) -> None:
            feature = lax.rem(step, self.steps) * SPAN
            at = place(lax.div(step, self.steps)), feature
            if self.vocab_axis == 1:
                at = at[::-1]
            of_hidden.fetch(hidden, slot, hidden_ref, block * BLOCK, feature, ready)
            of_weight.fetch(weight, slot, weight_ref, *at, ready)

        self.ring.fill(count * self.steps, copy)

    def product(self, tile: Any, rows: Any) -> "Logits":
        """The float32 logits of a compute warpgroup's `rows` of the block."""
        ring, steps, by_columns = self.ring, self.steps, self.vocab_axis == 1
        (_, hidden), (_, weight) = self.memory
        # The boxes of (D, V) hold some classes each, those of (V, D) all.
        boxes = self.operands[1].boxes if by_columns else 1

        def scope(*totals: Any) -> Any:
            def start(slot: Any) -> None:
                for box, total in enumerate(totals):
                    classes = weight.at[slot, box]
                    if not by_columns:
                        classes = _ring.transposed(classes)
                    plgpu.wgmma(total, hidden.at[slot, 0, rows], classes)

            ring.multiply(tile * steps, steps, start, boxes)
            raw = tuple(total[...] for total in totals)  # waits for every product
            ring.release(tile * steps + steps - 1)
            return raw

        width = self.classes // boxes
        accumulator = plgpu.ACC((ROWS, width), jnp.float32)
        return Logits(pl.run_scoped(scope, *[accumulator] * boxes), width)


@dataclasses.dataclass(frozen=True)
class Logits:
    """A tile of logits in registers, as boxes of `width` classes."""

    boxes: tuple[Any, ...]
    width: int

    def columns(self, first: int, count: int) -> Any:
        """The columns of a slice, which is inside a box."""
        box, first = divmod(first, self.width)
        return self.boxes[box][:, first : first + count]


def tile_of_weight(weight: Any, classes: int, vocab_axis: int) -> Tile:
    """The layout of a span of features of some classes."""
    shape = (classes, SPAN) if vocab_axis == 0 else (SPAN, classes)
    return Tile(*shape, _ring.is_aligned(weight))
