"""The command line of `utility_probability.py`."""

import dataclasses
import pathlib
from typing import Annotated, Any

from study import command_line
from study.command_line import EXAMPLES, Flag


@dataclasses.dataclass(frozen=True)
class Options:
    """Everything a run depends on; the values here are those of `--preset full`."""

    weights: Annotated[
        pathlib.Path, Flag("g2p (of the package g2p-en) or tiny (random, for tests)")
    ] = pathlib.Path("g2p")
    dictionary: Annotated[pathlib.Path, Flag("xz text of pronunciations")] = (
        EXAMPLES / "data" / "cmudict.dict.xz"
    )
    words: Annotated[int, Flag("that are pronounced", least=2)] = 2000
    tuning: Annotated[int, Flag("further ones, on which options are chosen")] = 1000
    beams: Annotated[int, Flag("candidates of a word", least=2)] = 16
    samples: Annotated[int, Flag("drawn pronunciations of a word", least=2)] = 32
    longest: Annotated[int, Flag("most phonemes, with the end", least=2)] = 24
    seed: Annotated[int, Flag("decides words and draws", least=0)] = 0
    out: Annotated[pathlib.Path, Flag("folder of the numbers and the picture")] = (
        pathlib.Path("runs/utility-probability")
    )


PRESETS: dict[str, dict[str, Any]] = {
    "full": {},
    "smoke": {
        "weights": pathlib.Path("tiny"),
        "words": 12,
        "tuning": 6,
        "beams": 3,
        "samples": 4,
        "longest": 8,
        "out": pathlib.Path("runs/utility-probability-smoke"),
    },
}


def parse(arguments: list[str] | None = None) -> Options:
    return command_line.parse(
        Options,
        arguments,
        presets=PRESETS,
        program="utility_probability.py",
        description="Choose among pronunciations by probabilities over candidates.",
        about_presets="full: minutes on two CPU cores; smoke: seconds, with a random "
        "model, for the tests (default: full)",
        contradiction=lambda options: None,
    )
