"""The command line of `generative_heads.py`."""

import dataclasses
import pathlib
from typing import Annotated, Any

from study import command_line
from study.command_line import EXAMPLES, Flag


@dataclasses.dataclass(frozen=True)
class Options:
    """Everything a run depends on; the values here are those of `--preset full`."""

    dimensions: Annotated[
        tuple[int, ...], Flag("features of the drawn examples", least=2)
    ] = (20, 50, 100, 200, 400)
    most: Annotated[int, Flag("examples that are tried at most", least=4)] = 4096
    repeats: Annotated[int, Flag("draws of each size", least=2)] = 6
    digits: Annotated[pathlib.Path, Flag("xz text of digits")] = (
        EXAMPLES / "data" / "digits.txt.xz"
    )
    sizes: Annotated[tuple[int, ...], Flag("digits to fit", least=20)] = (
        20,
        50,
        100,
        200,
        400,
        1000,
    )
    digit_repeats: Annotated[int, Flag("divisions of the digits", least=2)] = 6
    seed: Annotated[int, Flag("decides all draws", least=0)] = 0
    out: Annotated[pathlib.Path, Flag("folder of the numbers and the picture")] = (
        pathlib.Path("runs/generative-heads")
    )


PRESETS: dict[str, dict[str, Any]] = {
    "full": {},
    "smoke": {
        "dimensions": (2, 4),
        "most": 48,
        "repeats": 2,
        "sizes": (20, 30),
        "digit_repeats": 2,
        "out": pathlib.Path("runs/generative-heads-smoke"),
    },
}


def parse(arguments: list[str] | None = None) -> Options:
    return command_line.parse(
        Options,
        arguments,
        presets=PRESETS,
        program="generative_heads.py",
        description="Count the examples that two kinds of linear heads need.",
        about_presets="full: minutes on two CPU cores; smoke: seconds, for the tests "
        "(default: full)",
        contradiction=lambda options: None,
    )
