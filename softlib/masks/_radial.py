"""Radial attention: fewer pairs attend as the distance between video frames grows."""

from typing import Any, Literal, NamedTuple

import jax

from softlib import _checks as checks

from ._blocks import divide, require_at_least
from ._mask import Mask
from ._radial_bands import (
    Bands,
    attends,
    attends_by_table,
    block_status,
    frame_segments,
    pair_count,
    row_count,
)


class Position(NamedTuple):
    """Frame of a query or a key, and its place in the frame."""

    frame: Any
    place: Any


class Radial(Mask):
    r"""Frames of a video attend in a band that halves as their distance doubles.

    Token $t = i s + k$ is place $k$ of frame $i$. For frames $d = |i - j|$ apart let
    $P = 2^{\lfloor \log_2 \max(d, 1) \rfloor}$.

    - `rule="paper"`: attends if $(|k - l| + 1) P \le s$; for $P > s$ if $k = l$ and
      $\lceil P / s \rceil$ divides $d$.
    - `rule="pow2"`, aware of the blocks of a kernel: with
      $L = 2^{\lfloor \log_2 s \rfloor} / P$ it attends if
      $|k - l| \le \max(\text{decay} \cdot L, \text{min\_window})$; where
      $L < \max(\text{min\_window}, 1)$ only if
      $\lceil \max(\text{min\_window}, 1) / L \rceil$ divides $d$. Neighbouring frames
      ($d \le 1$) attend as a whole.

    With both rules every query sees all tokens of the first `sink_frames` frames. Use
    `rule="pow2"` with `min_window` the block size of the kernel: bands of the paper
    become narrower than a block, yet each costs a whole block.

    The number of frames does not occur: positions past the video are further frames,
    negative positions are frames before the first and no sinks. Text behind `n` video
    tokens is `(Radial(s) & ~GlobalTokens(n)) | GlobalTokens(n)`.

    Args:
        tokens_per_frame: Static, at least 1: $s$.
        sink_frames: Static, at least 0: frames at the start that all queries see.
        decay: Static, positive: factor of the widths. 1 for `rule="paper"`.
        min_window: Static, at least 0: least half width of a band. 0 for
            `rule="paper"`.
        rule: Static: `"paper"` or `"pow2"`.

    Raises:
        TypeError: A number of tokens or frames is not a Python int, or `decay` not a
            number.
        ValueError: An option is out of range, or `rule="paper"` with another decay or
            window.

    Cost: frames and places are computed per position; a pair takes 9 to 16 integer
        operations. None is a division if `min_window` (for the paper's rule
        `tokens_per_frame`) is a power of two, or if the lengths are known, as in
        attention, and no frame is dropped. The status of a block is exact and has a
        closed form; row counts take one number per token. Traced positions must be
        below $2^{29}$.

    Source: "Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long
        Video Generation"; `rule="pow2"` follows the widths of its public code.

    Example:
        >>> mask = softlib.masks.Radial(4, sink_frames=0)
        >>> print(mask.materialize(1, 20).astype(int).reshape(5, 4))
        [[1 1 1 1]
         [1 1 1 1]
         [1 1 0 0]
         [1 1 0 0]
         [1 0 0 0]]
    """

    tokens_per_frame: int
    sink_frames: int = 1
    decay: float = 1.0
    min_window: int = 0
    rule: Literal["paper", "pow2"] = "paper"

    def __post_init__(self):
        options = (self.sink_frames, self.decay, self.min_window, self.rule)
        _check("Radial", self.tokens_per_frame, *options)

    def attends(self, query_index, key_index):
        query, key = self._split(query_index), self._split(key_index)
        frames = abs(query.frame - key.frame)
        places = abs(query.place - key.place)
        in_band = attends if isinstance(frames, jax.Array) else attends_by_table
        found = in_band(self._bands(), frames, places)
        if not self.sink_frames:
            return found
        return found | ((key.frame >= 0) & (key.frame < self.sink_frames))

    def _split(self, index: Any) -> Position:
        return Position(*divide(index, self.tokens_per_frame))

    def _bands(self) -> "Bands":
        s = self.tokens_per_frame
        if self.rule == "paper":
            return Bands(s, True, 0, s - 1, 1, s)
        power = 1 << (s.bit_length() - 1)
        narrowest = max(self.min_window, 1)
        widest = int(self.decay * power)
        return Bands(widest, False, self.min_window, s - 1, narrowest, power)

    def _within(self, query_length, key_length):
        frames = -(-max(query_length, key_length) // self.tokens_per_frame)
        # The divisor is 1 as long as narrowest * P <= power.
        bands = self._bands()
        octaves = max(frames - 1, 1).bit_length() - 1
        if bands.narrowest << octaves > bands.power:
            return self
        options = (self.sink_frames, self.decay, self.min_window, self.rule)
        return UndroppedRadial(self.tokens_per_frame, *options)

    def block_status(self, query_start, query_stop, key_start, key_stop):
        tokens, sinks = self.tokens_per_frame, self.sink_frames
        query = frame_segments(query_start, query_stop, tokens)
        key = frame_segments(key_start, key_stop, tokens)
        return block_status(self._bands(), query, key, sinks)

    def row_count(self, query_length, key_length: Any = None):
        tokens, sinks = self.tokens_per_frame, self.sink_frames
        return row_count(self._bands(), query_length, key_length, tokens, sinks)


class UndroppedRadial(Radial):
    """A `Radial` mask for distances at which no frame is dropped."""

    def _bands(self):
        return super()._bands()._replace(narrowest=0)


def radial_pair_count(
    frames: int,
    tokens_per_frame: int,
    *,
    sink_frames: int = 1,
    decay: float = 1.0,
    min_window: int = 0,
    rule: Literal["paper", "pow2"] = "paper",
) -> int:
    """Number of pairs that `Radial` keeps among whole frames, by a closed form.

    Divide it by `(frames * tokens_per_frame) ** 2` for the density of the mask.

    Args:
        frames: Number of frames, at least 0.
        tokens_per_frame: As in `Radial`; so are the options.
        sink_frames: Frames at the start that all queries see.
        decay: Factor of the widths.
        min_window: Least half width of a band.
        rule: `"paper"` or `"pow2"`.

    Returns:
        A Python int.

    Raises:
        TypeError: As `Radial`.
        ValueError: As `Radial`, or `frames` is negative.

    Cost: a few operations per frame.

    Source: "Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long
        Video Generation".

    Example:
        >>> kept = softlib.masks.radial_pair_count(128, 3600)
        >>> print(round(kept / (128 * 3600) ** 2, 3))
        0.158
    """
    function, options = "radial_pair_count", (sink_frames, decay, min_window, rule)
    require_at_least(0, function, "frames", frames)
    _check(function, tokens_per_frame, *options)
    mask = Radial(tokens_per_frame, sink_frames, decay, min_window, rule)
    return pair_count(mask._bands(), frames, tokens_per_frame, sink_frames)


def _check(
    function: str,
    tokens_per_frame: int,
    sink_frames: int,
    decay: float,
    min_window: int,
    rule: str,
) -> None:
    require_at_least(1, function, "tokens_per_frame", tokens_per_frame)
    require_at_least(0, function, "sink_frames", sink_frames)
    require_at_least(0, function, "min_window", min_window)
    checks.require_positive_number(function, "decay", decay)
    checks.require_one_of(function, "rule", rule, ("paper", "pow2"))
    if rule == "paper" and (decay != 1 or min_window != 0):
        raise ValueError(
            f'{function}: `decay` and `min_window` must be 1.0 and 0 for rule="paper", '
            f"got decay={decay}, min_window={min_window}; they belong to "
            'rule="pow2".'
        )
    for name, value in (
        ("tokens_per_frame", tokens_per_frame),
        ("min_window", min_window),
        ("decay * tokens_per_frame", decay * tokens_per_frame),
    ):
        if value >= 2**30:
            raise ValueError(f"{function}: `{name}` must be below 2**30, got {value}.")
