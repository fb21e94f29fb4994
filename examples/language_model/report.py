"""What a run leaves behind: metrics as CSV and JSON, a picture, a few lines of text."""

import csv
import io
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, NullFormatter

from .checkpoints import Record
from .memory import Measurement
from .whole_file import write_whole

COLUMNS = (
    "step",
    "tokens",
    "train_loss",
    "train_perplexity",
    "held_out_loss",
    "held_out_perplexity",
    "held_out_accuracy",
    "gradient_norm",
    "learning_rate",
)
# Okabe and Ito's palette: told apart with every common form of colour blindness.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
COLOUR = {"softlib": BLUE, "optax": ORANGE}


def write_csv(path: pathlib.Path, history: Sequence[Record]) -> None:
    """One row a step. No clock times: a resumed run writes the same bytes."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(_with_perplexity, history))
    write_whole(path, lambda partial: partial.write_text(text.getvalue(), "utf-8"))


def write_json(
    path: pathlib.Path, history: Sequence[Record], **about: dict[str, Any]
) -> None:
    """The same numbers with the settings and the summary."""
    content = {**about, "history": list(map(_with_perplexity, history))}
    text = json.dumps(content, indent=1, default=str) + "\n"
    write_whole(path, lambda partial: partial.write_text(text, "utf-8"))


def draw(
    path: pathlib.Path,
    history: Sequence[Record],
    *,
    loss: str,
    unigram_perplexity: float,
    comparison: Sequence[float],
    memory: Sequence[Measurement],
    title: str,
) -> None:
    """Loss curves on the left; on the right the memory of both losses."""
    panels = 3 if memory else 1
    figure, axes = plt.subplots(
        1,
        panels,
        figsize=(5 + 4 * (panels - 1), 4.6),
        width_ratios=[1.5, 1, 1][:panels],
        layout=ConstrainedLayoutEngine(wspace=0.06),
        squeeze=False,
    )
    figure.suptitle(title, fontsize=11)
    _draw_curves(axes[0, 0], history, loss, unigram_perplexity, comparison)
    if memory:
        own = memory[0]
        _draw_memory(
            axes[0, 1],
            sorted((m for m in memory if m.rows == own.rows), key=lambda m: m[2]),
            label=lambda m: f"{m.vocabulary / 1000:.0f}k",
            axis_name=f"vocabulary ({own.rows:,} rows of {own.width})",
        )
        _draw_memory(
            axes[0, 2],
            sorted(m for m in memory if m.vocabulary == own.vocabulary),
            label=lambda m: f"{m.rows:,}",
            axis_name=f"rows (vocabulary {own.vocabulary:,})",
        )
        low, high = zip(*(a.get_ylim() for a in axes[0, 1:]), strict=True)
        for axis in axes[0, 1:]:
            axis.set_ylim(min(low), max(high))
        axes[0, 2].tick_params(labelleft=False)
        axes[0, 1].set_ylabel("temporary memory of loss and gradients [MB]")
        axes[0, 1].legend(loc="upper left", frameon=False)
    write_whole(path, lambda partial: figure.savefig(partial, dpi=130, format="png"))
    plt.close(figure)


def _draw_curves(axis, history, loss, unigram_perplexity, comparison) -> None:
    train = [(r["step"], r["train_loss"]) for r in history if "train_loss" in r]
    held_out = [
        (r["step"], r["held_out_loss"]) for r in history if "held_out_loss" in r
    ]
    steps, values = np.array(train).T
    axis.plot(steps, values, color=COLOUR[loss], lw=1, label=f"training, {loss} loss")
    if comparison:
        other = "optax" if loss == "softlib" else "softlib"
        axis.plot(
            steps[: len(comparison)],
            comparison,
            color=COLOUR[other],
            lw=2.2,
            ls=(0, (1, 2)),
            label=f"training, {other} loss, same seed",
        )
    axis.plot(*np.array(held_out).T, "o-", color=GREEN, lw=2, ms=5, label="held out")
    axis.axhline(
        math.log(unigram_perplexity),
        color=GREY,
        ls="--",
        lw=1.2,
        label="unigram frequencies",
    )
    axis.set(xlabel="optimiser step", ylabel="cross-entropy [nats per token]")
    axis.set_title("Learning", fontsize=10)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    right = axis.secondary_yaxis("right", functions=(np.exp, np.log))
    right.set_yscale("log")
    right.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    right.yaxis.set_minor_formatter(NullFormatter())
    right.set_ylabel("perplexity")


def _draw_memory(
    axis, measurements: Sequence[Measurement], label: Callable, axis_name: str
) -> None:
    position = np.arange(len(measurements))
    for offset, loss in ((-0.2, "optax"), (0.2, "softlib")):
        megabytes = [(m.temporary_bytes[loss] or 0) / 1e6 for m in measurements]
        bars = axis.bar(
            position + offset, megabytes, 0.38, color=COLOUR[loss], label=loss
        )
        axis.bar_label(bars, [_three_digits(v) for v in megabytes], fontsize=8)
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.set_ylim(low / 1.5, high * 4)  # room for the legend
    axis.set_xticks(position, [label(m) for m in measurements])
    axis.set_xlabel(axis_name)
    axis.set_title("Memory (compiled programs)", fontsize=10)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
    axis.grid(axis="y", alpha=0.25)
    axis.set_axisbelow(True)


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _with_perplexity(record: Record) -> Record:
    row = dict(record)
    for split in ("train", "held_out"):
        if (loss := row.get(f"{split}_loss")) is not None:
            row[f"{split}_perplexity"] = math.exp(min(loss, 80.0))
    return row
