"""The command line of `run_smollm2.py`."""

import dataclasses
import pathlib
from typing import Annotated, Any

from study import command_line
from study.command_line import EXAMPLES, SMOLLM2, Flag, Weights

WEIGHTS = ("smollm2", "tiny")


@dataclasses.dataclass(frozen=True)
class Options:
    """Everything a run depends on; the values here are those of `--preset full`."""

    weights: Weights = SMOLLM2
    corpus: Annotated[pathlib.Path, Flag("xz text of addresses, for perplexity")] = (
        EXAMPLES / "data" / "sotu.txt.xz"
    )
    rows: Annotated[int, Flag("addresses after 1990 that are read")] = 4
    context: Annotated[int, Flag("tokens of each that are read", least=2)] = 512
    answer: Annotated[int, Flag("most tokens of an answer")] = 48
    cache: Annotated[int, Flag("places of the cache")] = 640
    out: Annotated[pathlib.Path, Flag("folder of the numbers")] = pathlib.Path(
        "runs/smollm2"
    )


PRESETS: dict[str, dict[str, Any]] = {
    "full": {},
    "smoke": {
        "weights": pathlib.Path("tiny"),
        "rows": 2,
        "context": 32,
        "answer": 8,
        "cache": 144,
        "out": pathlib.Path("runs/smollm2-smoke"),
    },
}


def parse(arguments: list[str] | None = None) -> Options:
    return command_line.parse(
        Options,
        arguments,
        presets=PRESETS,
        program="run_smollm2.py",
        description="Ask SmolLM2-135M, measure how well and how fast it reads.",
        about_presets="full: a minute on two CPU cores; smoke: seconds, with a tiny "
        "random model, for the tests (default: full)",
        contradiction=_contradiction,
    )


def _contradiction(o: Options) -> str | None:
    if o.context + o.answer > o.cache:
        return (
            f"--cache must be at least --context + --answer = {o.context + o.answer}, "
            f"got {o.cache}"
        )
    return None
