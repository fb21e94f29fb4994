"""The command line of `speculative_decoding.py`."""

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
    passages: Annotated[int, Flag("of late addresses, copied and gone on", least=2)] = (
        144
    )
    passage: Annotated[int, Flag("tokens of a passage", least=8)] = 48
    questions: Annotated[int, Flag("that the model answers", least=2)] = 32
    answer: Annotated[int, Flag("tokens that the model writes", least=2)] = 64
    batch: Annotated[int, Flag("prompts at a time")] = 32
    draft: Annotated[int, Flag("tokens of a proposal")] = 8
    order: Annotated[int, Flag("tokens of a counted context, with the next")] = 4
    counted: Annotated[tuple[int, ...], Flag("tokens that drafts are counted on")] = (
        *(1_000, 3_162, 10_000, 31_623, 100_000, 316_228, 1_000_000),
    )
    orders: Annotated[tuple[int, ...], Flag("of the drafts of the law")] = (2, 3, 4)
    seeds: Annotated[int, Flag("orders of the addresses that are counted")] = 5
    timed: Annotated[int, Flag("prompts of each kind that are timed", least=2)] = 8
    seed: Annotated[int, Flag("of the passages", least=0)] = 0
    out: Annotated[pathlib.Path, Flag("folder of the numbers and the picture")] = (
        pathlib.Path("runs/speculative-decoding")
    )


PRESETS: dict[str, dict[str, Any]] = {
    "full": {},
    "smoke": {
        "weights": pathlib.Path("tiny"),
        "passages": 2,
        "passage": 16,
        "questions": 2,
        "answer": 6,
        "batch": 2,
        "draft": 2,
        "counted": (100, 1_000, 10_000),
        "orders": (2,),
        "seeds": 2,
        "timed": 2,
        "out": pathlib.Path("runs/speculative-decoding-smoke"),
    },
}


def parse(arguments: list[str] | None = None) -> Options:
    return command_line.parse(
        Options,
        arguments,
        presets=PRESETS,
        program="speculative_decoding.py",
        description="Count and time the calls of SmolLM2-135M that drafts save.",
        about_presets="full: minutes on two CPU cores; smoke: seconds, with a tiny "
        "random model, for the tests (default: full)",
        contradiction=_contradiction,
    )


def _contradiction(o: Options) -> str | None:
    if o.timed > min(o.passages, o.questions):
        most = min(o.passages, o.questions)
        return f"--timed must be at most {most}, as there are prompts, got {o.timed}"
    if len(o.counted) < 3:
        return "--counted must have at least 3 numbers, for a line and its interval"
    return None
