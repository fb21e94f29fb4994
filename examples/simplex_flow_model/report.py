"""The picture: the flow of three symbols, the samples, and what guidance does."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter
from study.output import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    save_picture,
)

from . import sites as sites_, toy as toy_
from .options import Options
from .sites import LETTERS, POSITIONS, Nearness, Sites

LABEL = {
    "independent": "independent letters",
    "network": "flow, trained denoiser",
    "exact": "flow, exact denoiser",
    "sites": "real sites, new draw",
}
COLOUR = {"independent": GREY, "network": BLUE, "exact": SKY, "sites": GREEN}
LETTER_COLOUR = dict(zip(LETTERS, (GREEN, BLUE, ORANGE, PURPLE), strict=True))
CORNERS = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, np.sqrt(0.75)]])


def draw(
    path: pathlib.Path,
    *,
    toy: toy_.Toy,
    sites: Sites,
    common: Sites,
    samples: dict[str, np.ndarray],
    near: dict[str, Nearness],
    guided: Sequence[Any],
    drawn: dict[tuple[str, int], np.ndarray],
    options: Options,
) -> None:
    figure, axes = plt.subplots(2, 3, figsize=(13, 8), layout="constrained")
    figure.suptitle(
        "Gumbel-softmax flow matching: three symbols, then human 5' splice sites",
        fontsize=12,
    )
    _draw_clouds(axes[0, 0], toy)
    _draw_paths(axes[0, 1], toy)
    _draw_guidance(axes[0, 2], guided, options)
    _draw_pairs(axes[1, 0], samples, sites)
    _draw_missing(axes[1, 1], near, options)
    _draw_letters(axes[1, 2], sites, common, guided, drawn, options)
    for axis in axes.flat:
        axis.title.set_fontsize(10)
    save_picture(figure, path)
    plt.close(figure)


def reaching(guided: Sequence[Any], space: str, share: float = 0.9) -> Any:
    """The weakest guidance with which so many are common, else that with the most."""
    found = [g for g in guided if g.space == space]
    enough = [g for g in found if g.common >= share]
    return enough[0] if enough else max(found, key=lambda g: g.common)


def _on_triangle(points: np.ndarray) -> np.ndarray:
    return points @ CORNERS


def _triangle(axis: Axes, names: Sequence[str]) -> None:
    outline = np.concatenate([CORNERS, CORNERS[:1]])
    axis.plot(*outline.T, color=BLACK, lw=1)
    places = CORNERS + np.array([[-0.03, -0.06], [0.03, -0.06], [0, 0.04]])
    for (x, y), name in zip(places, names, strict=True):
        axis.text(x, y, name, ha="center", va="center", fontsize=9)
    axis.set(aspect="equal", xlim=(-0.1, 1.1), ylim=(-0.1, 0.97))
    axis.axis("off")


def _draw_clouds(axis: Axes, toy: toy_.Toy) -> None:
    _triangle(axis, ("clean symbol A", "B", "C"))
    colours = plt.get_cmap("viridis_r")(np.linspace(0.15, 1, len(toy_.TIMES)))
    for cloud, t, colour in zip(toy.clouds, toy_.TIMES, colours, strict=True):
        axis.scatter(
            *_on_triangle(cloud).T,
            s=7,
            alpha=0.6,
            color=colour,
            label=f"t = {t:g}",
            lw=0,
        )
    right = (toy.clouds[-1].argmax(-1) == 0).mean()
    axis.legend(frameon=False, fontsize=8, loc="upper right", markerscale=2)
    axis.set_title(f"What training sees of A; at every t, A is nearest for {right:.0%}")


def _draw_paths(axis: Axes, toy: toy_.Toy) -> None:
    _triangle(axis, ("A (50 %)", "B (30 %)", "C (20 %)"))
    for paths, colour, label in (
        (toy.free, GREY, "free"),
        (toy.guided, ORANGE, "guided to C"),
    ):
        flat = _on_triangle(paths)
        axis.plot(*np.moveaxis(flat, -1, 0), color=colour, lw=1, alpha=0.8)
        axis.scatter(*flat[-1].T, s=14, color=colour, label=label, zorder=3)
    start = _on_triangle(toy.free[0])
    axis.scatter(*start.T, s=8, color=BLACK, label="start (noise)", zorder=4)
    axis.legend(frameon=False, fontsize=8, loc="upper right")
    axis.set_title("Paths of the flow: they end short of the corners")


def _draw_guidance(axis: Axes, guided: Sequence[Any], options: Options) -> None:
    lines: dict[str, dict[str, Any]] = {
        "common": {"ls": "-", "marker": "o"},
        "believed": {"ls": ":", "marker": "o", "mfc": "none"},
        "distinct": {"ls": "--", "lw": 0.9},
    }
    names = ("common in the genome", "common to the classifier", "distinct")
    colours = {
        "logit": (BLUE, "in the logarithm"),
        "simplex": (ORANGE, "on the simplex"),
    }
    for space, (colour, _) in colours.items():
        found = [g for g in guided if g.space == space]
        strengths = [g.strength / 100 for g in found]
        for what, look in lines.items():
            shares = [getattr(g, what) for g in found]
            axis.plot(strengths, shares, color=colour, ms=4, **look)
    handles = [Line2D([], [], color=c, label=f"steps {t}") for c, t in colours.values()]
    for name, look in zip(names, lines.values(), strict=True):
        handles.append(Line2D([], [], color=BLACK, ms=4, label=name, **look))
    axis.legend(handles=handles, frameon=False, fontsize=8)
    axis.set_xscale("symlog", linthresh=min(s for s in options.strengths if s) / 100)
    ticks = [s / 100 for s in options.strengths]
    axis.set_xticks(ticks, [f"{s:g}" for s in ticks], rotation=45)
    axis.minorticks_off()
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.set(xlabel="strength of guidance", ylabel="share of the sample")
    axis.set(ylim=(-0.02, 1.02))
    axis.grid(alpha=0.25)
    axis.set_title(f"Guided to sites that occur {options.common} times or more")


def _draw_pairs(axis: Axes, samples: dict[str, np.ndarray], sites: Sites) -> None:
    real = sites_.pairs(sites.tokens, sites.share).ravel()
    shown = real > 0
    for name in ("independent", "network"):
        found = sites_.pairs(samples[name]).ravel()
        floor = 0.3 / len(samples[name])
        axis.scatter(
            real[shown],
            np.maximum(found[shown], floor),
            s=9,
            lw=0,
            alpha=0.7,
            color=COLOUR[name],
            label=LABEL[name],
        )
    ends = [2e-4, 1]
    axis.plot(ends, ends, color=BLACK, lw=0.8)
    axis.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    axis.set(xlabel="share in the genome", ylabel="share in the sample")
    axis.legend(frameon=False, fontsize=8)
    axis.grid(alpha=0.25)
    axis.set_title("Two letters at two positions, all of them")


def _draw_missing(axis: Axes, near: dict[str, Nearness], options: Options) -> None:
    names = list(near)
    values = [near[name].missing_bits for name in names]
    places = np.arange(len(names))[::-1]
    axis.barh(places, values, color=[COLOUR[name] for name in names], height=0.6)
    for place, value in zip(places, values, strict=True):
        axis.text(value, place, f" {value:.2f}", va="center", fontsize=9)
    axis.set_yticks(places, [LABEL[name].replace(", ", ",\n") for name in names])
    axis.set(xlim=(0, 1.18 * max(values)), xlabel="bits (0: the distribution itself)")
    axis.grid(alpha=0.25, axis="x")
    axis.set_title(f"What {options.samples:,} sequences lack of the distribution")


def _draw_letters(
    axis: Axes,
    sites: Sites,
    common: Sites,
    guided: Sequence[Any],
    drawn: dict[tuple[str, int], np.ndarray],
    options: Options,
) -> None:
    """Stacked letters, their height their share, for three sets of sequences."""
    strength = reaching(guided, "logit").strength
    rows = {
        "all real": sites_.frequencies(sites.tokens, sites.share),
        "not guided": sites_.frequencies(drawn["logit", 0]),
        f"guided, {strength / 100:g}": sites_.frequencies(drawn["logit", strength]),
        "common real": sites_.frequencies(common.tokens, common.share),
    }
    for row, shares in enumerate(reversed(rows.values())):
        bottom = np.full(len(POSITIONS), 1.2 * row)
        for letter, share in zip(LETTERS, shares.T, strict=True):
            axis.bar(
                range(len(POSITIONS)), share, 0.9, bottom, color=LETTER_COLOUR[letter]
            )
            for i in np.flatnonzero(share > 0.17).tolist():
                place = bottom[i] + share[i] / 2
                axis.text(
                    i, place, letter, ha="center", va="center", color="w", fontsize=8
                )
            bottom = bottom + share
    axis.set_xticks(range(len(POSITIONS)), [f"{p:+d}" for p in POSITIONS])
    axis.set_yticks(1.2 * np.arange(len(rows)) + 0.5, list(rows)[::-1])
    axis.tick_params(length=0)
    axis.set_frame_on(False)
    axis.set(xlabel="position (the intron begins at +1)", xlim=(-0.6, 8.6))
    axis.set_title("Letters at each position")
