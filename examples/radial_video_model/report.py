"""The picture: the mask, what it costs, what was learned, and what that looks like."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from language_model.checkpoints import Record
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter
from study.output import BLACK, BLUE, GREEN, GREY, ORANGE, SKY, save_picture

from softlib.masks import Mask

from .cost import Cost, Pairs
from .extension import Row
from .options import Options
from .video import CREDIT, PLACES, picture

COLOUR = {"dense": ORANGE, "radial": BLUE, "stored": GREY}
LABEL = {
    "stored": "dense, scores stored",
    "dense": "dense, streamed",
    "radial": "radial",
}
MASK_FRAMES = 12


def draw(
    path: pathlib.Path,
    *,
    mask: Mask,
    pairs: Sequence[Pairs],
    costs: Sequence[Cost],
    histories: dict[str, list[Record]],
    rows: Sequence[Row],
    shown: dict[str, np.ndarray],
    options: Options,
) -> None:
    figure = plt.figure(figsize=(15, 13), layout="constrained")
    parts: Any = figure.subfigures(3, 1, height_ratios=[1, 1, 1.15])
    top, middle, bottom = parts
    first = top.subplots(1, 4)
    _draw_mask(first[0], mask)
    _draw_pairs(first[1], pairs)
    _draw_costs(first[2], costs, "temporary_bytes", 1e-6, "MB")
    _draw_costs(first[3], costs, "seconds", 1, "seconds")
    first[2].set_title("Temporary memory of loss and gradients")
    first[3].set_title("Time of loss and gradients")
    curves, bars = middle.subplots(1, 2, width_ratios=[1, 1.25])
    _draw_losses(curves, histories, rows[0].error)
    _draw_rows(bars, rows)
    for axis in (*first, curves, bars):
        axis.title.set_fontsize(10)
    for axis, (title, image) in zip(
        bottom.subplots(2, 3).flat, shown.items(), strict=True
    ):
        axis.imshow(picture(image), interpolation="nearest")
        axis.set_title(title, fontsize=9)
        axis.set_axis_off()
    figure.suptitle(
        f"Hidden patches of a real video: {options.frames} frames of {PLACES} patches, "
        f"then {options.frames * options.extension} frames.   {CREDIT}",
        fontsize=11,
    )
    save_picture(figure, path)
    plt.close(figure)


def _draw_mask(axis: Axes, mask: Mask) -> None:
    n = MASK_FRAMES * PLACES
    held = np.asarray(mask.materialize(n, n))
    axis.imshow(held, cmap="Blues", vmin=0, vmax=1.4, interpolation="antialiased")
    ticks = np.arange(0, MASK_FRAMES + 1, 4) * PLACES
    axis.set_xticks(ticks, [f"{t // PLACES}" for t in ticks])
    axis.set_yticks(ticks, [f"{t // PLACES}" for t in ticks])
    axis.set(xlabel="frame of the key", ylabel="frame of the query")
    axis.set_title(f"The mask, {MASK_FRAMES} frames: {held.mean():.0%} of the pairs")


def _draw_pairs(axis: Axes, pairs: Sequence[Pairs]) -> None:
    n = np.array([p.tokens for p in pairs])
    kept = np.array([p.kept for p in pairs])
    listed = [(p.tokens, p.visited) for p in pairs if p.visited is not None]
    axis.loglog(n, n, color=ORANGE, label="dense: n")
    axis.loglog(*np.array(listed).T, "s-", color=SKY, ms=3, label="in visited blocks")
    axis.loglog(n, kept, "o-", color=BLUE, ms=3, label="radial, kept")
    # Through a point where the clip is longer than the part that is dense.
    octaves = np.log2(n / PLACES)
    guide = kept[3] * octaves / octaves[3]
    axis.loglog(n, guide, ":", color=BLACK, label=r"$\propto \log$ frames")
    axis.loglog(n, kept[3] * n / n[3], "--", color=BLACK, label=r"$\propto n$")
    axis.set(xlabel="tokens n", ylabel="keys per query (pairs / n)")
    axis.set_title(r"Pairs: $n \log n$ against $n^2$")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=8)


def _draw_costs(
    axis: Axes, costs: Sequence[Cost], what: str, factor: float, unit: str
) -> None:
    for attention, label in LABEL.items():
        points = [
            (c.tokens, factor * getattr(c, what))
            for c in costs
            if c.attention == attention and getattr(c, what) is not None
        ]
        if points:
            colour = COLOUR[attention]
            axis.loglog(*np.array(points).T, "o-", ms=4, color=colour, label=label)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.set(xlabel="tokens n", ylabel=unit)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=8)


def _draw_losses(axis: Axes, histories: dict[str, list[Record]], copy: float) -> None:
    for name in ("dense", "radial"):
        losses = [r["train_loss"] for r in histories[name] if "train_loss" in r]
        # Clips differ far more than steps: a clip with much motion is hard.
        span = max(1, len(losses) // 8)
        mean = np.convolve(losses, np.ones(span) / span, "valid")
        steps = np.arange(span, len(losses) + 1)
        label = f"{name}, training (mean of {span} steps)"
        axis.plot(steps, mean, color=COLOUR[name], lw=1, ls=":", label=label)
        held_out = [
            (r["step"], r["held_out_loss"])
            for r in histories[name]
            if "held_out_loss" in r
        ]
        label = f"{name}, held out"
        axis.plot(*np.array(held_out).T, "o-", color=COLOUR[name], ms=4, label=label)
    label = "copy of the nearest visible patch, held out"
    axis.axhline(copy, color=GREY, ls="--", label=label)
    axis.set(xlabel="optimiser step", ylabel="error of hidden patches (1: background)")
    axis.set_title("Learning: same first weights, same clips in the same order")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=8, loc="lower left")


def _draw_rows(axis: Axes, rows: Sequence[Row]) -> None:
    position = np.arange(len(rows))[::-1]
    colours = [
        GREEN
        if "adapters" in r.name
        else GREY
        if "copy" in r.name
        else COLOUR["radial" if r.name.startswith("radial") else "dense"]
        for r in rows
    ]
    bars = axis.barh(position, [r.error for r in rows], color=colours, height=0.7)
    axis.bar_label(bars, [f"{r.error:.3f}" for r in rows], fontsize=8, padding=3)
    axis.set_yticks(position, [f"{r.name} ({r.frames} frames)" for r in rows])
    axis.tick_params(axis="y", labelsize=8)
    axis.set(xlabel="error of the same hidden patches, held out (1: background)")
    axis.margins(x=0.12)
    axis.set_title("Short and longer clips, the longer with and without adapters")
    axis.grid(axis="x", alpha=0.25)
    axis.set_axisbelow(True)


def images(
    patches: np.ndarray,
    hidden: np.ndarray,
    predictions: dict[str, np.ndarray],
) -> dict[str, Any]:
    """One held-out frame as it is, as it is seen, and as it is filled in.

    Args:
        patches: True patches of all held-out frames.
        hidden: True where hidden, (frames, places).
        predictions: Patches that were predicted, by title.
    """
    # The frame with the most motion among its hidden patches.
    motion = np.square(patches - patches.mean(0)).mean(-1)
    frame = int(np.where(hidden, motion, 0).sum(1).argmax())
    where = hidden[frame, :, None]
    filled = {
        title: np.where(where, found[frame], patches[frame])
        for title, found in predictions.items()
    }
    seen = np.where(where, 0.5, patches[frame])
    return {"what the models see": seen, "truth": patches[frame], **filled}
