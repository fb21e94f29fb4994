"""The picture: slopes of a sure label, learning, rare labels, batches of clusters."""

import pathlib
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter
from study import wordnet
from study.output import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, save_picture

from . import scores
from .glosses import Glosses
from .options import Options

COLOUR = {
    "softmax": ORANGE,
    "decoupled": BLUE,
    "top-k": GREEN,
    "one-versus-all": PURPLE,
    "sampled": SKY,
}
LABEL = {
    "softmax": "multi-label softmax",
    "decoupled": "decoupled softmax",
    "top-k": "soft top-k",
    "one-versus-all": "one-versus-all",
    "sampled": "sampled decoupled",
}


def draw(
    path: pathlib.Path,
    *,
    results: dict[str, Any],
    mined: dict[str, Any],
    surest: dict[str, np.ndarray],
    glosses: Glosses,
    options: Options,
) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(13, 9.6), layout="constrained")
    figure.suptitle(
        f"{len(glosses.names):,} concepts above {len(glosses.words):,} definitions "
        f"({wordnet.CREDIT})",
        fontsize=13,
    )
    _draw_slopes(axes[0, 0], surest)
    _draw_learning(axes[0, 1], results)
    _draw_scores(axes[1, 0], results)
    _draw_batches(axes[1, 1], mined, options)
    for axis in axes.flat:
        axis.title.set_fontsize(11)
        axis.grid(alpha=0.25)
    save_picture(figure, path)
    plt.close(figure)


def _draw_slopes(axis: Axes, surest: dict[str, np.ndarray]) -> None:
    for name, mark in (("softmax", "o"), ("decoupled", "^")):
        style: Any = {"ms": 4, "alpha": 0.5, "color": COLOUR[name]}
        label = LABEL[name] if name == "decoupled" else f"{LABEL[name]} (sum)"
        axis.plot(surest["share"], surest[name], mark, label=label, **style)
    axis.axhline(0, color=BLACK, lw=1)
    axis.axvline(0.25, color=GREY, ls=":", label="1 / number of labels")
    axis.annotate("pushed down", (0.98, 0.05), ha="right", va="bottom", fontsize=9)
    axis.set(
        xlabel="probability of the surest of four right labels",
        ylabel="slope of the loss by its score",
        xlim=(0, 1),
    )
    axis.set_title("Softmax pushes a sure label down, decoupled softmax never does")
    axis.legend(frameon=False, fontsize=9, loc="upper left")


def _draw_learning(axis: Axes, results: dict[str, Any]) -> None:
    for name, result in results.items():
        axis.plot(
            result.steps,
            result.precision,
            "o-",
            ms=4,
            color=COLOUR[name],
            label=LABEL[name],
        )
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.set(xlabel="optimiser step", ylabel="P@1 of held-out definitions")
    axis.set_ylim(bottom=0)
    axis.set_title("Learning, the same model and batches for all losses")
    axis.legend(frameon=False, fontsize=9, loc="lower right")


def _draw_scores(axis: Axes, results: dict[str, Any]) -> None:
    names = [f"{kind}@{k}" for kind in ("P", "PSP") for k in scores.PLACES]
    places = np.arange(len(names))
    width = 0.8 / len(results)
    for i, (name, result) in enumerate(results.items()):
        values = [*result.scores.precision, *result.scores.scored]
        left = places + width * (i - (len(results) - 1) / 2)
        axis.bar(left, values, width, color=COLOUR[name], label=LABEL[name])
    axis.set_xticks(places, names)
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.set_title("Held-out precision, and propensity-scored: rare labels count more")
    axis.set_axisbelow(True)


def _draw_batches(axis: Axes, mined: dict[str, Any], options: Options) -> None:
    for kind, colour in (("random", GREY), ("clusters", BLUE)):
        stretches = mined[kind]
        steps = options.refresh_steps * np.arange(1, len(stretches) + 1)
        precision = [stretch.scores.precision[0] for stretch in stretches]
        axis.plot(steps, precision, "o-", color=colour, label=f"P@1, {kind}")
        starts = options.refresh_steps * np.arange(len(stretches))
        recall = [stretch.recall for stretch in stretches]
        label = f"nearest in the batch, {kind}"
        axis.plot(starts, recall, "s:", color=colour, ms=4, label=label)
    for i, stretch in enumerate(mined["clusters"]):
        text, place = str(stretch.cluster_size), options.refresh_steps * i
        axis.annotate(text, (place, stretch.recall), (0, 6), textcoords="offset points")
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.set(xlabel="optimiser step", ylim=(0, 1.2 * axis.get_ylim()[1]))
    axis.set_title("Triplets in a batch: random against clusters (numbers: their size)")
    axis.legend(frameon=False, fontsize=9, loc="upper left", ncols=2)
