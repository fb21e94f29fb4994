"""The command line of `fourier_head.py`."""

import dataclasses
import pathlib
from typing import Annotated, Any

from study import command_line
from study.command_line import Flag

EXAMPLES = pathlib.Path(__file__).resolve().parents[1]
DATA = EXAMPLES / "data" / "time_series.txt.xz"
SERIES = ("brent", "sunspots")


@dataclasses.dataclass(frozen=True)
class Options:
    """Everything a run depends on; the values here are those of `--preset full`."""

    data: Annotated[pathlib.Path, Flag("xz text, a number a line under headings")] = (
        DATA
    )
    series: Annotated[tuple[str, ...], Flag("what to forecast", choices=SERIES)] = (
        SERIES
    )
    bins: Annotated[int, Flag("bins of the forecast", least=2)] = 100
    frequencies: Annotated[tuple[int, ...], Flag("of the Fourier heads")] = (
        *(2, 4, 8, 16, 32),
    )
    seeds: Annotated[int, Flag("networks of each kind; the report shows means")] = 2
    width: Annotated[int, Flag("features of the hidden layers")] = 64
    steps: Annotated[int, Flag("optimiser steps of each network")] = 800
    batch: Annotated[int, Flag("windows a step")] = 256
    learning_rate: Annotated[float, Flag("peak, after the warm-up")] = 0.003
    evaluate_every: Annotated[int, Flag("steps between held-out evaluations")] = 200
    out: Annotated[
        pathlib.Path, Flag("folder of checkpoints, numbers and the picture")
    ] = pathlib.Path("runs/fourier-head")
    fresh: Annotated[bool, Flag("delete the run in --out and start anew")] = False


PRESETS: dict[str, dict[str, Any]] = {
    "full": {},
    "smoke": {
        "bins": 40,
        "frequencies": (2,),
        "seeds": 1,
        "width": 32,
        "steps": 40,
        "batch": 128,
        "learning_rate": 0.01,
        "evaluate_every": 20,
        "out": pathlib.Path("runs/fourier-head-smoke"),
    },
}

# What a checkpoint depends on. A run resumes only when all of these are the same.
IDENTITY = ("bins", "width", "steps", "batch", "learning_rate", "evaluate_every")


def parse(arguments: list[str] | None = None) -> Options:
    return command_line.parse(
        Options,
        arguments,
        presets=PRESETS,
        program="fourier_head.py",
        description="Forecast real series as distributions over bins, with a linear "
        "layer and with Fourier heads of several numbers of frequencies.",
        about_presets="full: minutes on two CPU cores; smoke: seconds, for the tests "
        "(default: full)",
        contradiction=_contradiction,
    )


def _contradiction(o: Options) -> str | None:
    for name in ("frequencies", "series"):
        values = getattr(o, name)
        if len(set(values)) < len(values):
            return f"--{name} must name none twice, got {','.join(map(str, values))}"
    if max(o.frequencies) > o.bins // 2:
        return (
            f"--frequencies must be at most half of --bins ({o.bins // 2}), "
            f"got {max(o.frequencies)}"
        )
    return None
