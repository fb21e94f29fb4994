"""The picture: loss against position and length, sharpness against the keys."""

import itertools
import pathlib
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator
from study.output import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, save_picture

from .options import Options

LABEL = {
    "softmax": "softmax",
    "window": "softmax, last {} keys",
    "lssa": "LSSA",
    "lssar-3": "LSSAR, p = 3",
    "lssar-15": "LSSAR, p = 15",
}
LOOK: dict[str, dict[str, Any]] = {
    "softmax": {"color": ORANGE},
    "window": {"color": GREY, "ls": "--"},
    "lssa": {"color": PURPLE},
    "lssar-3": {"color": GREEN},
    "lssar-15": {"color": BLUE, "lw": 2.4},
}


def draw(
    path: pathlib.Path,
    results: dict[str, Any],
    sharpness: dict[str, Any],
    options: Options,
) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    figure.suptitle(
        f"Trained on sequences of {options.length} characters, read up to "
        f"{options.length * options.factor:,} (State of the Union addresses)",
        fontsize=12,
    )
    _draw_positions(axes[0, 0], results, options)
    _draw_lengths(axes[0, 1], results, options)
    _draw_sharpness(axes[1, 0], sharpness, "weight", "weight on the matching key")
    _draw_sharpness(axes[1, 1], sharpness, "entropy", "entropy / log(number of keys)")
    axes[1, 0].set_title("One key matches (cosine 0.93), the others are random")
    axes[1, 1].set_title("The same: how far the weights are spread")
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.title.set_fontsize(10)
    axes[0, 0].legend(frameon=False)
    save_picture(figure, path)
    plt.close(figure)


def _draw_positions(axis: Axes, results: dict[str, Any], options: Options) -> None:
    for name, result in results.items():
        losses = np.array(result["by_position"])
        ends = np.unique(np.geomspace(4, len(losses), 25).round().astype(int))
        bins = list(itertools.pairwise([0, *ends]))
        axis.plot(
            [(a + 1 + b) / 2 for a, b in bins],
            [losses[a:b].mean() for a, b in bins],
            **_style(name, options),
        )
    _finish_text(axis, options)
    axis.set(xlabel="position in the sequence", ylabel="loss [nats per character]")
    axis.set_title("Loss at a position")


def _draw_lengths(axis: Axes, results: dict[str, Any], options: Options) -> None:
    for name, result in results.items():
        losses = np.array(result["by_position"])
        lengths = np.arange(options.length, len(losses) + 1)
        mean = np.cumsum(losses)[options.length - 1 :] / lengths
        axis.plot(lengths, mean, **_style(name, options))
    _finish_text(axis, options)
    axis.set(xlabel="length of the sequence", ylabel="mean loss [nats per character]")
    axis.set_title("Mean loss of a whole sequence")


def _draw_sharpness(
    axis: Axes, sharpness: dict[str, Any], what: str, label: str
) -> None:
    for name, found in sharpness.items():
        axis.plot(
            [r["keys"] for r in found],
            [r[what] for r in found],
            marker="o",
            ms=4,
            **LOOK[name],
        )
    axis.set_xscale("log", base=2)
    _plain_ticks(axis)
    axis.set(xlabel="number of keys", ylabel=label, ylim=(-0.03, 1.05))


def _style(name: str, options: Options) -> dict[str, Any]:
    return {**LOOK[name], "label": LABEL[name].format(options.length)}


def _finish_text(axis: Axes, options: Options) -> None:
    axis.axvline(options.length, color=BLACK, lw=1, ls=":")
    axis.text(
        options.length,
        0.99,
        " training length",
        transform=axis.get_xaxis_transform(),
        va="top",
        fontsize=8,
    )
    axis.set_xscale("log", base=2)
    _plain_ticks(axis)


def _plain_ticks(axis: Axes) -> None:
    axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
    axis.xaxis.set_minor_locator(NullLocator())
