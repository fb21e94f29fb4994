"""Common code of attention kernels for Hopper: ring of tiles, products, results.

The memory warpgroup follows a list and fills the slots of a ring; the others wait for a
slot, multiply, and free it. Step i of a block of threads uses slot i mod stages.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .attention_tiles import ROWS, SWIZZLE, WARPGROUPS, WIDE_COLUMNS

# Registers per thread; the three warpgroups share 512 per lane.
COMPUTE_REGISTERS, MEMORY_REGISTERS = 240, 24


@dataclasses.dataclass(frozen=True)
class Walk:
    """The list of one tile.

    Its numbers are read from the cache each time they are needed, to save registers.

    Attributes:
        others_ref: As in `Lists`.
        tiles_ref: As in `Lists`.
        at: The tile's row of `tiles_ref`.
    """

    others_ref: Any
    tiles_ref: Any
    at: Any

    @property
    def tile(self) -> Any:
        return self.tiles_ref[self.at, 0]

    @property
    def whole(self) -> Any:
        """Number of listed tiles in which all pairs attend."""
        return self.tiles_ref[self.at, 2] - self.tiles_ref[self.at, 1]

    @property
    def count(self) -> Any:
        """Length of the list."""
        return self.tiles_ref[self.at, 3] - self.tiles_ref[self.at, 1]

    def other(self, step: Any) -> Any:
        """The tile listed at a step; undefined behind the end of the list."""
        last = self.others_ref.shape[0] - 1
        return self.others_ref[jnp.minimum(self.tiles_ref[self.at, 1] + step, last)]

    def fold(self, step: Callable[[bool, Any, Any], Any], carry: Any) -> Any:
        """Folds `step(partial, at, carry)` over the list, unmasked tiles first."""
        whole = lambda at, carry: step(False, at, carry)
        partial = lambda at, carry: step(True, at, carry)
        carry = lax.fori_loop(0, self.whole, whole, carry)
        return lax.fori_loop(self.whole, self.count, partial, carry)


@dataclasses.dataclass(frozen=True)
class Channel:
    """A ring buffer in shared memory.

    Attributes:
        rings: Arrays with the stages as first axis; a slot is one stage of all.
        ready: Barriers on which the copies into a slot arrive.
        free: Barriers on which the warpgroups that have read a slot arrive.
    """

    rings: tuple[Any, ...]
    ready: Any
    free: Any

    @property
    def stages(self) -> int:
        return self.rings[0].shape[0]

    def slot(self, step: Any) -> Any:
        # Keeps the compiler from treating a single slot as a constant.
        return anew(lax.rem(step, self.stages))

    def open(self) -> None:
        """Marks every slot as free; each reading warpgroup calls it before it starts.

        So the first copies wait like all others, in the same loop.
        """
        for slot in range(self.stages):
            plgpu.barrier_arrive(self.free.at[slot])

    def wait(self, step: Any) -> list[Any]:
        """Waits until the slot of a step is filled, and returns it."""
        slot = self.slot(step)
        plgpu.barrier_wait(self.ready.at[slot])
        return [ring.at[slot] for ring in self.rings]

    def filled(self, step: Any) -> list[Any]:
        """The slot of a step that was waited for, with an opaque index (`anew`)."""
        slot = self.slot(step)
        return [ring.at[slot] for ring in self.rings]

    def release(self, step: Any) -> None:
        plgpu.barrier_arrive(self.free.at[self.slot(step)])

    def fill(self, step: Any, *sources: Any) -> None:
        """Copies into the slot of a step, as soon as it is free."""
        slots, ready = self.vacated(step)
        for source, slot in zip(sources, slots, strict=True):
            plgpu.copy_gmem_to_smem(source, slot, ready)

    def vacated(self, step: Any) -> tuple[list[Any], Any]:
        """Waits until the slot of a step is free; returns it and its barrier."""
        slot = self.slot(step)
        plgpu.barrier_wait(self.free.at[slot])
        return [ring.at[slot] for ring in self.rings], self.ready.at[slot]

    def close(self) -> None:
        """Waits for every slot: barriers must not end with an unobserved phase."""
        for slot in range(self.stages):
            plgpu.barrier_wait(self.free.at[slot])


def feed(walk: Walk, fill: Callable[[Any, Any, Any], None], *, rounds: int = 1) -> None:
    """Calls `fill(step, round, tile)` for each listed tile, in each round.

    The index of a tile is read one step early: its latency is that of a tile.
    """

    def step(now, carry):
        turn, at, tile = carry
        last = at + 1 == walk.count
        at = jnp.where(last, 0, at + 1)
        after = walk.other(at)
        fill(now, turn, tile)
        return jnp.where(last, turn + 1, turn), at, after

    lax.fori_loop(0, rounds * walk.count, step, (0, 0, walk.other(0)))


def feed_keys(
    walk: Walk,
    fills: Sequence[tuple[Channel, Any]],
    head: tuple[Any, Any],
    size: int,
    then: Callable[[Any, Any], None],
) -> None:
    """Runs the memory warpgroup for the tile of queries of a block.

    `fills`: channels with their arrays. `head`: batch entry and key head. `then` is
    called with a step and its tile after the copies of the first array.
    """
    plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
    batch, key_head = head

    def fill(step, _, tile):
        for place, (channel, ref) in enumerate(fills):
            channel.fill(step, ref.at[batch, pl.ds(tile * size, size), key_head])
            if place == 0:
                then(step, tile)

    feed(walk, fill)
    for channel, _ in fills:
        channel.close()


def scalars(scalars_refs: Sequence[Any], batch: Any) -> list[Any]:
    """The further arguments of masks for a batch entry, from one array or none."""
    return [ref[batch, i] for ref in scalars_refs for i in range(ref.shape[1])]


def swizzled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory in the layout of matrix units."""
    columns = SWIZZLE // jnp.dtype(dtype).itemsize
    transforms = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(SWIZZLE))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def transposed(ref: Any) -> Any:
    return ref.transpose((1, 0))


def anew(index: Any) -> Any:
    """The index, made opaque to the compiler.

    Otherwise the compiler keeps the addresses of all slices of an operand in registers,
    across a loop.
    """
    return lax.optimization_barrier(index)


def product(left: Any, right: Any, columns: int) -> Any:
    """The float32 product of 64 rows of `left`, in registers or not, and `right`."""

    def scope(total):
        plgpu.wgmma(total, left, right)
        return total[...]  # waits for it

    return pl.run_scoped(scope, plgpu.ACC((ROWS, columns), jnp.float32))


def by_columns(function: Callable[..., Any], tile: Any, width: int = 32) -> Any:
    """Applies `function(columns, piece)` to slices of a tile, one after the other.

    All at once, intermediate values would exceed the registers.
    """
    found = []
    for first in range(0, tile.shape[1], width):
        piece = lax.slice(tile, (0, first), (tile.shape[0], first + width))
        results = function(pl.ds(first, width), piece)
        found.append(lax.optimization_barrier(results))
    return tuple(lax.concatenate(pieces, 1) for pieces in zip(*found, strict=True))


def at_once(function: Callable[..., Any], tile: Any) -> Any:
    """Applies `function(columns, tile)` to the whole tile."""
    return function(pl.ds(0, tile.shape[1]), tile)


def zeros(columns: int) -> Any:
    """A zero accumulator of 64 rows."""
    zero = jnp.zeros((ROWS, columns), jnp.float32)
    return plgpu.layout_cast(zero, plgpu.Layout.WGMMA)


def staging(columns: int, dtype: Any, interpret: Any) -> Any:
    """Shared memory per warpgroup that `operand` needs in the interpreter."""
    return swizzled((WARPGROUPS, ROWS, columns), dtype) if interpret else None


def per_column(slot: Any, columns: Any) -> Any:
    """One number per column of a tile of scores, in the layout of its registers."""
    return plgpu.load(slot.at[columns], layout=plgpu.Layout.WGMMA.reduce(0))


def operand(values: Any, staging: Any) -> Any:
    """A left operand of a product in registers; in `staging` for the interpreter."""
    if staging is None:
        return values
    staging[...] = values
    plgpu.commit_smem()
    return staging


def added(total: Any, left: Any, right: Any, staging: Any) -> Any:
    """The sum total + left @ right.

    In the interpreter (with `staging`), whose accumulators start at 0, `total` is added
    after the product.
    """
    if staging is not None:
        return total + product(left, right, total.shape[1])
    accumulate = pl.run_state(lambda total: plgpu.wgmma(total, left, right))
    return accumulate(plgpu.ACC.init(total))


def wide(is_wide: bool) -> Any:
    """Shared memory per warpgroup for a few columns of a result, if it is float32."""
    return swizzled((WARPGROUPS, ROWS, WIDE_COLUMNS), jnp.float32) if is_wide else None


def store(total: Any, slot: Any, target: Any) -> None:
    """Stores through shared memory to `target`; rows beyond its end are dropped."""
    slot[...] = total.astype(slot.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(slot, target)


def store_result(total: Any, own: Any, wide: Any, warpgroup: Any, target: Any) -> None:
    """Stores a warpgroup's result through its tile in `own`, or in `wide` if given.

    `wide` takes a few columns at a time.
    """
    if wide is None:
        store(total, own.at[warpgroup], target)
        return
    for first in range(0, total.shape[1], WIDE_COLUMNS):
        # The copy before, of this result or of another, may still read the slot.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        stop = first + WIDE_COLUMNS
        piece = lax.slice(total, (0, first), (total.shape[0], stop))
        columns = target.at[:, pl.ds(first, WIDE_COLUMNS)]
        store(piece, wide.at[warpgroup], columns)


def per_row(values: Any) -> Any:
    """One number per row of a tile, in the layout of its registers."""
    return plgpu.layout_cast(values, plgpu.Layout.WGMMA.reduce(1))
