"""Pictures of masks: tokens, and the blocks that a kernel visits."""

import textwrap
from typing import Any

import numpy as np

from softlib._array_arguments import array_arguments

from ._blocks import Block, require_at_least
from ._mask import Mask, block_map

# Lightness alone tells them apart, for print and for colour-blind readers.
_EMPTY, _ATTENDS = "#ffffff", "#1f4e79"
_VISITED, _IN_WHOLE = "#f6d9a8", "#3f87b8"
_LINE = "#b8b8b8"
_MOST_TOKENS = 8192
_NAMES_OF_TOKENS = (
    "does not attend",
    "visited for nothing",
    "attends, whole block",
    "attends",
)
_NAMES_OF_BLOCKS = ("not visited", "attends in part", "attends as a whole")


@array_arguments
def plot(
    mask: Mask,
    query_length: int,
    key_length: int | None = None,
    *,
    block: int | tuple[int, int] | None = None,
    lines: int | None = None,
    tokens: bool = True,
    ax: Any = None,
) -> Any:
    """Draws a mask: queries downwards, keys to the right; dark where a pair attends.

    With `block` the picture shows what a block-sparse kernel does: white blocks are not
    visited, and pairs of blocks that attend as a whole are light blue. In the other
    visited blocks, pairs that do not attend are sand-coloured: wasted work.

    Args:
        mask: Any mask; one with arrays must be concrete and have no batch axis.
        query_length: Number of queries.
        key_length: Number of keys; None for as many as queries.
        block: Block size of both axes, or a pair; None draws tokens only.
        lines: Number of tokens between lines, such as those of a frame; None draws
            lines at the borders of blocks if there are few.
        tokens: False draws one dot per block instead of one per pair: white, sand or
            blue for `Block.NONE`, `SOME`, `ALL`. For lengths that have too many pairs.
        ax: Axes of matplotlib to draw on; None for those of a new figure, which gets
            the mask as its title, and a legend beside the picture.

    Returns:
        The `matplotlib.axes.Axes`. Their first image holds one number per token: 0
        white, 1 sand, 2 light blue (both only with a block), 3 dark; or per block its
        status.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The mask has a batch axis; `tokens=False` without a block; or more
            than 8192 queries or keys to draw one by one.

    Example:
        >>> ax = softlib.masks.plot(softlib.masks.Causal(), 6, block=3)
        >>> print(ax.images[0].get_array()[0])
        [3 1 1 0 0 0]
    """
    try:
        from matplotlib import colors, pyplot as plt
    except ImportError as error:
        raise ImportError(
            "plot: needs matplotlib, which is not installed: pip install matplotlib."
        ) from error
    key_length = query_length if key_length is None else key_length
    lengths = (query_length, key_length)
    for name, length in zip(("query_length", "key_length"), lengths, strict=True):
        require_at_least(1, "plot", name, length)
    blocks = (block, block) if isinstance(block, int) else block
    if blocks is not None and min(blocks) < 1:
        raise ValueError(f"plot: `block` must be at least 1, got {block!r}.")
    if tokens:
        image = _token_image(mask, lengths, blocks)
        shades = [_EMPTY, _VISITED, _IN_WHOLE, _ATTENDS]
    elif blocks is not None:
        image = block_map(mask, lengths, blocks)
        shades = [_EMPTY, _VISITED, _ATTENDS]
    else:
        raise ValueError("plot: `block` must be given with tokens=False, got None.")
    own_figure = ax is None
    if ax is None:
        ax = plt.figure(layout="constrained").add_subplot()
    height, width = lengths
    if not tokens and blocks is not None:  # the last block is drawn as large as others
        height, width = (n * b for n, b in zip(image.shape, blocks, strict=True))
    ax.imshow(
        image,
        cmap=colors.ListedColormap(shades),
        vmin=0,
        vmax=len(shades) - 1,
        extent=(0, width, height, 0),
        # Dots that share a pixel mix their colours, not their numbers.
        interpolation="nearest" if max(image.shape) <= 512 else "auto",
        interpolation_stage="rgba",
    )
    ax.set(xlim=(0, key_length), ylim=(query_length, 0), xlabel="key", ylabel="query")
    _draw_lines(ax, lengths, blocks if lines is None else (lines, lines))
    if own_figure:
        names = _NAMES_OF_TOKENS if tokens else _NAMES_OF_BLOCKS
        used = [(names[i], shades[i]) for i in np.unique(image)]
        _explain(ax, mask, used)
    return ax


def _explain(ax: Any, mask: Mask, names: list[tuple[str, str]]) -> None:
    """Writes the mask above the picture, and the meaning of its colours beside it."""
    from matplotlib import patches

    ax.set_title(
        textwrap.shorten(repr(mask), 70, placeholder=" ..."), fontsize="medium"
    )
    handles = [
        patches.Patch(facecolor=shade, edgecolor=_LINE, label=name)
        for name, shade in names
    ]
    beside = {"loc": "upper left", "bbox_to_anchor": (1.02, 1), "borderaxespad": 0}
    ax.legend(handles=handles, frameon=False, fontsize="small", **beside)


def _token_image(
    mask: Mask, lengths: tuple[int, int], blocks: tuple[int, int] | None
) -> np.ndarray:
    if max(lengths) > _MOST_TOKENS:
        raise ValueError(
            f"plot: lengths must be at most {_MOST_TOKENS} to draw every token, got "
            f"{lengths}; tokens=False draws one dot per block."
        )
    attends = np.asarray(mask.materialize(*lengths))
    if attends.ndim != 2:
        raise ValueError(
            "plot: the mask must have no batch axis, got one of size "
            f"{attends.shape[0]}; draw the mask of one entry of the batch."
        )
    if blocks is None:
        return np.where(attends, np.int8(3), np.int8(0))
    kinds = block_map(mask, lengths, blocks)
    kinds = kinds.repeat(blocks[0], 0).repeat(blocks[1], 1)[: lengths[0], : lengths[1]]
    held = np.where(kinds == Block.ALL, np.int8(2), np.int8(3))
    return np.where(attends, held, (kinds == Block.SOME).astype(np.int8))


def _draw_lines(
    ax: Any,
    lengths: tuple[int, int],
    steps: tuple[int, int] | None,
) -> None:
    # More lines than these would cover the picture.
    if steps is None or max(n // s for n, s in zip(lengths, steps, strict=True)) > 64:
        return
    style = {"color": _LINE, "linewidth": 0.4}
    for position in range(steps[0], lengths[0], steps[0]):
        ax.axhline(position, **style)
    for position in range(steps[1], lengths[1], steps[1]):
        ax.axvline(position, **style)
