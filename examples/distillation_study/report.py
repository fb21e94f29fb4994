"""The picture: students, a soft label, the tuned teacher, language models, memory."""

import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from study import output
from study.output import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY

from softlib import losses

from . import glyphs

COLOURS = {
    "CE": GREY,
    "KD": BLUE,
    "DKD": SKY,
    "NKD": ORANGE,
    "USKD": PURPLE,
    "reverse-KL": GREEN,
    "JS": PURPLE,
    "MLL": BLUE,
    "MCMI": ORANGE,
}
CORNERS = "O0o"


def draw(path: pathlib.Path, found: dict[str, Any], images, histories: dict) -> None:
    figure = Figure(figsize=(13, 7.6), layout="constrained")
    axes = figure.subplots(2, 3)
    _bars(axes[0, 0], found["glyph_accuracy"], found["teacher_accuracy"]["MLL"])
    axes[0, 0].set_title("students of glyphs, held-out fonts")
    _soft_label(axes[0, 1], *images)
    _simplex(axes[0, 2], found, *images)
    _few_shot(axes[1, 0], found)
    _text(axes[1, 1], found["text"], histories)
    _memory(axes[1, 2], found["memory"])
    figure.text(0.005, 0.002, glyphs.CREDIT, fontsize=7, color=GREY)
    output.save_picture(figure, path)


def _bars(axes: Axes, accuracy: dict[str, float], teacher: float | None) -> None:
    names = list(accuracy)
    values = [100 * accuracy[name] for name in names]
    bars = axes.bar(names, values, color=[COLOURS[name] for name in names])
    axes.bar_label(bars, fmt="%.1f")
    if teacher is not None:
        axes.axhline(100 * teacher, color=BLACK, linewidth=1, label="teacher")
        axes.legend(loc="lower right")
        values = [*values, 100 * teacher]
    axes.set_ylim(max(0, min(values) - 8), min(100, max(values) + 5))
    axes.set_ylabel("right, %")


def _soft_label(axes: Axes, seen: glyphs.Images, probs: dict[str, np.ndarray]) -> None:
    """The teacher's view of one image, and Zipf's law in the same order."""
    p = probs["MLL"]
    label = glyphs.CHARACTERS.index("O")
    rows = np.flatnonzero(seen.labels == label)
    row = rows[np.argsort(p[rows, label])[len(rows) // 4]]
    order = np.argsort(-p[row])[:8]
    others = np.where(np.arange(p.shape[1]) == label, 0, p[row])
    others = others / others.sum()
    zipf = losses.zipf_soft_labels(jnp.asarray(p[[row]]), jnp.asarray([label]))
    x = np.arange(len(order))
    for shift, values, name, colour in (
        (-0.27, p[row], "teacher", BLUE),
        (0, others, "teacher, other classes", ORANGE),
        (0.27, np.asarray(zipf)[0], "Zipf", PURPLE),
    ):
        axes.bar(x + shift, values[order], 0.25, label=name, color=colour)
    axes.set_xticks(x, [glyphs.CHARACTERS[k] for k in order], family="serif")
    axes.set_yscale("log")
    axes.set_ylim(1e-4, 1.5)
    axes.legend(fontsize=8)
    axes.set_title("soft labels of one O")


def _simplex(axes: Axes, found, seen: glyphs.Images, probs) -> None:
    """Predictions among three characters, before and after MCMI."""
    ids = [glyphs.CHARACTERS.index(c) for c in CORNERS]
    corners = np.array([[0, 0], [1, 0], [0.5, np.sqrt(3) / 2]])
    triangle = np.concatenate([corners, corners[:1]])
    axes.plot(*triangle.T, color=BLACK, linewidth=0.8)
    mine = np.isin(seen.labels, ids)
    for name, marker in (("MLL", "o"), ("MCMI", "^")):
        p = probs[name][mine][:, ids]
        points = (p / p.sum(1, keepdims=True)) @ corners
        cmi = found["teacher_cmi"][name]
        axes.scatter(
            *points.T,
            s=14,
            alpha=0.5,
            marker=marker,
            color=COLOURS[name],
            label=f"{name}: CMI {cmi:.3f}",
        )
    for corner, character in zip(corners, CORNERS, strict=True):
        axes.annotate(
            character,
            corner,
            xytext=(0, -14 if corner[1] == 0 else 6),
            textcoords="offset points",
            ha="center",
            family="serif",
        )
    axes.set_axis_off()
    axes.set_aspect("equal")
    axes.legend(fontsize=8, loc="upper left")
    axes.set_title(f"the teacher among {', '.join(CORNERS)}")


def _few_shot(axes: Axes, found: dict[str, Any]) -> None:
    _bars(axes, found["few_shot_accuracy"], None)
    before, after = (100 * found["teacher_accuracy"][n] for n in ("MLL", "MCMI"))
    axes.set_title(
        f"few-shot students by teacher\n(teachers {before:.1f}, {after:.1f} %)"
    )


def _text(axes: Axes, numbers: dict[str, Any], histories: dict) -> None:
    for name in numbers:
        if name == "teacher":
            continue
        records = [r for r in histories[f"text {name}"] if "held_out_loss" in r]
        axes.plot(
            [r["step"] for r in records],
            [r["held_out_loss"] for r in records],
            marker="o",
            markersize=3,
            color=COLOURS[name],
            label=f"{name}: {records[-1]['held_out_loss']:.3f}",
        )
    axes.set_xlabel("step")
    axes.set_ylabel("KL(teacher || student), nats")
    axes.set_title("language students, held-out text")
    axes.legend(fontsize=8)


def _memory(axes: Axes, sizes: dict[str, int | None]) -> None:
    known = {name: size / 2**20 for name, size in sizes.items() if size is not None}
    bars = axes.barh(list(known), list(known.values()), color=[ORANGE, GREY])
    axes.bar_label(bars, fmt="%.0f MiB", padding=3)
    axes.set_xlim(0, 1.25 * max(known.values(), default=1))
    axes.set_title("memory of KL and its gradients")
