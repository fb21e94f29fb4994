"""The picture: of each condition what rules accept, and how much of it is right."""

import pathlib
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import PercentFormatter
from study.output import BLUE, GREEN, GREY, ORANGE, SKY, save_picture

COLOURS = (*(GREY, SKY, ORANGE, "#CC79A7", BLUE, "#999933", GREEN, "black", "#C0C000"),)


def draw(path: pathlib.Path, findings: dict[str, Any], level: float) -> None:
    figure, axes = plt.subplots(
        1, 2, figsize=(11, 6.5), layout="constrained", sharey=True
    )
    of_rules = findings["rules"]
    conditions = list(next(iter(of_rules.values())))
    height = 0.8 / len(of_rules)
    for axis, key, title in (
        (axes[0], "accepted", "share of predictions that are accepted"),
        (axes[1], "right", "share of them that is right"),
    ):
        for number, (rule, of_rule) in enumerate(of_rules.items()):
            found = [of_rule[name][key] for name in conditions]
            places = np.arange(len(conditions)) - 0.4 + height * (number + 0.5)
            kept = [i for i, each in enumerate(found) if each is not None]
            values = np.array([found[i].value for i in kept])
            below = np.nan_to_num(values - [found[i].low for i in kept])
            above = np.nan_to_num(np.array([found[i].high for i in kept]) - values)
            axis.errorbar(
                values,
                places[kept],
                xerr=[np.maximum(below, 0), np.maximum(above, 0)],
                fmt="o",
                color=COLOURS[number],
                ms=5,
                label=rule,
            )
        axis.set_title(title, fontsize=10)
        axis.set_xlim(-0.03, 1.03)
        axis.xaxis.set_major_formatter(PercentFormatter(1))
        for between in np.arange(len(conditions) - 1) + 0.5:
            axis.axhline(between, color=GREY, lw=0.5, alpha=0.4)
        axis.grid(axis="x", alpha=0.25)
    axes[1].axvline(level, color="black", lw=1, ls="--")
    axes[0].set_yticks(np.arange(len(conditions)), conditions)
    axes[0].invert_yaxis()
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4
    )
    save_picture(figure, path)
    plt.close(figure)
