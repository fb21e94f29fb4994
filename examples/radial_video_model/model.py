"""The transformer over patches, and the masks that its attention can have."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from softlib import masks
from softlib.nn import VideoTransformerBlock

from .options import Options
from .task import nearest_visible
from .video import GRID, PLACES

# How strongly queries and keys of near places and frames match at the start, and the
# factor of their scores. Otherwise attention starts flat over all patches and takes
# longer to find its neighbours than this example takes.
NEARNESS, SHARPNESS = 2.0, 2.5


def radial(options: Options) -> masks.Radial:
    """Bands at least as wide as a kernel's block, so that none is cut for nothing."""
    return masks.Radial(PLACES, rule="pow2", min_window=options.block)


class VideoModel(nnx.Module):
    """Corrects the copy of the nearest visible patch; starts as that copy.

    Attention is dense; `under` makes copies under other masks.
    """

    def __init__(self, options: Options, *, rngs: nnx.Rngs):
        width, parts = options.width, options.components
        self.embed = nnx.Linear(parts, width, rngs=rngs)
        draw = lambda *shape: nnx.Param(0.3 * jax.random.normal(rngs.params(), shape))
        self.place, self.hidden = draw(PLACES, width), draw(width)
        self.blocks = nnx.List(
            [
                VideoTransformerBlock(
                    width,
                    options.heads,
                    grid=GRID,
                    mask=masks.All(),
                    mlp_features=2 * width,
                    rngs=rngs,
                )
                for _ in range(options.layers)
            ]
        )
        for block in self.blocks:
            _attend_near(block)
        self.out = nnx.Linear(
            width, parts, kernel_init=nnx.initializers.zeros, rngs=rngs
        )

    def __call__(self, latents: Array, hidden: Array) -> Array:
        """Latents (B, frames, places, components) with the hidden ones filled in."""
        copied = nearest_visible(latents, hidden)
        x = self.embed(copied) + self.place[...][None, None]
        x = x + jnp.where(hidden[..., None], self.hidden[...][None, None, None], 0)
        for block in self.blocks:
            x = block(x)
        return copied + self.out(x)


def _attend_near(block: Any) -> None:
    for linear in (block.query, block.key):
        linear.bias[...] = linear.bias[...] + NEARNESS
    for norm in (block.query_norm, block.key_norm):
        norm.scale[...] = norm.scale[...] * SHARPNESS


def build(options: Options) -> VideoModel:
    """The seed decides every weight."""

    @nnx.jit  # one program instead of one for every initialiser
    def create() -> VideoModel:
        return VideoModel(options, rngs=nnx.Rngs(options.seed))

    return create()


def under(
    model: VideoModel, mask: masks.Mask, *, implementation: str | None = None
) -> VideoModel:
    """A copy with the same weights whose blocks attend under another mask."""
    copy: Any = nnx.clone(model)
    for block in copy.blocks:
        block.mask, block.implementation = mask, implementation
    return copy


@nnx.jit
def predict(model: VideoModel, latents: Array, hidden: Array) -> Array:
    return model(latents, hidden)
