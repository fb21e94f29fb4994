"""The command line of `verified_digits.py`."""

import dataclasses
import pathlib
from typing import Annotated, Any

from study import command_line
from study.command_line import Flag


@dataclasses.dataclass(frozen=True)
class Options:
    """Everything a run depends on; the values here are those of `--preset full`."""

    seeds: Annotated[int, Flag("networks, with images of their own")] = 10
    train: Annotated[int, Flag("images that train", least=10)] = 4000
    calibration: Annotated[int, Flag("images that calibrate", least=10)] = 4000
    test: Annotated[int, Flag("images of each condition", least=10)] = 1000
    steps: Annotated[int, Flag("of training, of each of its two halves")] = 1000
    batch: Annotated[int, Flag("images of a step")] = 128
    width: Annotated[int, Flag("features of an image", least=2)] = 64
    percent: Annotated[int, Flag("wanted accuracy of what is accepted")] = 95
    seed: Annotated[int, Flag("of the first network", least=0)] = 0
    out: Annotated[pathlib.Path, Flag("folder of the numbers and the picture")] = (
        pathlib.Path("runs/verified-digits")
    )


PRESETS: dict[str, dict[str, Any]] = {
    "full": {},
    "smoke": {
        "seeds": 2,
        "train": 200,
        "calibration": 200,
        "test": 60,
        "steps": 60,
        "batch": 64,
        "width": 24,
        "out": pathlib.Path("runs/verified-digits-smoke"),
    },
}


def parse(arguments: list[str] | None = None) -> Options:
    return command_line.parse(
        Options,
        arguments,
        presets=PRESETS,
        program="verified_digits.py",
        description="Accept predictions that are as likely right as is asked for.",
        about_presets="full: minutes on two CPU cores; smoke: seconds, for the tests "
        "(default: full)",
        contradiction=lambda options: (
            None if 0 < options.percent < 100 else "--percent must be below 100"
        ),
    )
