"""The picture: time of a step against the classes, and what the time was worth."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter, PercentFormatter
from study.output import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    save_picture,
)

COLOURS = (BLUE, GREEN, PURPLE, SKY)


def draw(
    path: pathlib.Path,
    times: Mapping[str, Sequence[tuple[int, float]]],
    histories: Mapping[str, Sequence[Any]],
    by_frequency: Any,
    classes: int,
) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    figure.suptitle(f"The next two words as one of {classes:,} classes", fontsize=12)
    _draw_times(axes[0], times)
    colours = dict(zip(histories, _colours(histories), strict=True))
    for name, history in histories.items():
        style = {"color": colours[name], "label": name, "marker": "o", "markersize": 4}
        later = history[1:]
        axes[1].plot([e.seconds for e in later], [e.top10 for e in later], **style)
        axes[2].plot([e.step for e in later], [e.rank for e in later], **style)
    axes[1].axhline(by_frequency.top10, color=GREY, linestyle=":", label="frequency")
    axes[2].axhline(by_frequency.rank, color=GREY, linestyle=":", label="frequency")
    axes[1].set(
        xlabel="seconds (steps x least time of a step)",
        title="Held-out pairs among the first 10",
    )
    axes[1].yaxis.set_major_formatter(PercentFormatter(1))
    axes[2].set(xlabel="steps", title="Geometric mean of the place", xscale="log")
    axes[2].set_yscale("log")
    axes[2].yaxis.set_minor_formatter(NullFormatter())
    axes[2].legend(frameon=False, fontsize=9)
    for each in axes:
        each.grid(color="#e0e0e0", linewidth=0.6)
        each.spines[["top", "right"]].set_visible(False)
    save_picture(figure, path)
    plt.close(figure)


def _draw_times(axes: Axes, times: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    for (name, found), colour in zip(times.items(), (BLUE, ORANGE), strict=True):
        sizes, seconds = zip(*found, strict=True)
        axes.plot(sizes, [1e3 * s for s in seconds], "o-", color=colour, label=name)
    axes.set(xscale="log", yscale="log", xlabel="classes", title="Milliseconds a step")
    axes.legend(frameon=False, fontsize=9)


def _colours(names: Mapping[str, Any]) -> list[str]:
    """Orange for the last, which is cross-entropy."""
    z = [COLOURS[i % len(COLOURS)] for i in range(len(names) - 1)]
    return [*z, ORANGE]
