"""Arrays that attention kernels for Hopper read besides queries, keys and values.

A boolean array and a bias over pairs, and numbers per query or per key for the mask.
Each is read in its own shape, without the axes that it shares: a matrix, a row or a
number for each tile of scores. Matrices and rows are copied into a ring of their own in
shared memory, a slot per step.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._attention_extras import Extras, Role

from . import attention_ring as ring
from .attention_ring import Channel, Walk
from .attention_scores import Excluding, Form, across
from .attention_tiles import PAIR_COLUMNS, ROWS, TILE, WARPGROUPS


def operands_of(extras: Extras) -> list[jax.Array]:
    """The arrays of a kernel's call, without the axes that all pairs share.

    Where arrays over pairs vary over both, queries are a multiple of 8 and keys of
    `PAIR_COLUMNS`, `dense` is int8, and `bias` bfloat16, float16 or float32. Otherwise
    lengths are multiples of 8, `dense` is int32 and `bias` float32.
    """
    return [
        x.reshape(*x.shape[:2], *(size for size in x.shape[2:] if size > 1))
        for _, _, x in extras.given
    ]


def parts_of(extras: Extras) -> tuple["Part", ...]:
    """Parts of the arrays that are read for each tile of scores."""
    found: list[Part] = []
    for array, (role, over, x) in enumerate(extras.given):
        rows = range(x.shape[1]) if role == "mask" else (None,)
        found += [Part(role, array, over, x.dtype, row) for row in rows]
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class Part:
    """A matrix, a row or a number of each tile.

    Attributes:
        role: What it is for.
        array: Index of the array among the operands.
        over: Whether it varies over queries, and over keys.
        dtype: Of the array.
        row: Index on the second axis of the array; None for that of the head.
    """

    role: Role
    array: int
    over: tuple[bool, bool]
    dtype: Any
    row: int | None = None


@dataclasses.dataclass(frozen=True)
class Layout:
    """The parts in the shared memory of a kernel.

    A block of threads has 128 positions of its own on one axis, 64 per warpgroup, and
    visits tiles of the other one.

    Attributes:
        parts: Of the extras.
        size: Positions of a visited tile.
        stages: Slots of the ring.
        is_transposed: Whether keys are the block's own, so that scores are keys by
            queries.
    """

    parts: tuple[Part, ...]
    size: int
    stages: int
    is_transposed: bool = False

    def split(self, refs: Sequence[Any]) -> tuple[Sequence[Any], list[Any]]:
        """The arrays of extras, which are the first of `refs`, and the others."""
        count = len({part.array for part in self.parts})
        return refs[:count], list(refs[count:])

    def scratch(self) -> dict[str, Any]:
        """The ring and its barriers; None if nothing is copied."""
        copies = sum(map(self._copies, self.parts))
        if not copies:
            return dict.fromkeys(("extras", "extras_ready", "extras_free"))
        barrier = lambda arrivals: plgpu.Barrier(
            num_arrivals=arrivals, num_barriers=self.stages
        )
        return {
            "extras": tuple(map(self._slots, self.copied)),
            "extras_ready": barrier(copies),
            "extras_free": barrier(WARPGROUPS),
        }

    @property
    def copied(self) -> list[Part]:
        """The parts that have slots; numbers are read from the array."""
        return [part for part in self.parts if any(part.over)]

    def varies(self, part: Part) -> tuple[bool, bool]:
        """Whether a part varies over the block's own positions, and over visited."""
        return part.over[::-1] if self.is_transposed else part.over

    def _copies(self, part: Part) -> int:
        """Number of copies into a slot: one per warpgroup, or one for both."""
        own, visited = self.varies(part)
        return WARPGROUPS if own else int(visited)

    def _slots(self, part: Part) -> Any:
        own, visited = self.varies(part)
        if not own:
            return plgpu.SMEM((self.stages, self.size), part.dtype)
        if not visited:
            return plgpu.SMEM((self.stages, WARPGROUPS, ROWS), part.dtype)
        block = (self.size, ROWS) if self.is_transposed else (ROWS, self.size)
        row = PAIR_COLUMNS * jnp.dtype(part.dtype).itemsize
        transforms = (
            plgpu.TilingTransform((8, PAIR_COLUMNS)),
            plgpu.SwizzleTransform(row),
        )
        shape = (self.stages, WARPGROUPS, *block)
        return plgpu.SMEM(shape, part.dtype, transforms=transforms)


@dataclasses.dataclass(frozen=True)
class Reader:
    """Fills and reads the ring inside of a kernel; without parts it does nothing.

    Attributes:
        layout: What is static.
        refs: The arrays in global memory.
        channel: The ring; None if nothing is copied.
        batch: Entry of the batch.
    """

    layout: Layout
    refs: Sequence[Any]
    channel: Channel | None
    batch: Any

    @classmethod
    def of(
        cls, layout: Layout, refs: Any, batch: Any, slots: Any, barriers: dict[str, Any]
    ) -> "Reader":
        """Makes one of the arguments of a kernel, `scratch` among them."""
        if slots is None:
            return cls(layout, refs, None, batch)
        ready, free = barriers["extras_ready"], barriers["extras_free"]
        return cls(layout, refs, Channel(slots, ready, free), batch)

    def open(self) -> None:
        if self.channel is not None:
            self.channel.open()

    def close(self) -> None:
        if self.channel is not None:
            self.channel.close()

    def fill(self, step: Any, walk: Walk, visited: Any, head: Any) -> None:
        """Copies what a step needs of the block's tile and the visited one."""
        if self.channel is None:
            return
        slots, ready = self.channel.vacated(step)
        size = self.layout.size
        visited = pl.ds(visited * size, size)
        for part, slot in zip(self.layout.copied, slots, strict=True):
            array = self.array(part, head)
            varies = self.layout.varies(part)
            if not varies[0]:
                plgpu.copy_gmem_to_smem(array.at[visited], slot, ready)
                continue
            for warpgroup in range(WARPGROUPS):
                mine = pl.ds(walk.tile * TILE + warpgroup * ROWS, ROWS)
                at = (mine, visited) if varies[1] else (mine,)
                at = at[::-1] if self.layout.is_transposed else at
                plgpu.copy_gmem_to_smem(array.at[at], slot.at[warpgroup], ready)

    def wait(self, step: Any, warpgroup: Any, head: Any) -> "Tile":
        """Waits for the slots of a step."""
        slots = [] if self.channel is None else self.channel.wait(step)
        return Tile(self, slots, warpgroup, head)

    def release(self, step: Any) -> None:
        """Frees the slots of a step, of which all warps have to be done with loads."""
        if self.channel is not None:
            plgpu.commit_smem()
            self.channel.release(step)

    def array(self, part: Part, head: Any) -> Any:
        """The slice of an array for a head of the batch entry."""
        array = self.refs[part.array]
        batch = self.batch if array.shape[0] > 1 else 0
        row = part.row
        if row is None:
            row = head if array.shape[1] > 1 else 0
        return array.at[batch, row]


class Scores(NamedTuple):
    """Scores of a tile.

    Attributes:
        bits: Z, -inf where a pair is excluded.
        capped: Those before a bias was added; None without.
    """

    bits: Any
    capped: Any


@dataclasses.dataclass(frozen=True)
class Tile:
    """The extras of one step, for one warpgroup.

    Attributes:
        reader: That waited for them.
        slots: One for each part that is copied.
        warpgroup: Its index.
        head: Query head.
    """

    reader: Reader
    slots: Sequence[Any]
    warpgroup: Any
    head: Any

    def scores(
        self,
        form: Form,
        columns: Any,
        raw: Any,
        given: Callable[[], Excluding] | None,
    ) -> Scores:
        """Scores of some columns, from their products.

        `given` returns what the mask takes; None where it holds for all pairs.
        """
        read: Callable[[Role], list[Any]] = lambda role: self._read(
            role, columns, raw.shape
        )
        capped = bits = form.bits(raw)
        for bias in read("bias"):
            bits = bits + bias.astype(jnp.float32) * form.unit
        attends = [dense != 0 for dense in read("dense")]
        if given is not None:
            numbers = [] if form.mask is None else read("mask")
            attends += form.attends(bits.shape, given(), numbers)
        if attends:
            ok = functools.reduce(operator.and_, attends)
            bits = jnp.where(ok, bits, -jnp.inf)
        has_bias = any(part.role == "bias" for part in self.reader.layout.parts)
        return Scores(bits, capped if has_bias else None)

    def _read(self, role: Role, columns: Any, shape: tuple[int, int]) -> list[Any]:
        """The parts of a role, broadcast to the shape of the columns."""
        slots = iter(self.slots)
        found = []
        for part in self.reader.layout.parts:
            slot = next(slots) if any(part.over) else None
            if part.role == role:
                found.append(self._part(part, slot, columns, shape))
        return found

    def _part(self, part: Part, slot: Any, columns: Any, shape: tuple[int, int]) -> Any:
        layout = self.reader.layout
        own, visited = layout.varies(part)
        if slot is None:
            number = self.reader.array(part, self.head)[...]
            return lax.broadcast_in_dim(number, shape, ())
        if not own:
            return across(ring.per_column(slot, columns), shape, 1)
        slot = slot.at[self.warpgroup]
        if not visited:
            return across(plgpu.load(slot, layout=plgpu.Layout.WGMMA.reduce(1)), shape)
        if not layout.is_transposed:
            slot = slot.at[:, columns]
            return plgpu.load(slot, layout=plgpu.Layout.WGMMA, optimized=False)
        slot = ring.transposed(slot.at[columns])
        tile = plgpu.load(slot, layout=plgpu.Layout.WGMMA_TRANSPOSED, optimized=False)
        if tile.dtype == jnp.int8:  # threads exchange no bytes
            tile = tile.astype(jnp.int16)
        return plgpu.layout_cast(tile, plgpu.Layout.WGMMA)
