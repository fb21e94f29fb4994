"""Attention masks: small values without a shape, composed with `& | ~`.

- `Mask`: the base class; `block_map`, `Block`: the status of blocks of pairs; `plot`.
- `array_field`, `mask_field`: fields of a user's mask, that is of a subclass.
- `All`, `Causal`, `Window`, `Dilated`: masks of relative positions.
- `Chunked`, `Prefix`, `GlobalTokens`, `Blocks`: masks of fixed regions.
- `Radial`, `radial_block_mask`, `radial_pair_count`: video.
- `Segments`, `Padding`: masks of data, that is of arrays.
- `PerAxis`, `Between`: masks of attention whose keys are tuples.
"""

from ._blocks import Block as Block
from ._data import Padding as Padding, Segments as Segments
from ._mask import All as All, Mask as Mask, block_map as block_map
from ._per_axis import Between as Between, PerAxis as PerAxis
from ._plot import plot as plot
from ._positional import Causal as Causal, Dilated as Dilated, Window as Window
from ._protocol import array_field as array_field, mask_field as mask_field
from ._radial import Radial as Radial, radial_pair_count as radial_pair_count
from ._radial_blocks import radial_block_mask as radial_block_mask
from ._regions import (
    Blocks as Blocks,
    Chunked as Chunked,
    GlobalTokens as GlobalTokens,
    Prefix as Prefix,
)

__all__ = [
    "All",
    "Between",
    "Block",
    "Blocks",
    "Causal",
    "Chunked",
    "Dilated",
    "GlobalTokens",
    "Mask",
    "Padding",
    "PerAxis",
    "Prefix",
    "Radial",
    "Segments",
    "Window",
    "array_field",
    "block_map",
    "mask_field",
    "plot",
    "radial_block_mask",
    "radial_pair_count",
]
