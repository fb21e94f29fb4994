"""The exchange of keys for attention over a sequence that is divided over devices.

It is planned on the host, from the mask alone. In step r device p works on the keys of
device p - r. Nothing moves between devices without a common block, and steps in which
nothing would be done are left out.
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from softlib import _checks as checks, masks
from softlib.attention._engine.plan import BlockPlan, Skeleton, plan_of
from softlib.masks import Block, Mask

type Layout = Literal["contiguous", "paired"]


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

    def plan(self, step: int, mask: Mask, axis_name: Any) -> BlockPlan:
        """The block plan of this device in a step; its axis index is traced."""
        device = lax.axis_index(axis_name)
        source = (device - self.steps[step].shift) % self.devices
        mine = lambda table: jnp.asarray(table)[device]
        return BlockPlan(
            self._placed(mask, device, source),
            mine(self.whole[step]),
            mine(self.partial[step]),
            self.lengths,
            self.blocks,
            mine(self.counts[step]),
        )

    def _placed(self, mask: Mask, device: Any, source: Any) -> Mask:
        query, key = (
            jnp.stack([chunk * size for chunk in _chunks(d, self.devices, self.layout)])
            for d, size in (
                (device, chunk_size(self.lengths[0], self.layout)),
                (source, chunk_size(self.lengths[1], self.layout)),
            )
        )
        return Placed(
            mask,
            query,
            key,
            chunk_size(self.lengths[0], self.layout),
            chunk_size(self.lengths[1], self.layout),
        )


class Placed(Mask):
    """A mask of local indices on devices that hold chunks of the sequence.

    Batch axes of the leaves of `mask` are left to `Mask.__call__`, which handles them
    with the leaves of this class.
    """

    mask: Mask = masks.mask_field()
    query_starts: Any = masks.array_field(axes=1)
    key_starts: Any = masks.array_field(axes=1)
    query_chunk: int
    key_chunk: int

    def attends(self, query_index: Any, key_index: Any) -> Any:
        return self.mask.attends(
            _position(query_index, self.query_starts, self.query_chunk),
            _position(key_index, self.key_starts, self.key_chunk),
        )


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


def _position(index: Any, starts: Any, chunk: int) -> Any:
    if starts.shape[0] == 1:
        return index + starts[0]
    return index + jnp.where(index < chunk, starts[0], starts[1] - chunk)


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
    query, key = (
        _segments(device, length, size, devices, layout)
        for device, length, size in zip(pair, lengths, sizes, strict=True)
    )
    some = every = None
    for query_start, query_stop in query:
        for key_start, key_stop in key:
            real = (query_stop > query_start)[:, None] & (key_stop > key_start)
            # An empty range has no status: one token is asked for, and ignored.
            status = mask.block_status(
                query_start[:, None],
                np.maximum(query_stop, query_start + 1)[:, None],
                key_start,
                np.maximum(key_stop, key_start + 1),
            )
            any_here = real & (status != Block.NONE)
            all_here = ~real | (status == Block.ALL)
            some = any_here if some is None else some | any_here
            every = all_here if every is None else every & all_here
    assert some is not None
    assert every is not None
    if lengths[1] % sizes[1]:
        every[:, -1:] = False  # the last keys are padding
    lists = (some & every, some & ~every)
    whole, partial = (np.stack(np.nonzero(x)).astype(np.int32) for x in lists)
    return whole, partial


def _segments(
    device: int, length: int, size: int, devices: int, layout: Layout
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(start, stop) of each block's positions in each chunk of a device, or empty."""
    chunk = chunk_size(length, layout)
    start = np.arange(0, length, size)
    stop = np.minimum(start + size, length)
    found = []
    for i, index in enumerate(_chunks(device, devices, layout)):
        low, high = i * chunk, (i + 1) * chunk
        offset = index * chunk - low
        first = np.clip(start, low, high) + offset
        found.append((first, np.clip(stop, low, high) + offset))
    return found


def _stacked(lists: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Pads lists to (devices, 2, longest), with the number of entries of each."""
    counts = np.array([x.shape[1] for x in lists], np.int32)
    table = np.zeros((len(lists), 2, counts.max()), np.int32)
    for row, entries in zip(table, lists, strict=True):
        row[:, : entries.shape[1]] = entries
    return table, counts
