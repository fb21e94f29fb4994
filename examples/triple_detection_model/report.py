"""The picture: the hand-set head, learning, what a head attends to, time and error."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter
from study.output import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, save_picture

from . import cost
from .hand_set import Scores
from .maps import Attended, Map
from .options import Options

LABEL = {
    "tensor": "tensor",
    "pairwise": "pairwise",
    "deeper": "pairwise, two layers",
}
LOOK: dict[str, dict[str, Any]] = {
    "tensor": {"color": BLUE, "lw": 2},
    "pairwise": {"color": ORANGE, "lw": 2},
    "deeper": {"color": ORANGE, "lw": 1, "ls": (0, (4, 2))},
}
OF_TOLERANCE = dict(zip(cost.TOLERANCES, (SKY, GREEN, PURPLE), strict=True))
OF_HEAD = (BLUE, ORANGE, GREEN, PURPLE)


def draw(
    path: pathlib.Path,
    *,
    by_hand: Sequence[Scores],
    results: dict[str, dict[str, Any]],
    majority: dict[str, float],
    attended: Attended,
    costs: Sequence[cost.Cost],
    options: Options,
) -> None:
    figure, axes = plt.subplots(2, 3, figsize=(16, 9.6), layout="constrained")
    figure.suptitle(
        "Match3: does a number of the sequence belong to a triple that sums to zero "
        "modulo M?",
        fontsize=13,
    )
    _draw_learning(axes[0, 0], results, majority, options)
    _draw_map(figure, axes[0, 1], attended.map, options)
    _draw_sums(axes[0, 2], attended, options)
    _draw_hand_set(axes[1, 0], by_hand)
    _draw_times(axes[1, 1], costs)
    _draw_errors(axes[1, 2], costs)
    for axis in axes.flat:
        axis.title.set_fontsize(11)
    save_picture(figure, path)
    plt.close(figure)


def _draw_learning(
    axis: Axes,
    results: dict[str, dict[str, Any]],
    majority: dict[str, float],
    options: Options,
) -> None:
    for name, by_seed in results.items():
        for i, result in enumerate(by_seed.values()):
            size = f"{result['parameters']:,} parameters"
            label = None if i else f"{LABEL[name]}, {size}"
            axis.plot(result["steps"], result["accuracy"], label=label, **LOOK[name])
    base = float(np.mean(list(majority.values())))
    label = f"always the more frequent answer, {base:.0%}"
    axis.axhline(base, color=GREY, ls=":", lw=2, label=label)
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.set(
        xlabel="optimiser step",
        ylabel="right answers to fresh sequences",
        ylim=(0.3, 1.02),
    )
    seeds = len(options.seeds)
    axis.set_title(
        f"Trained: {options.length} numbers modulo {options.modulus}, "
        f"{seeds} {'seeds' if seeds > 1 else 'seed'} each"
    )
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=9, loc="lower right")


def _draw_map(figure: Any, axis: Axes, found: Map, options: Options) -> None:
    weights, heads = found.weights.max(0), found.weights.argmax(0)
    image = axis.imshow(weights, cmap="Greys", vmin=0, vmax=1)
    label = "largest weight of a head on the pair"
    figure.colorbar(image, ax=axis, shrink=0.8, label=label)
    for j, k in np.argwhere(weights > 0.1):
        colour = "white" if weights[j, k] > 0.5 else BLACK
        text = f"head\n{heads[j, k] + 1}"
        axis.text(k, j, text, ha="center", va="center", fontsize=8, color=colour)
    rows, columns = np.nonzero(found.matches)
    axis.plot(columns, rows, "s", ms=27, mfc="none", mec=ORANGE, mew=2.5)
    names = ["blank", *map(str, found.tokens)]
    axis.set_xticks(range(len(names)), names, fontsize=9)
    axis.set_yticks(range(len(names)), names, fontsize=9)
    number = found.tokens[found.query]
    pair = f"{number} + {names[rows[0]]} + {names[columns[0]]} = 0 modulo"
    axis.set(
        xlabel="number at k   (orange: in a triple that sums to zero)",
        ylabel="number at j",
    )
    axis.set_title(
        f"Trained: the pairs of the query {number} ({pair} {options.modulus})"
    )


def _draw_sums(axis: Axes, attended: Attended, options: Options) -> None:
    # Zero in the middle: a sum that is nearly zero is as wrong as any.
    half = options.modulus // 2
    sums = np.arange(options.modulus) - half
    for head, times in enumerate(attended.by_sum):
        colour = OF_HEAD[head % len(OF_HEAD)]
        label = f"head {head + 1}"
        axis.plot(sums, np.roll(times, half), color=colour, lw=1.5, label=label)
    axis.axhline(1, color=GREY, lw=1, ls=":", label="all triples alike")
    axis.set(
        xlabel=f"sum of the query and the pair, modulo {options.modulus}",
        ylabel="weight, relative to the number of triples",
        ylim=(0, None),
    )
    axis.set_title("Trained: weight of all queries, by the sum of the triple")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=9, loc="upper left")


def _draw_hand_set(axis: Axes, by_hand: Sequence[Scores]) -> None:
    for dtype in dict.fromkeys(s.dtype for s in by_hand):
        found = [s for s in by_hand if s.dtype == dtype]
        n = [s.length for s in found]
        style: Any = {"ls": "-" if dtype == "float64" else ":", "ms": 7}
        axis.plot(n, [s.least_match for s in found], "^", color=BLUE, **style)
        axis.plot(n, [s.most_other for s in found], "v", color=ORANGE, **style)
        axis.plot([], [], color=BLACK, ls=style["ls"], label=wrong(dtype, found))
    axis.axhline(0.5, color=GREY, lw=1)
    for text, y, va, colour in (
        ("lowest score of a number in a triple", 0.965, "top", BLUE),
        ("the answer is 1 above, 0 below", 0.51, "bottom", BLACK),
        ("highest score of any other number", 0.035, "bottom", ORANGE),
    ):
        where = (0.03, y)
        coordinates = ("axes fraction", "data")
        axis.annotate(
            text, where, xycoords=coordinates, va=va, color=colour, fontsize=9
        )
    axis.set(
        xlabel="numbers n of a sequence, modulo n²", ylabel="score", ylim=(-0.04, 1.04)
    )
    _lengths(axis, n)
    axis.set_title("Not trained: one head of width 5 with weights set by hand")
    axis.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(0, 0.72))


def wrong(dtype: str, found: Sequence[Scores]) -> str:
    """How many answers, and at which lengths."""
    counts = [(s.false_positives + s.false_negatives, s.length) for s in found]
    where = [f"{count} wrong at n = {n}" for count, n in counts if count]
    answers = sum(s.answers for s in found)
    return f"{dtype}: {', '.join(where) or f'0 of {answers:,} wrong'}"


def _of(costs: Sequence[cost.Cost], rtol: float | None, what: str) -> tuple[list, list]:
    found = [c for c in costs if c.rtol == rtol]
    return [c.tokens for c in found], [getattr(c, what) for c in found]


def _draw_times(axis: Axes, costs: Sequence[cost.Cost]) -> None:
    for rtol in (None, *cost.TOLERANCES):
        n, seconds = _of(costs, rtol, "seconds")
        label, colour = "exact", BLACK
        if rtol is not None:
            label, colour = (
                f"rtol {rtol:g}: {cost.rank(rtol)} monomials",
                OF_TOLERANCE[rtol],
            )
            axis.axvline(cost.crossover(rtol), color=colour, lw=1.5, ls=":")
        microseconds = 1e6 * np.array(seconds)
        axis.loglog(n, microseconds, "o-", color=colour, ms=4, label=label)
    axis.plot([], [], ":", color=BLACK, label="as many operations")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    _lengths(axis, n)
    axis.set(xlabel="tokens n of a sequence", ylabel="microseconds per token")
    axis.set_title(
        f"Exact against polynomial ({cost.FEATURES} features, entries up to "
        f"{cost.BOUND:g})"
    )
    axis.legend(fontsize=9, loc="upper left", framealpha=1, edgecolor="none")


def _draw_errors(axis: Axes, costs: Sequence[cost.Cost]) -> None:
    for rtol, colour in OF_TOLERANCE.items():
        n, errors = _of(costs, rtol, "error")
        axis.axhline(cost.certified(rtol), color=colour, ls="--")
        label = f"rtol {rtol:g}: {cost.rank(rtol)} monomials"
        axis.loglog(n, errors, "o-", color=colour, ms=4, label=label)
    axis.plot([], [], "--", color=BLACK, label="certified")
    axis.plot([], [], "o-", color=BLACK, ms=4, label="measured")
    _lengths(axis, n)
    axis.set(xlabel="tokens n of a sequence", ylabel="largest error of an output")
    axis.set_ylim(bottom=min(c.error or 1 for c in costs) / 50)
    axis.set_title("Error of the polynomials, certified and measured")
    axis.legend(frameon=False, fontsize=9, loc="lower left", ncols=2)


def _lengths(axis: Axes, n: list[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(n, [f"{x}" for x in n])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.grid(alpha=0.25)
