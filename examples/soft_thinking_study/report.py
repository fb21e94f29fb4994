"""The picture: which token a mixture leads to, and how far the laws are apart."""

import itertools
import pathlib
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter
from study.intervals import bootstrap
from study.output import BLUE, GREEN, GREY, ORANGE, save_picture

from .mixtures import VARIANTS

LABEL = {
    "concept": "concept token",
    "gumbel": "Gumbel weights",
    "shuffled": "same tokens, weights moved on",
    "random": "random tokens, same weights",
}
COLOUR = dict(zip(VARIANTS, (BLUE, GREEN, ORANGE, GREY), strict=True))
BINS = np.array([0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0])


def draw(path: pathlib.Path, findings: dict[str, Any]) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    figure.suptitle("Which token of a mixture SmolLM2-135M follows", fontsize=12)
    positions = {k: np.array(v, float) for k, v in findings["positions"].items()}
    _draw_followed(left, positions)
    _draw_distances(right, positions)
    save_picture(figure, path)
    plt.close(figure)


def _draw_followed(axis: Axes, positions: dict[str, np.ndarray]) -> None:
    """The share of mixtures that lead to their heaviest token, by its weight."""
    for at, variant in enumerate(VARIANTS):
        weight = positions["weight"][:, at]
        nearest = positions["nearest"][:, at]
        middles, shares, errors = [], [], []
        for low, high in itertools.pairwise(BINS):
            inside = (weight > low) & (weight <= high)
            if inside.sum() < 5:
                continue
            found = bootstrap(nearest[inside])
            middles.append(weight[inside].mean())
            shares.append(found.value)
            errors.append((found.value - found.low, found.high - found.value))
        if middles:
            axis.errorbar(
                np.array(middles) + 0.004 * (at - 1.5),
                shares,
                np.array(errors).T,
                fmt="o-",
                ms=4,
                lw=1.2,
                capsize=2,
                color=COLOUR[variant],
                label=LABEL[variant],
            )
    axis.set(xlabel="weight of the heaviest token", ylim=(0, 1.03))
    axis.set_title("Law nearest to that after the heaviest token", fontsize=10)
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.legend(frameon=False, fontsize=8)
    axis.grid(alpha=0.25)


def _draw_distances(axis: Axes, positions: dict[str, np.ndarray]) -> None:
    """Divergences of the law after a concept token from three others."""
    names = {
        "heaviest": "after the heaviest token",
        "blend": "mean of the laws after all",
        "second": "after the second token",
    }
    colours = (BLUE, GREEN, ORANGE)
    for (name, label), colour in zip(names.items(), colours, strict=True):
        values = np.sort(positions[name][:, 0])
        share = np.arange(1, len(values) + 1) / len(values)
        axis.step(values, share, color=colour, label=label, lw=1.6)
    axis.set(xlabel="Jensen-Shannon divergence, nats", ylabel="share of positions")
    axis.set_title("How far the law after a concept token is from ...", fontsize=10)
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    axis.grid(alpha=0.25)
