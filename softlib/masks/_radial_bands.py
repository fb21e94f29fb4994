"""The bands of radial attention: the pairs in them, and closed forms of their number.

Query (frame i, place k) and key (frame j, place l) are d = |i - j| frames apart. With
r = floor(log2 max(d, 1)) and P = 2^r a pair attends if

    |k - l| <= width(r)   and   d is a multiple of divisor(r).

"paper":  width = max(floor(s / P) - 1, 0)       divisor = ceil(P / s)
"pow2":   width = max(floor(decay S / P), min_window)
          divisor = ceil(max(min_window, 1) P / S)          S = 2^floor(log2 s)

The inequality of the paper, (|k - l| + 1) P <= s, is the first width; its other case,
P > s, is width 0 and the divisor. Both widths are a shift: floor(x / 2^r) = x >> r.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ._blocks import Block


class Bands(NamedTuple):
    """Parameters of a band: width(r) = max((widest >> r) - strict, least).

    At r = 0 the width is `whole`. The divisor is max(ceil(narrowest P / power), 1), and
    1 at r = 0. If `narrowest` is 0, no frame is dropped.
    """

    widest: int
    strict: bool
    least: int
    whole: int
    narrowest: int
    power: int


def attends(bands: Bands, frames: Any, places: Any) -> Any:
    """True where frames and places at these distances attend; for traced distances."""
    # Leading zeros of int32 give the octave: r + 1 = 32 - zeros is the length of d in
    # bits, and 2 x >> r + 1 is x >> r. At d = 0 it is 2 x, which holds all places.
    frames, places = frames.astype(jnp.int32), places.astype(jnp.int32)
    zeros = jax.lax.clz(frames)
    bits = 32 - zeros
    width = jnp.right_shift(2 * bands.widest, bits)
    if bands.least:
        width = jnp.maximum(width, bands.least)
    # `strict` turns |k - l| <= width - 1 into |k - l| < width; a width of 0 - 1, which
    # the paper has only where it drops frames, is 0.
    if bands.strict and bands.narrowest:
        width = jnp.maximum(width, 1)
    found = places < width if bands.strict else places <= width
    if bands.narrowest:
        found &= _is_kept(bands, frames, zeros, bits)
    neighbours_kept = bands.narrowest <= bands.power
    if neighbours_kept and bands.widest - bands.strict >= bands.whole:
        return found  # which is right for neighbouring frames, too
    return found | (frames <= 1)


def _is_kept(bands: Bands, frames: Any, zeros: Any, bits: Any) -> Any:
    """Whether the divisor of its octave divides the distance."""
    narrowest, power = bands.narrowest, bands.power
    if narrowest >= 2 * power:
        return frames <= 1  # the divisor is 2 P or more, above any distance
    if _is_power_of_two(narrowest) and _is_power_of_two(power):
        # The divisor is a power of two or 1. 2^31 - 1 shifted by the leading zeros is
        # P - 1; shifted by log2(power / narrowest) more it is the divisor - 1. At d = 0
        # the shift by 32 may give any number: all of them divide 0.
        low = (2**31 - 1) >> (power.bit_length() - narrowest.bit_length())
        return (frames & jnp.right_shift(low, zeros)) == 0
    # Numerator and denominator are doubled: only `bits` = r + 1 is known, not r.
    above = jnp.left_shift(narrowest, bits) + (2 * power - 1)
    if _is_power_of_two(power):
        divisor = jnp.right_shift(above, power.bit_length())
    else:
        divisor = jax.lax.div(above, jnp.full_like(above, 2 * power))
    return jax.lax.rem(frames, divisor) == 0


def _is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0


def attends_by_table(bands: Bands, frames: Any, places: Any) -> Any:
    """`attends` on NumPy arrays, where one look-up replaces the arithmetic."""
    return places <= _widths_for(bands, frames).dropping[frames]


class Widths(NamedTuple):
    """Tables indexed by the distance of frames.

    Attributes:
        dropping: Half width; -1 where the frame is dropped.
        keeping: Half width as if no frame were dropped; it never increases.
        kept_below: Number of kept distances below this one.
    """

    dropping: np.ndarray
    keeping: np.ndarray
    kept_below: np.ndarray


def widths(bands: Bands, count: int) -> Widths:
    """Tables for distances below `count` or more."""
    # The length is rounded to a power of two, so that a mask has few tables.
    return _widths(bands, 1 << max(count - 1, 1).bit_length())


def _widths_for(bands: Bands, frames: Any) -> Widths:
    return widths(bands, int(np.max(frames, initial=0)) + 1)


@functools.lru_cache(maxsize=32)
def _widths(bands: Bands, count: int) -> Widths:
    distance = np.arange(count)
    octave = np.frexp(np.maximum(distance, 1))[1].astype(np.int64) - 1
    keeping = np.maximum((bands.widest >> octave) - bands.strict, bands.least)
    keeping = np.where(distance <= 1, bands.whole, np.minimum(keeping, bands.whole))
    divisor = np.maximum(-(-(bands.narrowest << octave) // bands.power), 1)
    kept = (distance <= 1) | (distance % divisor == 0)
    dropping = np.where(kept, keeping, -1)
    kept_below = np.concatenate([[0], np.cumsum(kept)])
    # int32 halves the memory traffic of a map of millions of blocks.
    tables = Widths(*(t.astype(np.int32) for t in (dropping, keeping, kept_below)))
    for table in tables:
        table.flags.writeable = False
    return tables


class Segment(NamedTuple):
    """Places `first` to `last` of the frames `low` to `high`, all ends included.

    Several frames are always whole frames. The segment is empty if `low > high`.
    """

    low: Any
    high: Any
    first: Any
    last: Any


class Segments(NamedTuple):
    """A range of positions, cut at the borders of frames.

    Attributes:
        ends: Segments in the first and in the last frame of the range; only one if no
            range has a second frame.
        whole: The frames between; None if no range has any.
    """

    ends: tuple[Segment, ...]
    whole: Segment | None


def frame_segments(start: Any, stop: Any, tokens: int) -> Segments:
    low, high = start // tokens, (stop - 1) // tokens
    head = Segment(low, low, start - low * tokens, None)
    head = head._replace(last=np.minimum(stop - 1 - low * tokens, tokens - 1))
    ends = (head,)
    if (low != high).any():
        # A range of one frame gets the same segment twice, which changes nothing.
        first = np.maximum(start - high * tokens, 0)
        ends = (head, Segment(high, high, first, stop - 1 - high * tokens))
    whole = None
    if (high - low > 1).any():
        whole = Segment(low + 1, high - 1, 0, tokens - 1)
    return Segments(ends, whole)


def block_status(
    bands: Bands, query: Segments, key: Segments, sink_frames: int
) -> np.ndarray:
    """Exact status of blocks, by a closed form for each pair of their segments."""
    some, every = np.zeros((), bool), np.ones((), bool)
    for segment in query.ends:
        for other in key.ends:
            found, whole = _end_status(bands, segment, other, sink_frames)
            some, every = some | found, every & whole
    for segment, other in _pairs_with_whole_frames(query, key):
        found, whole = _whole_status(bands, segment, other, sink_frames)
        some, every = some | found, every & whole
    return Block.of(some=some, every=every)


def _end_status(
    bands: Bands, query: Segment, key: Segment, sink_frames: int
) -> tuple[Any, Any]:
    """Whether some, and whether every pair of two segments of one frame attends."""
    frames = np.abs(query.low - key.low)
    width = _widths_for(bands, frames).dropping[frames]
    if sink_frames:
        is_sink = (key.low >= 0) & (key.low < sink_frames)
        width = np.maximum(
            width, np.where(is_sink, np.int32(bands.whole), np.int32(-1))
        )
    below, above = key.first - query.last, query.first - key.last
    # The nearest places are max(0, below, above) apart, the farthest minus their min.
    some = np.maximum(np.maximum(below, above), 0) <= width
    return some, -np.minimum(above, below) <= width


def _pairs_with_whole_frames(
    query: Segments, key: Segments
) -> Iterator[tuple[Segment, Segment]]:
    for other in (*key.ends, key.whole):
        if query.whole is not None and other is not None:
            yield query.whole, other
    for segment in query.ends:
        if key.whole is not None:
            yield segment, key.whole


def _whole_status(
    bands: Bands, query: Segment, key: Segment, sink_frames: int
) -> tuple[Any, Any]:
    """Whether some and every pair attends, one segment being whole frames or empty."""
    exists = (query.low <= query.high) & (key.low <= key.high)
    meets_sink = np.maximum(key.low, 0) <= np.minimum(key.high, sink_frames - 1)
    some, every = exists & meets_sink, np.ones((), bool)
    # Frames before and after the sinks. Only negative positions lie before.
    for low, high in (
        (key.low, np.minimum(key.high, -1)),
        (np.clip(sink_frames, key.low, key.high + 1), key.high),
    ):
        run = Segment(low, high, key.first, key.last)
        run_exists = exists & (low <= high)
        found, whole = _run_status(bands, query, run)
        some, every = some | (run_exists & found), every & (whole | ~run_exists)
    return some, every


def _run_status(bands: Bands, query: Segment, key: Segment) -> tuple[Any, Any]:
    """Whether some and every pair attends, without sinks; one segment is whole frames.

    All distances of frames from the nearest to the farthest then occur.
    """
    below, above = key.low - query.high, query.low - key.high
    nearest = np.maximum(np.maximum(below, above), 0)
    farthest = np.maximum(-np.minimum(below, above), nearest)
    table = _widths_for(bands, farthest)
    kept = table.kept_below[farthest + 1] - table.kept_below[nearest]
    places = np.maximum(key.last - query.first, query.last - key.first)
    every = (kept == farthest - nearest + 1) & (places <= table.keeping[farthest])
    return kept > 0, every


def row_count(
    bands: Bands, query_length: int, key_length: int, tokens: int, sink_frames: int
) -> np.ndarray:
    """Number of keys per query: for each place a sum over the distances of frames."""
    query_frames, key_frames = -(-query_length // tokens), key_length // tokens
    if query_length == 0:
        return np.zeros(0, np.int32)
    width = widths(bands, max(query_frames, key_frames) + 1).dropping[:, None]
    place, frame = np.arange(tokens)[None, :], np.arange(query_frames)
    distances = max(query_frames, key_frames + 1)
    # of_frame[d, k]: keys that place k sees in a whole frame at distance d.
    width = width[:distances].astype(np.int64)
    of_frame = _in_band(place, width, tokens)
    below = np.concatenate([np.zeros_like(of_frame[:1]), np.cumsum(of_frame, axis=0)])
    # Distances of query frame i to the key frames: 0..i down, 1..key_frames-1-i up.
    down = below[frame + 1] - below[np.maximum(frame + 1 - key_frames, 0)]
    up = below[np.maximum(key_frames - frame, 1)] - below[1]
    count = down + up
    for sink in range(min(sink_frames, key_frames)):
        count += tokens - of_frame[abs(frame - sink)]
    rest = key_length - key_frames * tokens
    if rest and key_frames < sink_frames:
        count += rest
    elif rest:
        count += _in_band(place, width[abs(frame - key_frames)], rest)
    return count.reshape(-1)[:query_length].astype(np.int32)


def _in_band(place: Any, width: Any, stop: int) -> np.ndarray:
    """Number of places in [0, stop) at most `width` from a place."""
    last = np.minimum(place + width, stop - 1)
    return np.maximum(last - np.maximum(place - width, 0) + 1, 0)


def pair_count(bands: Bands, frames: int, tokens: int, sink_frames: int) -> int:
    distance = np.arange(frames)
    width = widths(bands, frames).dropping[:frames].astype(np.int64)
    # A frame pair of half width h keeps s (2 h + 1) - h (h + 1) of its s^2 pairs.
    pairs = tokens * (2 * width + 1) - width * (width + 1)
    pairs = np.where(width < 0, 0, pairs)
    count = int(((2 - (distance == 0)) * (frames - distance) * pairs).sum())
    for sink in range(min(sink_frames, frames)):
        count += int((tokens**2 - pairs[abs(distance - sink)]).sum())
    return count
