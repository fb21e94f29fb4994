"""The picture: which token a mixture leads to, and how far the laws are apart."""

import pathlib
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter
from study.intervals import Interval
from study.output import BLUE, GREEN, GREY, ORANGE, save_picture

from .mixtures import VARIANTS
from .summaries import LAWS

LABEL = {
    "concept": "concept token",
    "gumbel": "Gumbel weights",
    "shuffled": "same tokens, weights moved on",
    "random": "random tokens, same weights",
}
COLOUR = dict(zip(VARIANTS, (BLUE, GREEN, ORANGE, GREY), strict=True))
LAW = {
    "heaviest": "after the heaviest token",
    "blend": "mean of the laws after all",
    "second": "after the second token",
}


def draw(path: pathlib.Path, findings: dict[str, Any]) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    figure.suptitle("Which token of a mixture SmolLM2-135M follows", fontsize=12)
    _draw_followed(left, findings["by_weight"])
    _draw_distances(right, findings["distances"])
    for axis in (left, right):
        axis.yaxis.set_major_formatter(PercentFormatter(1))
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize=8, loc="lower right")
    save_picture(figure, path)
    plt.close(figure)


def _draw_followed(axis: Axes, by_weight: dict[str, Any]) -> None:
    """The share of mixtures that lead to their heaviest token, by its weight."""
    for at, variant in enumerate(VARIANTS):
        points = by_weight[variant]
        shares: list[Interval] = [point["share"] for point in points]
        # Beside each other, or the intervals hide each other.
        places = np.array([point["weight"] for point in points]) + 0.004 * (at - 1.5)
        axis.errorbar(
            places,
            [share.value for share in shares],
            np.reshape(
                [(s.value - s.low, s.high - s.value) for s in shares], (-1, 2)
            ).T,
            fmt="o-",
            ms=4,
            lw=1.2,
            capsize=2,
            color=COLOUR[variant],
            label=LABEL[variant],
        )
    axis.set(xlabel="weight of the heaviest token", ylim=(0, 1.03))
    axis.set_title("Law nearest to that after the heaviest token", fontsize=10)


def _draw_distances(axis: Axes, distances: dict[str, Any]) -> None:
    """Divergences of the law after a concept token from three others."""
    for name, colour in zip(LAWS, (BLUE, GREEN, ORANGE), strict=True):
        axis.plot(distances[name], distances["levels"], color=colour, label=LAW[name])
    axis.set(xlabel="Jensen-Shannon divergence, nats", ylabel="share of positions")
    axis.set_title("How far the law after a concept token is from ...", fontsize=10)
