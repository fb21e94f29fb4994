"""The block mask of radial attention's public code, for models tuned with that code."""

from typing import Literal

import numpy as np

from softlib import _checks as checks

from ._blocks import require_at_least

# A constant of that code, whatever its block size.
_LEAST_RUN = 128


def radial_block_mask(
    frames: int,
    tokens_per_frame: int,
    *,
    block: int = 128,
    decay: float = 1.0,
    variant: Literal["wan", "hunyuan"] = "wan",
    text_tokens: int = 0,
) -> np.ndarray:
    r"""The block mask of radial attention's public code, bit for bit.

    It is neither a subset nor a superset of the paper's formula. For frames $d \ge 2$
    apart, pairs of places at most $\max(\text{decay} \cdot 2^{a - b}, \text{block})$
    apart count, with $a$ and $b$ the bit lengths of `tokens_per_frame` and $d$, if
    $\lfloor 128 / 2^{a - b} \rfloor$ divides $d$ or is below 2. A block is kept, as a
    whole, if more than a third of the rows count in more than 60 % of those columns
    that are not empty. Wrap it as a mask with `Blocks(array, block)`. For new models
    use {class}`softlib.masks.Radial`.

    Args:
        frames: Number of frames, at least 1.
        tokens_per_frame: Tokens per frame, at least 128.
        block: Size of a block, at least 1.
        decay: Factor of the widths, positive.
        variant: `"wan"` keeps the first frame for every query, `"hunyuan"` does not.
        text_tokens: Tokens after the video, which see and are seen by everything; so
            is a block that holds both video and text.

    Returns:
        NumPy booleans, shape `(n // block, n // block)` for `n` tokens of video and
        text: as in that code, a last block that is not full is absent.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is out of range.

    Cost: a few operations per block of a frame pair; 13 million for 128 frames of 3600
        tokens.

    Source: "Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long
        Video Generation", its public code.

    Example:
        >>> array = softlib.masks.radial_block_mask(41, 3600)
        >>> print(array.shape, round(array.mean(), 3))
        (1153, 1153) 0.26
    """
    name = "radial_block_mask"
    require_at_least(1, name, "frames", frames)
    # With fewer tokens the code drops even neighbouring frames.
    require_at_least(128, name, "tokens_per_frame", tokens_per_frame)
    require_at_least(1, name, "block", block)
    require_at_least(0, name, "text_tokens", text_tokens)
    checks.require_positive_number(name, "decay", decay)
    checks.require_one_of(name, "variant", variant, ("wan", "hunyuan"))

    video = frames * tokens_per_frame
    blocks = (video + text_tokens) // block
    # Two spare frames of blocks: the canvas of a frame pair may reach past the end.
    spare = -(-tokens_per_frame // block)
    kept = np.zeros((blocks + 2 * spare,) * 2, bool)
    for query_frame in range(frames):
        rows, first_row = _frame_blocks(query_frame, tokens_per_frame, block)
        for key_frame in range(frames):
            columns, first_column = _frame_blocks(key_frame, tokens_per_frame, block)
            sink = variant == "wan" and key_frame == 0
            distance = 0 if sink else abs(query_frame - key_frame)
            width = _half_width(distance, tokens_per_frame, block, decay)
            if width >= 0:
                kept[
                    first_row : first_row + spare, first_column : first_column + spare
                ] |= _is_dense(rows, columns, width, block)
    kept = kept[:blocks, :blocks]
    kept[video // block :] = True
    kept[:, video // block :] = True
    return kept


def _half_width(distance: int, tokens: int, block: int, decay: float) -> int:
    """Largest distance of places that count; -1 if the frame is dropped."""
    if distance <= 1:
        return tokens
    run = 2.0 ** (tokens.bit_length() - distance.bit_length())
    if run < _LEAST_RUN and distance % int(_LEAST_RUN / run):
        return -1
    return int(max(run * decay, block))


def _frame_blocks(frame: int, tokens: int, block: int) -> tuple[np.ndarray, int]:
    """Places [start, stop) in each block of a frame's canvas, and its first block.

    The canvas starts at the block in which the frame starts. It has as many blocks as
    a frame needs that starts at the start of a block, so the end may be cut off.
    """
    first, offset = divmod(frame * tokens, block)
    start = np.arange(-(-tokens // block)) * block - offset
    return np.stack([np.maximum(start, 0), np.minimum(start + block, tokens)]), first


def _is_dense(
    rows: np.ndarray, columns: np.ndarray, width: int, block: int
) -> np.ndarray:
    # In more than 60 % of the columns, more than a third of the rows.
    third = block // 3 + 1
    high = _columns_with(third, rows, columns, width)
    return 5 * high > 3 * _columns_with(1, rows, columns, width)


def _columns_with(
    least: int, rows: np.ndarray, columns: np.ndarray, width: int
) -> np.ndarray:
    """Number of columns l of each block with `least` or more rows |k - l| <= width.

    Column l has the rows max(start, l - width) to min(stop - 1, l + width). Those are
    at least `least` in one interval of l, as the width is at least a block or all
    places.
    """
    (row_start, row_stop), (start, stop) = rows[:, :, None], columns[:, None, :]
    first = np.maximum(start, row_start - width + least - 1)
    last = np.minimum(stop - 1, row_stop + width - least)
    found = np.maximum(last - first + 1, 0)
    return np.where(row_stop - row_start >= least, found, 0)
