"""The picture: words that each choice has right, and the gain over the greedy one."""

import pathlib
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import PercentFormatter
from study.intervals import Interval
from study.output import BLUE, GREEN, GREY, ORANGE, SKY, save_picture


def draw(path: pathlib.Path, findings: dict[str, Any]) -> None:
    figure, axes = plt.subplots(
        1, 3, figsize=(12, 4), layout="constrained", sharey=True
    )
    figure.suptitle("Pronunciations of CMUdict words by a small GRU", fontsize=12)
    methods = findings["methods"]
    panels = (
        ("accuracy", "whole words right"),
        ("gain", "gain over greedy decoding, same words"),
        ("similarity", "one less edit distance per sound"),
    )
    colours = [GREY, SKY, SKY, ORANGE, BLUE, BLUE, GREEN]
    places = np.arange(len(methods))[::-1]
    for axis, (name, title) in zip(axes, panels, strict=True):
        found: list[Interval] = [numbers[name] for numbers in methods.values()]
        values = np.array([each.value for each in found])
        below = values - [each.low for each in found]
        above = np.array([each.high for each in found]) - values
        axis.barh(places, values, color=colours[: len(values)], height=0.65)
        axis.errorbar(
            values, places, xerr=[below, above], fmt="none", ecolor="black", capsize=3
        )
        axis.set_yticks(places, list(methods))
        axis.set_title(title, fontsize=10)
        axis.xaxis.set_major_formatter(PercentFormatter(1))
        axis.grid(axis="x", alpha=0.25)
        if name != "gain":
            low = min(each.low for each in found)
            axis.set_xlim(max(0, low - 0.05), None)
    save_picture(figure, path)
    plt.close(figure)
