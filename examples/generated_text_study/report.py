"""The picture: the level that is held, and errors that fall with the length."""

import pathlib
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from study.output import BLUE, GREEN, GREY, ORANGE, PURPLE, save_picture

from . import texts
from .errors import LEVEL

NAMES = {
    ("level", "missed"): ("missed at the level of 5 %", ORANGE),
    ("threshold", "missed"): ("missed, fixed threshold", PURPLE),
    ("threshold", "false"): ("own rejected, fixed threshold", BLUE),
    ("ratio", "missed"): ("missed, likelihood ratio", GREEN),
}


def draw(path: pathlib.Path, findings: dict[str, Any]) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    rows = findings["errors"][texts.HUMAN]
    _curve(axes[0], rows, "level", "false", "own texts rejected", BLUE)
    axes[0].axhline(LEVEL, color=GREY, ls=":", label="the level")
    axes[0].set(xscale="log", ylim=(0, None), title="|z| > 1.96")
    for panel, (author, rows) in zip(axes[1:], findings["errors"].items(), strict=True):
        for (test, error), (name, colour) in NAMES.items():
            _curve(panel, rows, test, error, name, colour)
        lengths = [row["length"] for row in rows]
        x = np.linspace(min(lengths), max(lengths))
        for line in findings["lines"][author]:
            if (kind := (line["test"], line["error"])) in NAMES:
                y = np.exp(line["intercept"] + line["slope"] * x)
                panel.plot(x, y, ":", color=NAMES[kind][1])
        panel.set(yscale="log", ylim=(1e-3, 1.2), title=f"against {author}")
    for panel in axes:
        panel.set(xlabel="tokens of the text", ylabel="share of texts")
        panel.legend(frameon=False, fontsize=8)
    save_picture(figure, path)
    plt.close(figure)


def _curve(
    panel: Axes,
    rows: list[dict[str, Any]],
    test: str,
    error: str,
    name: str,
    colour: str,
) -> None:
    some = [r for r in rows if (r["test"], r["error"]) == (test, error)]
    # A logarithmic axis has no place for a test that never errs.
    some = [r for r in some if r["rate"].value > 0]
    if not some:
        return
    x = [row["length"] for row in some]
    values = [row["rate"] for row in some]
    y = [v.value for v in values]
    panel.plot(x, y, "o-", color=colour, label=name, ms=4)
    low, high = [v.low for v in values], [v.high for v in values]
    panel.fill_between(x, np.maximum(low, 1e-4), high, color=colour, alpha=0.15, lw=0)
