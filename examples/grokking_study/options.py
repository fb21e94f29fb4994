"""The command line of `grokking.py`."""

import dataclasses
import pathlib
from typing import Annotated, Any

from study import command_line
from study.command_line import Flag

# In the order of the picture.
LARGE = ("plain", "exact", "perp")
SMALL = ("plain", "exact", "stablemax-plain", "stablemax")


@dataclasses.dataclass(frozen=True)
class Options:
    """Everything a run depends on; the values here are those of `--preset full`."""

    modulus: Annotated[int, Flag("numbers are added modulo this one", least=3)] = 113
    train_percent: Annotated[int, Flag("share of the sums that are trained on")] = 40
    methods: Annotated[tuple[str, ...], Flag("what to compare", choices=LARGE)] = LARGE
    epochs: Annotated[int, Flag("full-batch steps of plain and exact")] = 12_000
    perp_epochs: Annotated[int, Flag("full-batch steps of perp")] = 300
    small_modulus: Annotated[
        int, Flag("the same for a second problem, where StableMax is tried", least=3)
    ] = 31
    small_train_percent: Annotated[int, Flag("its share that is trained on")] = 80
    small_methods: Annotated[
        tuple[str, ...], Flag("what to compare there", choices=SMALL)
    ] = SMALL
    small_epochs: Annotated[int, Flag("full-batch steps there")] = 30_000
    width: Annotated[int, Flag("neurons of a hidden layer")] = 200
    learning_rate: Annotated[float, Flag("of Adam, constant")] = 0.01
    points: Annotated[int, Flag("of a curve; as many evaluations")] = 120
    seed: Annotated[
        int, Flag("decides the initial weights and which sums are held out", least=0)
    ] = 0
    out: Annotated[
        pathlib.Path, Flag("folder of checkpoints, numbers and the picture")
    ] = pathlib.Path("runs/grokking")
    fresh: Annotated[bool, Flag("delete the run in --out and start anew")] = False


PRESETS: dict[str, dict[str, Any]] = {
    "full": {},
    "demo": {
        "methods": ("plain", "perp"),
        "epochs": 2000,
        "perp_epochs": 200,
        "small_methods": ("plain", "stablemax"),
        "small_epochs": 10_000,
        "points": 100,
        "out": pathlib.Path("runs/grokking-demo"),
    },
    "smoke": {
        "modulus": 59,
        "train_percent": 50,
        "epochs": 10,
        "perp_epochs": 10,
        "small_modulus": 11,
        "small_methods": ("stablemax",),
        "small_epochs": 20,
        "points": 5,
        "out": pathlib.Path("runs/grokking-smoke"),
    },
}

# What a checkpoint depends on beside the settings of its own training.
IDENTITY = ("width", "learning_rate", "points", "seed")


def parse(arguments: list[str] | None = None) -> Options:
    return command_line.parse(
        Options,
        arguments,
        presets=PRESETS,
        program="grokking.py",
        description="Train a small network on sums modulo a prime and see where "
        "rounding stops it, and what makes it generalise.",
        about_presets="full: a quarter of an hour on two CPU cores, long enough for "
        "all that can happen; demo: two minutes; smoke: seconds, for the tests "
        "(default: full)",
        contradiction=_contradiction,
    )


def _contradiction(o: Options) -> str | None:
    for name in ("train_percent", "small_train_percent"):
        if getattr(o, name) > 99:
            flag = name.replace("_", "-")
            return f"--{flag} must be below 100, got {getattr(o, name)}"
    for name in ("epochs", "perp_epochs", "small_epochs"):
        if getattr(o, name) < o.points:
            flag = name.replace("_", "-")
            most = getattr(o, name)
            return f"--points must be at most --{flag}, got {o.points} and {most}"
    if o.modulus == o.small_modulus:
        return f"--small-modulus must not be --modulus, got {o.modulus} for both"
    return None
