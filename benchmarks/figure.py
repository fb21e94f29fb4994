"""The picture of a run: time and scratch memory at the largest shape."""

import pathlib

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from . import torch_process
from .programs import BOUNDS, OURS
from .report import is_wrong, largest, mebibytes, ordered, worst_loss
from .results import Results, Speed, SpeedRow

# Told apart in print and by colour-blind readers; softlib's bars are solid.
COLOURS = ("#0072b2", "#e69f00")
INK, WRONG, GRID = "#222222", "#b00020", "#dddddd"
# Longer bars are cut and keep their number: one slow program would flatten the others.
LONGEST = 3.0


def draw(results: Results, path: pathlib.Path) -> None:
    """Writes a PNG with a white background, readable on dark pages too."""
    group = largest(results)
    names = [
        name
        for name in ordered(row.program for speed in group for row in speed.rows)
        if any(_measured(speed, name) for speed in group)
    ]
    figure = Figure(figsize=(10, 1.4 + 0.42 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.set_facecolor("white")
    time, memory = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for speed in group:
        _bars(time, memory, names, speed, group)
    time.axvline(1, color=INK, linewidth=0.8)
    _dress(time, "time / time of optax on stored logits")
    _dress(memory, "scratch memory, MiB (logarithmic)")
    memory.set_xscale("log")
    low, high = memory.get_xlim()
    memory.set_xlim(low / 2, high * 4)
    time.set_xlim(0, min(1.22 * time.get_xlim()[1], 1.3 * LONGEST))
    labels = [_label(name, results) for name in names]
    time.set_yticks(range(len(names)), labels)
    for tick, name in zip(time.get_yticklabels(), names, strict=True):
        tick.set_fontweight("bold" if name in OURS else "normal")
        tick.set_color(WRONG if is_wrong(name, results.errors) else INK)
    time.invert_yaxis()
    case = group[0].case
    time.legend(loc="lower right", frameon=True, framealpha=1, fontsize=9)
    figure.suptitle(
        f"Linear cross-entropy and its gradients: {case.shape}, {case.dtype}, "
        f"{results.machine.get('cores', '?')} cores",
        fontsize=11,
        color=INK,
    )
    if any(name in torch_process.NAMES for name in names):
        figure.supxlabel("† another process, ratio of medians", fontsize=8, color=INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, facecolor="white", metadata={"Software": None})


def _measured(speed: Speed, name: str) -> SpeedRow | None:
    row = speed.row(name)
    return row if row is not None and row.ratio is not None else None


def _bars(
    time: Axes, memory: Axes, names: list[str], speed: Speed, group: list[Speed]
) -> None:
    height = 0.8 / len(group)
    for position, name in enumerate(names):
        row = _measured(speed, name)
        if row is None or row.ratio is None:
            continue
        beside = [other for other in group if _measured(other, name)]
        y = position + (beside.index(speed) - (len(beside) - 1) / 2) * height
        style = {
            "height": 0.92 * height,
            "color": COLOURS[speed.case.vocab_axis],
            "alpha": 1.0 if name in OURS else 0.35 if name in BOUNDS else 0.65,
        }
        middle = row.ratio.median
        low, shown, high = (
            min(x, LONGEST) for x in (row.ratio.low, middle, row.ratio.high)
        )
        time.barh(y, shown, **style)
        time.plot([low, high], [y, y], color=INK, linewidth=0.8)
        text = f"  {middle:.2f}" if middle <= LONGEST else f"  ... {middle:.1f}"
        time.text(high, y, text, va="center", fontsize=8, color=INK)
        if row.temporary_bytes:
            memory.barh(y, row.temporary_bytes / 2**20, **style)
            text = f" {mebibytes(row.temporary_bytes)}"
            where = row.temporary_bytes / 2**20
            memory.text(where, y, text, va="center", fontsize=8, color=INK)
    # An empty bar that only the legend shows, in full colour.
    time.barh(
        [0],
        [0],
        color=COLOURS[speed.case.vocab_axis],
        label=f"weight {speed.case.layout}",
    )


def _dress(axes: Axes, label: str) -> None:
    axes.set_facecolor("white")
    axes.set_xlabel(label, color=INK)
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(axis="x", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _label(name: str, results: Results) -> str:
    text = f"{name} †" if name in torch_process.NAMES else name
    worst = worst_loss(name, results.errors)
    if worst is not None and worst.wrong:
        text += f"\n(wrong at V = {worst.case.vocabulary})"
    return text
