"""A ring of tiles in shared memory: one warpgroup fills it, the others multiply.

The memory warpgroup copies with TMA. Slot `i % slots` holds step `i`; a barrier `ready`
per slot counts its copies, a barrier `free` per slot the warpgroups that have read it.

TMA writes the tiles of (8, 64) elements that matrix units read only if the array's rows
are multiples of 8 and its columns of 64. Other arrays are copied in boxes of 64 columns
without that tiling. A box is 128 bytes wide, so both ways put every element at the same
place of shared memory and swizzle it alike: a box is written through one view of the
memory and multiplied through another. The interpreter, which does not share memory
between views and does not ask for multiples, copies and multiplies through one view.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ._row_tiles import SPAN, WARPGROUPS

# Per thread; the three warpgroups share 512 of each lane.
COMPUTE_REGISTERS, MEMORY_REGISTERS = 232, 40
_SWIZZLED = (plgpu.SwizzleTransform(128),)
_TILED = (plgpu.TilingTransform((8, SPAN)), *_SWIZZLED)


@dataclasses.dataclass(frozen=True)
class Tile:
    """What a slot holds of one array.

    Attributes:
        rows: Of the array.
        columns: Of the array, a multiple of 64.
        aligned: Whether the array's own rows and columns are multiples of 8 and 64.
    """

    rows: int
    columns: int
    aligned: bool

    @property
    def width(self) -> int:
        """Columns of one box."""
        return self.columns if self.aligned else SPAN

    @property
    def boxes(self) -> int:
        return self.columns // self.width

    def bytes(self) -> int:
        return 2 * self.rows * self.columns

    def memory(self, slots: int, dtype: Any, interpret: Any) -> Any:
        shape = (slots, self.boxes, self.rows, self.width)
        tiled = plgpu.SMEM(shape, dtype, transforms=_TILED)
        if self.aligned or interpret:
            return tiled
        return plgpu.RefUnion(plgpu.SMEM(shape, dtype, transforms=_SWIZZLED), tiled)

    def views(self, memory_ref: Any, interpret: Any) -> tuple[Any, Any]:
        """(slot, box, row, column): what TMA writes, and what is multiplied."""
        if self.aligned or interpret:
            return memory_ref, memory_ref
        written, multiplied = memory_ref
        return written, multiplied

    def fetch(
        self, written: Any, slot: Any, array: Any, row: Any, column: Any, ready: Any
    ) -> None:
        """Copies from the array; what is beyond its end becomes 0."""
        for box in range(self.boxes):
            rows = pl.ds(row, self.rows)
            columns = pl.ds(column + box * self.width, self.width)
            plgpu.copy_gmem_to_smem(
                array.at[rows, columns], written.at[slot, box], ready.at[slot]
            )


def is_aligned(array: Any) -> bool:
    rows, columns = array.shape
    return rows % 8 == 0 and columns % SPAN == 0


@dataclasses.dataclass(frozen=True)
class Ring:
    ready: Any
    free: Any
    slots: int

    def slot(self, step: Any) -> Any:
        return lax.rem(step, jnp.int32(self.slots))

    def fill(self, steps: Any, copy: Callable[[Any, Any], None]) -> None:
        """Calls `copy(step, slot)` for every step, from the memory warpgroup."""

        def one(step, carry):
            slot = self.slot(step)

            @pl.when(step >= self.slots)
            def _():
                plgpu.barrier_wait(self.free.at[slot])

            copy(step, slot)
            return carry

        lax.fori_loop(0, steps, one, None)

        # Sees every slot freed: barriers must not go away with a phase unseen.
        def wait(step, carry):
            plgpu.barrier_wait(self.free.at[self.slot(step)])
            return carry

        lax.fori_loop(jnp.maximum(steps - self.slots, 0), steps, wait, None)

    def multiply(
        self, first: Any, steps: Any, start: Callable[[Any], None], products: int
    ) -> None:
        """Starts the products of each slot; the last slot stays occupied.

        `start(slot)` starts so many wgmma. `release` gives the last slot back, once the
        accumulators have been read.
        """

        def one(at, carry):
            step = first + at
            slot = self.slot(step)
            plgpu.barrier_wait(self.ready.at[slot])
            start(slot)
            # All but the newest are done: their slot can be refilled.
            plgpu.wgmma_wait(products)

            @pl.when(at > 0)
            def _():
                self.release(step - 1)

            return carry

        lax.fori_loop(0, steps, one, None)

    def release(self, step: Any) -> None:
        plgpu.barrier_arrive(self.free.at[self.slot(step)])


def barriers(slots: int, copies: int) -> dict[str, Any]:
    """Scratch of a ring whose slots take so many copies."""
    return {
        "ready": plgpu.Barrier(num_arrivals=copies, num_barriers=slots),
        "free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=slots),
    }


def swizzled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory for tiles of 64 or fewer columns, as aligned copies want it."""
    columns = shape[-1]
    tiling, swizzle = plgpu.TilingTransform((8, columns)), 2 * columns
    transforms = (tiling, plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def read(ref: Any, layout: Any) -> Any:
    """From global memory into registers: few numbers, as each thread wants them."""
    return plgpu.load(ref, layout=layout, optimized=False)


def transposed(ref: Any) -> Any:
    return ref.transpose((1, 0))
