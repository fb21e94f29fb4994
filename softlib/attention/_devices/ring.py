"""The exchange of keys for attention over a sequence that is divided over devices.

It is planned on the host, from the mask alone. In step r device p works on the keys of
device p - r. Nothing moves between devices without a common block, and steps in which
nothing would be done are left out.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from softlib import _checks as checks, masks
from softlib.attention._engine.plan import BlockPlan, Skeleton, plan_of
from softlib.masks import Block, Mask

type Layout = Literal["contiguous", "paired"]
# Positions of the chunks of queries and of keys that a device works on.
type Placement = tuple[tuple[int, ...], tuple[int, ...]]


class Step(NamedTuple):
    """One exchange of keys and the work on them.

    Attributes:
        shift: Device p works on the keys of device `p - shift`.
        moves: (from, to) of the keys that move; empty for a device's own.
        relay: Whether keys come from the neighbour that used them in the step before,
            instead of from their owner.
    """

    shift: int
    moves: tuple[tuple[int, int], ...]
    relay: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Ring:
    """The steps and, per step and device, the blocks to visit.

    Block lists are those for a CPU, of each device its own. Elsewhere blocks are chosen
    by the mask of the step, for all devices that work in it.

    It is compared and hashed by identity, since it comes from a cache.
    """

    steps: tuple[Step, ...]
    whole: tuple[np.ndarray, ...]  # per step (devices, 2, longest)
    partial: tuple[np.ndarray, ...]
    counts: tuple[np.ndarray, ...]  # per step (devices, 2)
    lengths: tuple[int, int]  # queries and keys per device
    blocks: tuple[int, int]
    layout: Layout
    devices: int

    def works(self, step: int) -> np.ndarray:
        """Whether each device has anything to do in a step; in the first all have."""
        if self.steps[step].shift == 0:
            return np.ones(self.devices, bool)
        return self.counts[step].sum(axis=1) > 0

    def plan(self, step: int, mask: Mask, axis_name: Any) -> BlockPlan:
        """The block plan of this device in a step; its axis index is traced."""
        device = lax.axis_index(axis_name)
        source = (device - self.steps[step].shift) % self.devices
        mine = lambda table: jnp.asarray(table)[device]
        return BlockPlan(
            self.placed(step, mask, device, source),
            mine(self.whole[step]),
            mine(self.partial[step]),
            self.lengths,
            self.blocks,
            mine(self.counts[step]),
        )

    def placed(self, step: int, mask: Mask, device: Any, source: Any) -> "Placed":
        """The mask of a step on the indices of a device and of the keys it has."""
        shift = self.steps[step].shift
        pairs = tuple(
            (d, (d - shift) % self.devices)
            for d in np.flatnonzero(self.works(step)).tolist()
        )
        chunks = [chunk_size(length, self.layout) for length in self.lengths]
        query, key = (
            [chunk * size for chunk in _chunks(of, self.devices, self.layout)]
            for of, size in zip((device, source), chunks, strict=True)
        )
        where = _placements(pairs, self.lengths, self.devices, self.layout)
        second = lambda starts: starts[1] if len(starts) > 1 else None
        return Placed(
            mask,
            query[0],
            key[0],
            chunks[0],
            chunks[1],
            where,
            second(query),
            second(key),
        )


class Placed(Mask):
    """A mask of local indices on devices that hold chunks of the sequence.

    Which device this is, is data. So a block is ALL or NONE if it is so on each of the
    devices that work. Batch axes of the leaves of `mask` are left to `Mask.__call__`,
    which handles them with the leaves of this class.

    Attributes:
        mask: On positions in the whole sequence.
        query_start: Position of the first chunk of queries of this device.
        key_start: The same of the keys on which it works.
        query_chunk: Static number of queries of a chunk.
        key_chunk: The same of keys.
        placements: Of each device that works, positions of its chunks of queries and
            of keys; static.
        query_second: Position of the second chunk, in the layout that has two.
        key_second: Likewise.
    """

    mask: Mask = masks.mask_field()
    query_start: Any = masks.array_field(axes=0)
    key_start: Any = masks.array_field(axes=0)
    query_chunk: int
    key_chunk: int
    placements: tuple[Placement, ...]
    query_second: Any = masks.array_field(axes=0, default=None)
    key_second: Any = masks.array_field(axes=0, default=None)

    def attends(self, query_index: Any, key_index: Any) -> Any:
        query = (query_index, self.query_start, self.query_second, self.query_chunk)
        key = (key_index, self.key_start, self.key_second, self.key_chunk)
        return self.mask.attends(_position(*query), _position(*key))

    def block_status(
        self, query_start: Any, query_stop: Any, key_start: Any, key_stop: Any
    ) -> Any:
        some, every = np.False_, np.True_
        for queries, keys in self.placements:
            for query in _parts(query_start, query_stop, queries, self.query_chunk):
                for key in _parts(key_start, key_stop, keys, self.key_chunk):
                    real = (query[1] > query[0]) & (key[1] > key[0])
                    # An empty range has no status: one token is asked for, and ignored.
                    status = self.mask.block_status(
                        query[0],
                        np.maximum(query[1], query[0] + 1),
                        key[0],
                        np.maximum(key[1], key[0] + 1),
                    )
                    some = some | (real & (status != Block.NONE))
                    every = every & (~real | (status == Block.ALL))
        return np.where(some, np.where(every, Block.ALL, Block.SOME), Block.NONE)


def sequence_order(
    length: int, shards: int, *, layout: Layout = "paired"
) -> np.ndarray:
    """The order of a sequence in which its shards cost attention about the same.

    Under a mask of limited distance the ends of a sequence have fewer neighbours than
    its middle. In the layout `paired` the sequence is cut into `2 * shards` chunks and
    device p gets the chunks p and `p + shards`. Give each device its slice of
    `x[:, order]`; `order` also holds the positions of the tokens, for their embedding.

    Args:
        length: Static; a multiple of `2 * shards`.
        shards: Static number of devices on the axis.
        layout: Static; `contiguous` leaves the order as it is.

    Returns:
        Positions, int64, NumPy. `np.argsort` of it undoes it.

    Raises:
        TypeError: A number is no int.
        ValueError: The length cannot be divided.

    Source: "Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long
        Video Generation" for the mask; the layout was found by counting its blocks,
        where the zigzag order of causal masks does not help.

    Example:
        >>> print(softlib.attention.sequence_order(8, 2))
        [0 1 4 5 2 3 6 7]
    """
    checks.require_positive_integer("sequence_order", "length", length)
    checks.require_positive_integer("sequence_order", "shards", shards)
    checks.require_one_of("sequence_order", "layout", layout, ("contiguous", "paired"))
    chunks = shards * (2 if layout == "paired" else 1)
    if length % chunks:
        raise ValueError(
            f"sequence_order: `length` must be a multiple of {chunks} for {shards} "
            f"shards in the layout {layout!r}, got {length}."
        )
    size = length // chunks
    starts = [c * size for d in range(shards) for c in _chunks(d, shards, layout)]
    return np.concatenate([np.arange(start, start + size) for start in starts])


def ring_of(
    mask: Mask,
    lengths: tuple[int, int],
    devices: int,
    layout: Layout,
    blocks: tuple[int | None, int | None],
    groups: int,
) -> Ring:
    """The cached ring of a mask; `lengths` are those of one device."""
    return _ring(Skeleton.of(mask), lengths, devices, layout, blocks, groups)


def chunk_size(length: int, layout: Layout) -> int:
    return length // 2 if layout == "paired" else length


def _chunks(device: Any, devices: int, layout: Layout) -> tuple[Any, ...]:
    return (device, device + devices) if layout == "paired" else (device,)


def _position(index: Any, first: Any, second: Any, chunk: int) -> Any:
    if second is None:
        return index + first
    return index + jnp.where(index < chunk, first, second - chunk)


def _parts(
    start: Any, stop: Any, positions: tuple[int, ...], chunk: int
) -> Iterator[tuple[Any, Any]]:
    """(start, stop) in the sequence of what ranges have of each chunk, or empty."""
    for i, position in enumerate(positions):
        low, high = i * chunk, (i + 1) * chunk
        offset = position - low
        yield np.clip(start, low, high) + offset, np.clip(stop, low, high) + offset


def _placements(
    pairs: tuple[tuple[int, int], ...],
    lengths: tuple[int, int],
    devices: int,
    layout: Layout,
) -> tuple[Placement, ...]:
    """Positions of the chunks of pairs of devices, with the queries and the keys."""

    def starts(device: int, length: int) -> tuple[int, ...]:
        size = chunk_size(length, layout)
        return tuple(chunk * size for chunk in _chunks(device, devices, layout))

    return tuple((starts(q, lengths[0]), starts(k, lengths[1])) for q, k in pairs)


@functools.lru_cache(maxsize=32)
def _ring(
    skeleton: Skeleton,
    lengths: tuple[int, int],
    devices: int,
    layout: Layout,
    blocks: tuple[int | None, int | None],
    groups: int,
) -> Ring:
    mask = skeleton.mask
    whole_sequence = (lengths[0] * devices, lengths[1] * devices)
    sizes = plan_of(mask, whole_sequence, blocks, groups=groups).blocks
    within = [
        min(n, chunk_size(m, layout)) for n, m in zip(sizes, lengths, strict=True)
    ]
    sizes = (blocks[0] or within[0], blocks[1] or within[1])
    steps, tables = [], []
    used: set[tuple[int, int]] = set()  # (device, source) of the step before
    for shift in range(devices):
        pairs = [(device, (device - shift) % devices) for device in range(devices)]
        found = [_blocks(mask, pair, lengths, sizes, devices, layout) for pair in pairs]
        needed = {
            pair
            for pair, (whole, partial) in zip(pairs, found, strict=True)
            if whole.shape[1] + partial.shape[1]
        }
        if shift and not needed:
            used = set()
            continue
        relay = shift > 1 and all(((d - 1) % devices, s) in used for d, s in needed)
        moves = ()
        if shift:
            moves = tuple(
                sorted(((d - 1) % devices if relay else s, d) for d, s in needed)
            )
        steps.append(Step(shift, moves, relay))
        tables.append(tuple(_stacked([lists[i] for lists in found]) for i in (0, 1)))
        used = needed
    return Ring(
        tuple(steps),
        tuple(whole for (whole, _), _ in tables),
        tuple(partial for _, (partial, _) in tables),
        tuple(np.stack([a, b], axis=1) for (_, a), (_, b) in tables),
        lengths,
        sizes,
        layout,
        devices,
    )


def _blocks(
    mask: Mask,
    pair: tuple[int, int],
    lengths: tuple[int, int],
    sizes: tuple[int, int],
    devices: int,
    layout: Layout,
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the whole and the partial blocks of a pair of devices."""
    query, key = (chunk_size(length, layout) for length in lengths)
    where = _placements((pair,), lengths, devices, layout)
    placed = Placed(mask, 0, 0, query, key, where)
    kinds = masks.block_map(placed, lengths, sizes)
    some, every = kinds != Block.NONE, kinds == Block.ALL
    if lengths[1] % sizes[1]:
        every[:, -1:] = False  # the last keys are padding
    lists = (some & every, some & ~every)
    whole, partial = (np.stack(np.nonzero(x)).astype(np.int32) for x in lists)
    return whole, partial


def _stacked(lists: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Pads lists to (devices, 2, longest), with the number of entries of each."""
    counts = np.array([x.shape[1] for x in lists], np.int32)
    table = np.zeros((len(lists), 2, counts.max()), np.int32)
    for row, entries in zip(table, lists, strict=True):
        row[:, : entries.shape[1]] = entries
    return table, counts
