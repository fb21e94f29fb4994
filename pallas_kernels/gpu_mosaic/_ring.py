"""A ring buffer of tiles in shared memory: one warpgroup fills it, others multiply.

The memory warpgroup copies with TMA. Slot `i % slots` holds step `i`; a barrier `ready`
per slot counts its copies, a barrier `free` per slot the warpgroups that have read it.

TMA writes the tiles of (8, 64) elements that matrix units read only if the array's rows
are multiples of 8 and its columns of 64. Other arrays are copied in boxes of 64 columns
without that tiling. A box is 128 bytes wide, so both ways put every element at the same
address, with the same swizzle: a box is written through one view of the memory and
multiplied through another. The interpreter, whose views do not share memory and which
does not require multiples, uses one view for both.

Tiles of float32, which are only stored, have 32 columns where those of 16 bits have 64.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ._row_tiles import SPAN, WARPGROUPS

# Registers per thread; the three warpgroups share 512 per lane.
COMPUTE_REGISTERS, MEMORY_REGISTERS = 232, 40
_SWIZZLED = (plgpu.SwizzleTransform(128),)


@dataclasses.dataclass(frozen=True)
class Tile:
    """The tile of an array in a slot.

    Attributes:
        rows: Rows of the tile.
        columns: Columns of the tile, a multiple of `span`.
        aligned: Whether the array's own rows and columns are multiples of 8 and `span`.
        span: Columns of 128 bytes.
    """

    rows: int
    columns: int
    aligned: bool
    span: int = SPAN

    @property
    def width(self) -> int:
        """Number of columns of a box."""
        return self.columns if self.aligned else self.span

    @property
    def boxes(self) -> int:
        return self.columns // self.width

    def memory(self, slots: int, dtype: Any, interpret: Any) -> Any:
        shape = (slots, self.boxes, self.rows, self.width)
        tiling = plgpu.TilingTransform((8, self.span))
        tiled = plgpu.SMEM(shape, dtype, transforms=(tiling, *_SWIZZLED))
        if self.aligned or interpret:
            return tiled
        return plgpu.RefUnion(plgpu.SMEM(shape, dtype, transforms=_SWIZZLED), tiled)

    def views(self, memory_ref: Any, interpret: Any) -> tuple[Any, Any]:
        """Views (slot, box, row, column) for TMA to write, and for products."""
        if self.aligned or interpret:
            return memory_ref, memory_ref
        written, multiplied = memory_ref
        return written, multiplied

    def fetch(
        self, written: Any, slot: Any, array: Any, row: Any, column: Any, ready: Any
    ) -> None:
        """Copies from the array, with 0 beyond its end."""
        for box in range(self.boxes):
            rows = pl.ds(row, self.rows)
            columns = pl.ds(column + box * self.width, self.width)
            plgpu.copy_gmem_to_smem(
                array.at[rows, columns], written.at[slot, box], ready.at[slot]
            )


def is_aligned(array: Any) -> bool:
    rows, columns = array.shape
    return rows % 8 == 0 and columns % span_of(array.dtype) == 0


def span_of(dtype: Any) -> int:
    """The columns of 128 bytes."""
    return 128 // jnp.dtype(dtype).itemsize


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

        # Waits for every slot: barriers must not end with an unobserved phase.
        def wait(step, carry):
            plgpu.barrier_wait(self.free.at[self.slot(step)])
            return carry

        lax.fori_loop(jnp.maximum(steps - self.slots, 0), steps, wait, None)

    def multiply(
        self, first: Any, steps: Any, start: Callable[[Any], None], products: int
    ) -> None:
        """Starts the products of each slot; the last slot stays occupied.

        `start(slot)` starts `products` wgmma. `release` frees the last slot, once the
        accumulators have been read.
        """

        def one(at, carry):
            step = first + at
            slot = self.slot(step)
            plgpu.barrier_wait(self.ready.at[slot])
            start(slot)
            # All but the newest products are done: their slot can be refilled.
            plgpu.wgmma_wait(products)

            @pl.when(at > 0)
            def _():
                self.release(step - 1)

            return carry

        lax.fori_loop(0, steps, one, None)

    def release(self, step: Any) -> None:
        plgpu.barrier_arrive(self.free.at[self.slot(step)])


def barriers(slots: int, copies: int) -> dict[str, Any]:
    """Barriers of a ring whose slots take `copies` copies each."""
    return {
        "ready": plgpu.Barrier(num_arrivals=copies, num_barriers=slots),
        "free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=slots),
    }


def swizzled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory for tiles of up to 64 columns, in the layout of aligned copies."""
    columns = shape[-1]
    tiling, swizzle = plgpu.TilingTransform((8, columns)), 2 * columns
    transforms = (tiling, plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def read(ref: Any, layout: Any) -> Any:
    """Reads a few numbers from global memory into registers, in this layout."""
    return plgpu.load(ref, layout=layout, optimized=False)


def transposed(ref: Any) -> Any:
    return ref.transpose((1, 0))
