"""The picture: one forecast of each head, likelihood and roughness over frequencies."""

import pathlib
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from study.output import BLACK, BLUE, GREY, ORANGE, save_picture

from .options import Options
from .series import Forecast

if TYPE_CHECKING:
    from .session import Result


def draw(
    path: pathlib.Path,
    data: dict[str, Forecast],
    results: "list[Result]",
    baselines: dict[str, float],
    options: Options,
) -> None:
    figure, axes = plt.subplots(
        len(data), 3, figsize=(13, 4 * len(data)), layout="constrained", squeeze=False
    )
    for row, (name, forecast) in zip(axes, data.items(), strict=True):
        own = [r for r in results if r.series == name]
        plain, waves = own[0], own[1:]
        best = min(waves, key=lambda r: np.mean(r.likelihood))
        _draw_forecast(row[0], forecast, plain, best, options)
        _draw_curve(row[1], plain, waves, "likelihood")
        lowest = [np.mean(r.lowest) for r in waves]
        n = [r.frequencies or 0 for r in waves]
        row[1].plot(n, lowest, color=ORANGE, ls="--", label="lowest at any evaluation")
        row[1].axhline(np.mean(plain.lowest), color=BLUE, ls="--")
        row[1].axhline(
            baselines[name], color=GREY, ls=":", label="counts of the bins alone"
        )
        row[1].set_ylabel("held-out nats")
        _draw_curve(row[2], plain, waves, "roughness")
        row[2].set_ylabel("roughness (lower is smoother)")
        row[2].set_ylim(bottom=0)
        row[1].legend(frameon=False)
    save_picture(figure, path)
    plt.close(figure)


def _draw_forecast(
    axes: Axes, forecast: Forecast, plain: "Result", best: "Result", options: Options
) -> None:
    """The held-out window in the middle of the later part."""
    place = len(plain.forecasts) // 2
    centres = forecast.centres(options.bins)
    label = f"Fourier head, {best.frequencies} frequencies"
    for result, name, colour in ((plain, "linear", BLUE), (best, label, ORANGE)):
        axes.step(centres, result.forecasts[place], colour, where="mid", label=name)
    seen = forecast.target[forecast.part(held_out=True)][place]
    seen = forecast.middle + forecast.scale * seen
    axes.axvline(seen, color=BLACK, ls="--", lw=1, label="what came")
    axes.set_title(forecast.title, fontsize=9)
    axes.set(xlabel=forecast.unit, ylabel="probability of the bin")
    axes.legend(frameon=False, fontsize=8, loc="upper left")


def _draw_curve(axes: Axes, plain: "Result", waves: "list[Result]", name: str) -> None:
    n = [r.frequencies or 0 for r in waves]
    values = np.array([getattr(r, name) for r in waves])
    axes.plot(n, values, "o", color=ORANGE, ms=3)
    axes.plot(n, values.mean(1), color=ORANGE, label="Fourier head")
    axes.axhline(np.mean(getattr(plain, name)), color=BLUE, label="linear")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("frequencies")
