"""The picture: areas of all scores, how they grow with samples, where G-NLL lies."""

import dataclasses
import pathlib
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from study.intervals import Interval
from study.output import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, save_picture

from .scores import GREEDY

SHOWN = {
    "predictive entropy": BLUE,
    "semantic entropy, equal words": ORANGE,
    "semantic entropy, MiniLM": PURPLE,
}


def draw(path: pathlib.Path, findings: dict[str, Any]) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    rows = findings["scores"][::-1]
    areas: list[Interval] = [row["area"] for row in rows]
    axes[0].errorbar(
        [a.value for a in areas],
        range(len(rows)),
        xerr=np.transpose([(a.value - a.low, a.high - a.value) for a in areas]),
        fmt="o",
        color=BLACK,
    )
    axes[0].set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=8)
    axes[0].axvline(0.5, color=GREY, ls=":")
    axes[0].set_xlabel("area under the ROC curve of wrong answers")
    greedy = next(row["area"] for row in rows if row["name"] == GREEDY)
    for name, colour in SHOWN.items():
        points = [p for p in findings["curve"] if p["name"] == name]
        if not points:
            continue
        counts = [p["samples"] for p in points]
        low, value, high = np.transpose(
            [dataclasses.astuple(p["area"])[:3] for p in points]
        )[[1, 0, 2]]
        axes[1].plot(counts, value, "o-", color=colour, label=name)
        axes[1].fill_between(counts, low, high, color=colour, alpha=0.15, lw=0)
    axes[1].axhline(greedy.value, color=GREEN, label=f"{GREEDY}, no sample")
    axes[1].axhspan(greedy.low, greedy.high, color=GREEN, alpha=0.1, lw=0)
    axes[1].set(xlabel="samples", ylabel="area under the ROC curve")
    axes[1].legend(frameon=False, fontsize=8)
    both = findings["uncertainty"]
    edges = np.linspace(0, np.max(np.concatenate([*both.values()])), 25)
    for name, colour in (("right", BLUE), ("wrong", ORANGE)):
        axes[2].hist(both[name], edges, color=colour, histtype="step", label=name)
    axes[2].set(xlabel=f"{GREEDY} of the answer, nats", ylabel="answers")
    axes[2].legend(frameon=False)
    save_picture(figure, path)
    plt.close(figure)
