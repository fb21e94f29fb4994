"""The picture: words that each choice has right, and its difference from the beam."""

import pathlib
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import PercentFormatter
from study.intervals import Interval
from study.output import BLUE, GREEN, GREY, ORANGE, SKY, save_picture

COLOURS = (GREY, SKY, SKY, ORANGE, BLUE, BLUE, GREEN)
PANELS = {
    "accuracy": "whole words right",
    "similarity": "one less edit distance per sound",
    "over_beam": "words right, less those of the beam",
}
WIDEST = 0.045  # differences that are shown


def draw(path: pathlib.Path, findings: dict[str, Any]) -> None:
    figure, axes = plt.subplots(
        1, 3, figsize=(12, 4), layout="constrained", sharey=True
    )
    figure.suptitle("Pronunciations of CMUdict words by a small GRU", fontsize=12)
    methods = findings["methods"]
    places = np.arange(len(methods))[::-1]
    for axis, (name, title) in zip(axes, PANELS.items(), strict=True):
        found: list[Interval] = [numbers[name] for numbers in methods.values()]
        values = np.array([each.value for each in found])
        below = values - [each.low for each in found]
        above = np.array([each.high for each in found]) - values
        if name != "over_beam":
            axis.barh(places, values, color=COLOURS[: len(values)], height=0.65)
            axis.set_xlim(0, 1)
        else:
            axis.axvline(0, color=GREY, lw=1)
            axis.scatter(values, places, color=COLOURS[: len(values)], zorder=3)
            axis.set_xlim(-WIDEST, WIDEST)
            for place in places[values < -WIDEST]:
                text = f"← {values[places == place][0]:.0%}"
                axis.text(-WIDEST, place, text, va="center", fontsize=9)
        axis.errorbar(
            values, places, xerr=[below, above], fmt="none", ecolor="black", capsize=3
        )
        axis.set_yticks(places, list(methods))
        axis.set_title(title, fontsize=10)
        axis.xaxis.set_major_formatter(PercentFormatter(1))
        axis.grid(axis="x", alpha=0.25)
    save_picture(figure, path)
    plt.close(figure)
