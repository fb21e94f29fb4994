"""The command line of `detect_generated_text.py`."""

import dataclasses
import pathlib
from typing import Annotated, Any

from study import command_line
from study.command_line import EXAMPLES, SMOLLM2, Flag, Weights


@dataclasses.dataclass(frozen=True)
class Options:
    """Everything a run depends on; the values here are those of `--preset full`."""

    weights: Weights = SMOLLM2
    corpus: Annotated[pathlib.Path, Flag("xz text of addresses")] = (
        EXAMPLES / "data" / "sotu.txt.xz"
    )
    texts: Annotated[int, Flag("texts of each author", least=2)] = 160
    prompt: Annotated[int, Flag("tokens of an address that each goes on from")] = 16
    lengths: Annotated[tuple[int, ...], Flag("tokens of a text that is tested")] = (
        *(8, 16, 32, 64, 128),
    )
    temperature: Annotated[float, Flag("of the shifted model, 1 is the model's")] = 0.8
    batch: Annotated[int, Flag("texts at a time")] = 16
    seed: Annotated[int, Flag("of windows and texts", least=0)] = 0
    out: Annotated[pathlib.Path, Flag("folder of the numbers and the picture")] = (
        pathlib.Path("runs/detect-generated-text")
    )


PRESETS: dict[str, dict[str, Any]] = {
    "full": {},
    "smoke": {
        "weights": pathlib.Path("tiny"),
        "texts": 8,
        "prompt": 4,
        "lengths": (4, 8),
        "batch": 8,
        "out": pathlib.Path("runs/detect-generated-text-smoke"),
    },
}


def parse(arguments: list[str] | None = None) -> Options:
    return command_line.parse(
        Options,
        arguments,
        presets=PRESETS,
        program="detect_generated_text.py",
        description="Test who wrote a text: SmolLM2-135M, a speaker, a colder model.",
        about_presets="full: minutes on two CPU cores; smoke: seconds, with a tiny "
        "random model, for the tests (default: full)",
        contradiction=_contradiction,
    )


def _contradiction(o: Options) -> str | None:
    if o.texts % o.batch:
        return f"--texts must be a multiple of --batch {o.batch}, got {o.texts}"
    if any(max(o.lengths) % length for length in o.lengths):
        return f"--lengths must divide the largest, got {','.join(map(str, o.lengths))}"
    return None
