"""Longer clips: the dense model under the radial mask, and adapters that mend it.

As in the paper: a model that was trained dense on short clips keeps its weights, gets
the radial mask for the long ones, and only low-rank adapters (LoRA) of the attention's
projections are trained.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from .model import VideoModel, predict, radial as radial_mask, under
from .options import Options
from .task import HeldOut, nearest_visible

ADAPTED = ("query", "key", "value", "out")


class Row(NamedTuple):
    """One way to fill in the same hidden patches of the held-out frames.

    Attributes:
        name: What is predicted with.
        frames: How many frames it sees at once.
        error: Relative to the background.
    """

    name: str
    frames: int
    error: float


def with_adapters(model: VideoModel, options: Options) -> VideoModel:
    """A copy under the radial mask with adapters that start as no change."""
    copy: Any = under(model, radial_mask(options))
    rngs, width = nnx.Rngs(options.seed), options.width
    for block in copy.blocks:
        for name in ADAPTED:
            base = getattr(block, name)
            adapter = nnx.LoRA(width, options.rank, width, base_module=base, rngs=rngs)
            setattr(block, name, adapter)
    return copy


def errors(
    dense: VideoModel,
    radial: VideoModel,
    adapters: VideoModel,
    control: VideoModel,
    held_out: HeldOut,
    options: Options,
) -> tuple[list[Row], dict[str, np.ndarray]]:
    """The rows of the comparison, and the predictions that the picture shows.

    `control` has adapters that were trained as long, but on short clips: what the
    adapters owe to the longer ones is the difference.
    """
    short, long = options.frames, options.frames * options.extension
    sparse = under(dense, radial_mask(options))
    ways: list[tuple[str, int, Callable]] = [
        ("copy of the nearest visible", short, nearest_visible),
        ("dense", short, _with(dense)),
        ("radial", short, _with(radial)),
        ("copy of the nearest visible", long, nearest_visible),
        ("dense, not adapted", long, _with(dense)),
        ("dense under the radial mask, not adapted", long, _with(sparse)),
        ("dense under the radial mask, adapters", long, _with(adapters)),
        ("dense under the radial mask, adapters of short clips", long, _with(control)),
        ("radial, not adapted", long, _with(radial)),
    ]
    rows, predictions = [], {}
    for name, frames, way in ways:
        found = held_out.predictions(way, frames)
        rows.append(Row(name, frames, held_out.error(found)))
        predictions[f"{name} {frames}"] = found[0]
    return rows, predictions


def _with(model: VideoModel) -> Callable:
    return lambda latents, hidden: predict(model, latents, hidden)
