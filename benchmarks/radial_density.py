"""How sparse radial attention is: pairs, blocks touched, blocks of the public code.

`python -m benchmarks.radial_density` prints two tables, in seconds; nothing is timed.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from softlib import masks
from softlib.masks._radial_blocks import _half_width


class Video(NamedTuple):
    """A case of the paper; `reported` is the sparsity it publishes, in percent."""

    frames: int
    tokens: int
    variant: str
    reported: float | None


BLOCK = 128
VIDEOS = (
    Video(30, 3600, "hunyuan", None),
    Video(64, 3600, "hunyuan", 80.8),
    Video(128, 3600, "hunyuan", 88.3),
    Video(41, 3600, "wan", 73.6),
)
# Small frames, where the bands of the paper are narrower than a block.
SMALL = ((256, 256, 64), (1024, 256, 64))


class Density(NamedTuple):
    """Fractions of all pairs, of tokens or of blocks.

    Attributes:
        paper_tokens: `Radial(s)`.
        paper_blocks: Blocks that hold a pair of it.
        pow2_tokens: `Radial(s, rule="pow2", min_window=block)`.
        pow2_blocks: Blocks that hold a pair of it.
    """

    paper_tokens: float
    paper_blocks: float
    pow2_tokens: float
    pow2_blocks: float


def density(frames: int, tokens: int, block: int) -> Density:
    paper = masks.Radial(tokens)
    pow2 = masks.Radial(tokens, rule="pow2", min_window=block)
    pairs = (frames * tokens) ** 2
    return Density(
        masks.radial_pair_count(frames, tokens) / pairs,
        touched(paper, frames * tokens, block),
        masks.radial_pair_count(frames, tokens, rule="pow2", min_window=block) / pairs,
        touched(pow2, frames * tokens, block),
    )


def touched(mask: masks.Mask, length: int, block: int) -> float:
    """The fraction of blocks that a kernel visits."""
    return float((masks.block_map(mask, (length,) * 2, (block,) * 2) > 0).mean())


def public_code_tokens(video: Video, block: int = BLOCK) -> float:
    """The pairs that the public code counts before it decides about blocks."""
    frames, tokens = video.frames, video.tokens
    widths = [_half_width(d, tokens, block, 1.0) for d in range(frames)]
    of_pair = np.array([_pairs_within(min(w, tokens - 1), tokens) for w in widths])
    distance = abs(np.subtract.outer(np.arange(frames), np.arange(frames)))
    pairs = of_pair[distance]
    if video.variant == "wan":
        pairs[:, 0] = tokens**2
    return float(pairs.sum() / (frames * tokens) ** 2)


def _pairs_within(width: int, tokens: int) -> int:
    return 0 if width < 0 else tokens * (2 * width + 1) - width * (width + 1)


def public_code_blocks(video: Video, block: int = BLOCK) -> float:
    variant = "wan" if video.variant == "wan" else "hunyuan"
    array = masks.radial_block_mask(
        video.frames, video.tokens, block=block, variant=variant
    )
    return float(array.mean())


def lines(videos: Sequence[Video] = VIDEOS) -> Iterator[str]:
    """Of both tables, in Markdown."""
    yield (
        "| frames | tokens each | variant | pairs, paper | blocks, paper | pairs, pow2 "
        "| blocks, pow2 | pairs, code | blocks, code | reported |"
    )
    yield "| --- " * 10 + "|"
    for video in videos:
        found = density(video.frames, video.tokens, BLOCK)
        code = public_code_tokens(video), public_code_blocks(video)
        cells = [f"{value:.3f}" for value in (*found, *code)]
        reported = "" if video.reported is None else f"{1 - video.reported / 100:.3f}"
        row = (video.frames, video.tokens, video.variant, *cells, reported)
        yield f"| {' | '.join(map(str, row))} |"
    yield ""
    yield (
        "| frames | tokens each | block | pairs, paper | blocks, paper | pairs, pow2 "
        "| blocks, pow2 |"
    )
    yield "| --- " * 7 + "|"
    for small in SMALL:
        cells = [f"{value:.3f}" for value in density(*small)]
        yield f"| {' | '.join(map(str, (*small, *cells)))} |"


if __name__ == "__main__":
    print("\n".join(lines()))
