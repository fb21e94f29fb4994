"""The picture: noisy preferences above, forgetting below."""

import pathlib
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter
from study.output import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, save_picture

from .options import Options
from .tuning import LOSSES, Tuned

LABEL = {"dpo": "DPO", "cdpo": "cDPO", "rdpo": "rDPO"}
COLOUR = {"dpo": ORANGE, "cdpo": PURPLE, "rdpo": BLUE}
METHOD = {
    "ascent": ("gradient ascent", ORANGE, "-"),
    "ascent+retain": ("gradient ascent + retain", ORANGE, "--"),
    "npo": ("NPO", BLUE, "-"),
    "npo+retain": ("NPO + retain", BLUE, "--"),
}


def draw(
    path: pathlib.Path,
    *,
    tuned: list[Tuned],
    forgotten: dict[str, list[dict[str, Any]]],
    before: dict[str, float],
    learned: dict[str, float],
    options: Options,
) -> None:
    figure, axes = plt.subplots(2, 3, figsize=(13, 8), layout="constrained")
    figure.suptitle(
        "Preferences from pairs, some in the wrong order (above); forgetting the "
        f"address of {options.forget_year} (below)",
        fontsize=12,
    )
    _by_flips(axes[0, 0], tuned, "scale", "Scale of the recovered reward")
    axes[0, 0].set(ylabel="slope in the annotator's reward", ylim=(0, None))
    _by_flips(axes[0, 1], tuned, "accuracy", "Held-out pairs in the right order")
    axes[0, 1].yaxis.set_major_formatter(PercentFormatter(1))
    axes[0, 1].axhline(0.5, color=GREY, lw=0.8, ls=":")
    _draw_own(axes[0, 2], tuned)
    for axis, what, title in (
        (axes[1, 0], "forget", "The address that is to be forgotten"),
        (axes[1, 1], "retain", "Addresses that were never trained on"),
    ):
        _along_steps(axis, forgotten, what, title, before, learned)
    _draw_trade(axes[1, 2], forgotten, before, learned)
    for axis in axes.flat:
        axis.title.set_fontsize(10)
        axis.grid(alpha=0.25)
    save_picture(figure, path)
    plt.close(figure)


def _by_flips(axis: Axes, tuned: list[Tuned], what: str, title: str) -> None:
    clean = [t for t in tuned if (t.loss, t.flips) == ("dpo", 0)]
    for name in LOSSES:
        found = clean + [t for t in tuned if t.loss == name and t.flips]
        axis.plot(
            [t.flips for t in found],
            [getattr(t, what) for t in found],
            "o-",
            color=COLOUR[name],
            label=LABEL[name],
        )
    axis.set(xlabel="pairs in the wrong order (%)", title=title)
    axis.set_xticks(sorted({t.flips for t in tuned}))
    axis.legend(frameon=False, fontsize=8)


def _draw_own(axis: Axes, tuned: list[Tuned]) -> None:
    names = [
        "base model" if t.loss == "base" else f"{LABEL[t.loss]}, {t.flips} %"
        for t in tuned
    ]
    places = np.arange(len(tuned))[::-1]
    colours = [COLOUR.get(t.loss, GREY) for t in tuned]
    values = [-t.drawn for t in tuned]
    axis.barh(places, values, color=colours, height=0.65)
    for place, value in zip(places, values, strict=True):
        axis.text(value, place, f" {value:.2f}", va="center", fontsize=8)
    axis.set_yticks(places, names, fontsize=8)
    axis.set(
        xlim=(0.9 * min(values), 1.03 * max(values)),
        xlabel="letters of a word",
        title="What they say (the axis does not begin at 0)",
    )


def _level(
    axis: Axes, value: float, text: str, colour: str, *, vertical: bool = False
) -> None:
    line = axis.axvline if vertical else axis.axhline
    line(value, color=colour, lw=1, ls=":", label=text)


def _along_steps(
    axis: Axes,
    forgotten: dict[str, list[dict[str, Any]]],
    what: str,
    title: str,
    before: dict[str, float],
    learned: dict[str, float],
) -> None:
    for name, history in forgotten.items():
        label, colour, style = METHOD[name]
        steps = [r["step"] for r in history]
        values = [r[what] for r in history]
        axis.plot(steps, values, style, color=colour, label=label)
    _level(axis, before[what], "before learning it", GREEN)
    axis.set(xlabel="step", ylabel="nats a token", yscale="log", title=title)
    _plain_ticks(axis, "y")
    axis.legend(frameon=False, fontsize=8)


def _draw_trade(
    axis: Axes,
    forgotten: dict[str, list[dict[str, Any]]],
    before: dict[str, float],
    learned: dict[str, float],
) -> None:
    for name, history in forgotten.items():
        label, colour, style = METHOD[name]
        x, y = ([r[what] for r in history] for what in ("forget", "retain"))
        axis.plot(x, y, style, color=colour, marker=".", ms=4, label=label)
    axis.plot(learned["forget"], learned["retain"], "o", color=BLACK, label="start")
    axis.plot(before["forget"], before["retain"], "*", color=GREEN, ms=12, label="goal")
    axis.set(
        xlabel="nats a token of the address",
        ylabel="nats a token of others",
        xscale="log",
        yscale="log",
        title="Right is forgotten, up is what it costs",
    )
    _plain_ticks(axis, "x")
    _plain_ticks(axis, "y")
    axis.legend(frameon=False, fontsize=8)


def _plain_ticks(axis: Axes, which: str) -> None:
    """2, 5, 10 instead of powers of ten, of which there may be none."""
    one = axis.xaxis if which == "x" else axis.yaxis
    low, high = one.get_view_interval()
    ticks = [t for t in (1, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50, 100) if low < t < high]
    one.set_ticks(ticks, [f"{t:g}" for t in ticks])
    one.set_ticks([], minor=True)
