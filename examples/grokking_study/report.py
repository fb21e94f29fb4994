"""The picture: accuracy of held-out sums, and what rounding leaves of the loss."""

import pathlib
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter
from study.output import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, save_picture

from .options import Options

LABEL = {
    "plain": "softmax",
    "exact": "softmax, exact loss",
    "perp": "perpGrad",
    "stablemax-plain": "StableMax, log(s / sum)",
    "stablemax": "StableMax, exact loss",
}
LOOK: dict[str, dict[str, Any]] = {
    "plain": {"color": ORANGE},
    "exact": {"color": PURPLE, "alpha": 0.9},
    "perp": {"color": BLUE, "lw": 2.4},
    "stablemax-plain": {"color": GREY},
    "stablemax": {"color": GREEN, "lw": 2.4},
}

type Curves = dict[str, list[dict[str, Any]]]


def draw(path: pathlib.Path, large: Curves, small: Curves, options: Options) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    figure.suptitle(
        "Sums modulo a prime: where rounding stops training, and what makes it go on",
        fontsize=12,
    )
    columns = (
        (large, options.modulus, options.train_percent),
        (small, options.small_modulus, options.small_train_percent),
    )
    for column, (curves, modulus, percent) in enumerate(columns):
        accuracy, rounding = axes[:, column]
        _draw_accuracy(accuracy, curves)
        free = "center left" if modulus == options.small_modulus else "center right"
        accuracy.legend(frameon=False, fontsize=8, loc=free)
        accuracy.set_title(f"Sums modulo {modulus}, {percent} % of them trained on")
        _draw_rounding(rounding, curves)
        rounding.set_title(f"The same: what float32 rounds away, modulo {modulus}")
    for axis in axes.flat:
        axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
        axis.yaxis.set_major_formatter(PercentFormatter(1))
        axis.set(xlabel="epoch")
        axis.grid(alpha=0.25)
        axis.title.set_fontsize(10)
    save_picture(figure, path)
    plt.close(figure)


def _draw_accuracy(axis: Axes, curves: Curves) -> None:
    for name, curve in curves.items():
        epochs, test = column(curve, "epoch"), column(curve, "test_accuracy")
        label = LABEL[name]
        if (epoch := first_epoch(curve, "test_accuracy", 0.99)) is not None:
            label += f": 99 % at epoch {epoch:,}"
        axis.plot(epochs, test, label=label, **LOOK[name])
        train = column(curve, "train_accuracy")
        axis.plot(epochs, train, color=LOOK[name]["color"], ls=":", lw=1)
    axis.plot([], [], color=BLACK, ls=":", lw=1, label="dotted: the sums trained on")
    axis.set(ylabel="accuracy of the held-out sums", ylim=(-0.03, 1.05))
    # From the first point after the start to the end of the longest.
    last = max(curve[-1]["epoch"] for curve in curves.values())
    axis.set_xscale("log")
    axis.set_xlim(min(curve[1]["epoch"] for curve in curves.values()), last)
    axis.xaxis.set_minor_formatter(NullFormatter())


def _draw_rounding(axis: Axes, curves: Curves) -> None:
    for name, curve in curves.items():
        epochs, look = column(curve, "epoch"), LOOK[name]
        zero = column(curve, "zero_loss_fraction")
        axis.plot(epochs, zero, color=look["color"], lw=1.8)
        if not name.startswith("stablemax"):
            lost = column(curve, "collapse_fraction")
            axis.plot(epochs, lost, color=look["color"], ls="--", lw=1)
    axis.plot([], [], color=BLACK, lw=1.8, label="losses that are exactly 0")
    axis.plot([], [], color=BLACK, ls="--", lw=1, label="collapsed softmax")
    axis.set(ylabel="share of the sums trained on", ylim=(-0.03, 1.2))
    axis.set_yticks(np.linspace(0, 1, 6))
    axis.set_xlim(0, max(curve[-1]["epoch"] for curve in curves.values()))
    axis.legend(frameon=False, fontsize=8, loc="upper center", ncols=2)


def column(curve: list[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([record[name] for record in curve])


def first_epoch(curve: list[dict[str, Any]], name: str, least: float) -> int | None:
    """At which a number of the curve has come so far."""
    found = (record["epoch"] for record in curve if record[name] >= least)
    return next(found, None)
