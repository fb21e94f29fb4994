"""What attention kernels for Hopper share: how tiles come in, products, results.

The memory warpgroup walks along a list and fills the slots of a ring; the others wait
for a slot, multiply, and free it. Step i of a block of threads uses slot i mod stages.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .attention_tiles import FEATURES, ROWS, WARPGROUPS

# Per thread; the three warpgroups share 512 of each lane.
COMPUTE_REGISTERS, MEMORY_REGISTERS = 240, 24


@dataclasses.dataclass(frozen=True)
class Walk:
    """The list of one tile.

    Its numbers are read where they are needed, again if need be: they lie in a cache,
    and registers are short.

    Attributes:
        others_ref: As in `Lists`.
        tiles_ref: As in `Lists`.
        at: The row of the table.
    """

    others_ref: Any
    tiles_ref: Any
    at: Any

    @property
    def tile(self) -> Any:
        return self.tiles_ref[self.at, 0]

    @property
    def whole(self) -> Any:
        """Length of the part in which all pairs attend."""
        return self.tiles_ref[self.at, 2] - self.tiles_ref[self.at, 1]

    @property
    def count(self) -> Any:
        """Length of the list."""
        return self.tiles_ref[self.at, 3] - self.tiles_ref[self.at, 1]

    def other(self, step: Any) -> Any:
        """The tile that is listed there; of some list behind the end."""
        last = self.others_ref.shape[0] - 1
        return self.others_ref[jnp.minimum(self.tiles_ref[self.at, 1] + step, last)]

    def fold(self, step: Callable[[bool, Any, Any], Any], carry: Any) -> Any:
        """`step(partial, at, carry)` along the list, those without a mask first."""
        whole = lambda at, carry: step(False, at, carry)
        partial = lambda at, carry: step(True, at, carry)
        carry = lax.fori_loop(0, self.whole, whole, carry)
        return lax.fori_loop(self.whole, self.count, partial, carry)


@dataclasses.dataclass(frozen=True)
class Channel:
    """A ring of slots.

    Attributes:
        rings: Arrays in shared memory, the stages first; a slot is one stage of all.
        ready: Barriers, on which the copies into a slot arrive.
        free: Barriers, on which the warpgroups that have read it arrive.
    """

    rings: tuple[Any, ...]
    ready: Any
    free: Any

    @property
    def stages(self) -> int:
        return self.rings[0].shape[0]

    def slot(self, step: Any) -> Any:
        # A single one is always the same, which the compiler had better not know.
        return anew(lax.rem(step, self.stages))

    def open(self) -> None:
        """Every slot is free; each warpgroup that reads says so before it starts.

        So that the first copies wait like all others, which makes one loop of them.
        """
        for slot in range(self.stages):
            plgpu.barrier_arrive(self.free.at[slot])

    def wait(self, step: Any) -> list[Any]:
        """The slot of that step, filled."""
        slot = self.slot(step)
        plgpu.barrier_wait(self.ready.at[slot])
        return [ring.at[slot] for ring in self.rings]

    def filled(self, step: Any) -> list[Any]:
        """The slot of a step that was waited for, as one the compiler does not know."""
        slot = self.slot(step)
        return [ring.at[slot] for ring in self.rings]

    def release(self, step: Any) -> None:
        plgpu.barrier_arrive(self.free.at[self.slot(step)])

    def fill(self, step: Any, *sources: Any) -> None:
        """Copies into the slot of that step, as soon as it is free."""
        slots, ready = self.vacated(step)
        for source, slot in zip(sources, slots, strict=True):
            plgpu.copy_gmem_to_smem(source, slot, ready)

    def vacated(self, step: Any) -> tuple[list[Any], Any]:
        """The slot of that step, free, and the barrier for copies into it."""
        slot = self.slot(step)
        plgpu.barrier_wait(self.free.at[slot])
        return [ring.at[slot] for ring in self.rings], self.ready.at[slot]

    def close(self) -> None:
        """Sees every slot freed: barriers must not go away with a phase unseen."""
        for slot in range(self.stages):
            plgpu.barrier_wait(self.free.at[slot])


def feed(walk: Walk, fill: Callable[[Any, Any, Any], None], *, rounds: int = 1) -> None:
    """`fill(step, round, tile)` for each tile listed, in each round.

    The number of a tile is read one step early: it takes as long to come as a tile.
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
    walk: Walk, fills: Sequence[tuple[Channel, Any]], head: tuple[Any, Any], size: int
) -> None:
    """What the warpgroup of memory does for the one tile of queries of a block.

    `fills`: channels with the arrays that they bring. `head`: batch entry and key head.
    """
    plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
    batch, key_head = head

    def fill(step, _, tile):
        for channel, ref in fills:
            channel.fill(step, ref.at[batch, pl.ds(tile * size, size), key_head])

    feed(walk, fill)
    for channel, _ in fills:
        channel.close()


def scalars(scalars_refs: Sequence[Any], batch: Any) -> list[Any]:
    """What masks are told of a batch entry, from one array of it or none."""
    return [ref[batch, i] for ref in scalars_refs for i in range(ref.shape[1])]


def swizzled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory as the matrix units read it."""
    transforms = (plgpu.TilingTransform((8, FEATURES)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def transposed(ref: Any) -> Any:
    return ref.transpose((1, 0))


def anew(index: Any) -> Any:
    """The same index, as one that the compiler does not know.

    It would keep the addresses of all parts of an operand in registers, across a loop.
    """
    return lax.optimization_barrier(index)


def product(left: Any, right: Any, columns: int) -> Any:
    """64 rows of `left`, in registers or shared memory, times `right`; float32."""

    def scope(total):
        plgpu.wgmma(total, left, right)
        return total[...]  # waits for it

    return pl.run_scoped(scope, plgpu.ACC((ROWS, columns), jnp.float32))


def by_columns(function: Callable[..., Any], tile: Any, width: int = 32) -> Any:
    """`function(columns, part)` of parts of a tile, one after the other.

    All at once, the numbers on the way would take more registers than there are.
    """
    found = []
    for first in range(0, tile.shape[1], width):
        part = lax.slice(tile, (0, first), (tile.shape[0], first + width))
        results = function(pl.ds(first, width), part)
        found.append(lax.optimization_barrier(results))
    return tuple(lax.concatenate(parts, 1) for parts in zip(*found, strict=True))


def at_once(function: Callable[..., Any], tile: Any) -> Any:
    """`function(columns, tile)` of the whole tile."""
    return function(pl.ds(0, tile.shape[1]), tile)


def zeros(columns: int) -> Any:
    """An accumulator of 64 rows."""
    zero = jnp.zeros((ROWS, columns), jnp.float32)
    return plgpu.layout_cast(zero, plgpu.Layout.WGMMA)


def staging(columns: int, dtype: Any, interpret: Any) -> Any:
    """What `operand` needs in the interpreter: shared memory for each warpgroup."""
    return swizzled((WARPGROUPS, ROWS, columns), dtype) if interpret else None


def per_column(slot: Any, columns: Any) -> Any:
    """One number per column of a tile of scores, in the registers that hold it."""
    return plgpu.load(slot.at[columns], layout=plgpu.Layout.WGMMA.reduce(0))


def operand(values: Any, staging: Any) -> Any:
    """A left operand of a product, in registers.

    The interpreter's matrix units read no registers: there it is put into `staging`.
    """
    if staging is None:
        return values
    staging[...] = values
    plgpu.commit_smem()
    return staging


def added(total: Any, left: Any, right: Any, staging: Any) -> Any:
    """The sum total + left @ right.

    In the interpreter, which has `staging`, it is added after the product: accumulators
    start at 0 there.
    """
    if staging is not None:
        return total + product(left, right, total.shape[1])
    accumulate = pl.run_state(lambda total: plgpu.wgmma(total, left, right))
    return accumulate(plgpu.ACC.init(total))


def store(total: Any, slot: Any, target: Any) -> None:
    """Through shared memory to `target`; the rows beyond its end are dropped."""
    slot[...] = total.astype(slot.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(slot, target)


def per_row(values: Any) -> Any:
    """One number per row of a tile, in the registers that hold the row."""
    return plgpu.layout_cast(values, plgpu.Layout.WGMMA.reduce(1))
