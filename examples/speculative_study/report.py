"""The picture: tokens of a call, seconds, how often drafts of one token are right."""

import pathlib
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter
from study.intervals import Interval
from study.output import BLACK, BLUE, GREEN, GREY, ORANGE, save_picture


def draw(
    path: pathlib.Path, findings: dict[str, Any], counted: tuple[int, ...]
) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    _draw_bars(axes[0], findings["calls"], "tokens_per_call")
    axes[0].set_title("tokens of a call of the model", fontsize=10)
    _draw_bars(axes[1], findings["seconds"], "faster")
    axes[1].set_title("times faster than without a draft", fontsize=10)
    for (order, row), colour in zip(
        findings["law"].items(), (GREEN, ORANGE, BLUE), strict=False
    ):
        shares: list[Interval] = row["shares"]
        values = np.array([share.value for share in shares])
        ends = np.array([(s.value - s.low, s.high - s.value) for s in shares]).T
        axes[2].errorbar(
            counted, values, ends, fmt="o", ms=4, color=colour, label=f"order {order}"
        )
        line = row["intercept"].value + row["slope"].value * np.log10(counted)
        axes[2].plot(counted, line, ":", color=colour)
    axes[2].set(xscale="log", xlabel="tokens that the draft was counted on")
    axes[2].set_title("tokens that a draft of one has right", fontsize=10)
    axes[2].yaxis.set_major_formatter(PercentFormatter(1))
    axes[2].legend(frameon=False)
    save_picture(figure, path)
    plt.close(figure)


def _draw_bars(axis: Axes, found: dict[str, Any], name: str) -> None:
    drafts = [draft for draft, row in next(iter(found.values())).items() if name in row]
    for at, (draft, colour) in enumerate(zip(drafts, (BLUE, ORANGE), strict=True)):
        values: list[Interval] = [rows[draft][name] for rows in found.values()]
        places = np.arange(len(values)) + 0.38 * (at - 0.5)
        axis.bar(places, [v.value for v in values], 0.36, color=colour, label=draft)
        ends = [(v.value - v.low, v.high - v.value) for v in values]
        axis.errorbar(
            places,
            [v.value for v in values],
            np.transpose(ends),
            fmt="none",
            ecolor=BLACK,
            capsize=3,
        )
    axis.axhline(1, color=GREY, lw=1)
    axis.set_xticks(range(len(found)), list(found))
    axis.legend(frameon=False)
