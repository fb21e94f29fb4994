"""The picture of the page: what exchanges cost beside products, and memory."""

import pathlib

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .advice import share
from .divisions import DIVISIONS, HEADS
from .links import GPUS
from .outcome import Results

# Told apart in print and by colour-blind readers.
COLOURS = ("#56b4e9", "#0072b2", "#023858")
HEAD_COLOURS = {"softlib": "#0072b2", "stored": "#e69f00"}
INK, GRID = "#222222", "#dddddd"


def draw(results: Results, path: pathlib.Path) -> None:
    """Writes a PNG with a white background, readable on dark pages too."""
    counts = sorted({each.case.devices for each in results.outcomes})
    names = [division.name for division in DIVISIONS]
    figure = Figure(figsize=(10, 0.8 + 0.62 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.set_facecolor("white")
    exchanges, memory = figure.subplots(1, 2, sharey=True)
    place = np.arange(len(names))
    height = 0.8 / len(counts)
    for i, devices in enumerate(counts):
        found = [results.find(name, "softlib", devices) for name in names]
        exchanges.barh(
            place + (i - (len(counts) - 1) / 2) * height,
            [100 * share(each, GPUS) if each else 0 for each in found],
            height,
            color=COLOURS[i % len(COLOURS)],
            label=f"{devices} {GPUS.name}",
        )
    exchanges.set_xlabel("exchanges, % of the time of the products")
    middle = counts[len(counts) // 2]
    for i, head in enumerate(HEADS):
        found = [results.find(name, head, middle) for name in names]
        lower = [each.argument_bytes / 2**30 if each else 0 for each in found]
        upper = [each.temporary_bytes / 2**30 if each else 0 for each in found]
        where = place + (i - 0.5) * 0.4
        memory.barh(where, lower, 0.4, color="#999999")
        memory.barh(
            where,
            upper,
            0.4,
            left=lower,
            color=HEAD_COLOURS[head],
            label=f"temporaries, {head} head",
        )
    memory.axvline(
        GPUS.memory / 2**30, color=INK, linewidth=0.8, label=f"memory of an {GPUS.name}"
    )
    memory.set_xlabel(f"GiB of each of {middle} devices; grey: parameters")
    for axes in (exchanges, memory):
        axes.grid(axis="x", color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="best", fontsize=8)
    exchanges.set_yticks(place, names)
    exchanges.invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, facecolor="white", metadata={"Software": None})
