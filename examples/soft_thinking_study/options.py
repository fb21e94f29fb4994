"""The command line of `soft_thinking.py`."""

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
    passages: Annotated[int, Flag("passages of addresses, one position of each")] = 250
    context: Annotated[int, Flag("tokens of a passage", least=8)] = 48
    questions: Annotated[int, Flag("that the model answers")] = 32
    answer: Annotated[int, Flag("tokens of an answer")] = 64
    per_answer: Annotated[int, Flag("most positions of an answer")] = 8
    tokens: Annotated[int, Flag("most tokens of a mixture", least=2)] = 8
    temperature: Annotated[float, Flag("of the next-token distribution")] = 0.6
    top_k: Annotated[int, Flag("tokens that are kept first", least=2)] = 30
    top_p: Annotated[float, Flag("probability that is kept of them")] = 0.95
    noise_temperature: Annotated[float, Flag("of Gumbel weights")] = 0.5
    most: Annotated[float, Flag("positions whose heaviest token has more are left")] = (
        0.8
    )
    seed: Annotated[int, Flag("decides passages, positions and draws", least=0)] = 0
    out: Annotated[pathlib.Path, Flag("folder of the numbers and the picture")] = (
        pathlib.Path("runs/soft-thinking")
    )


PRESETS: dict[str, dict[str, Any]] = {
    "full": {},
    "smoke": {
        "weights": pathlib.Path("tiny"),
        "passages": 6,
        "context": 72,
        "questions": 2,
        "answer": 8,
        "per_answer": 3,
        "tokens": 4,
        "out": pathlib.Path("runs/soft-thinking-smoke"),
    },
}


def parse(arguments: list[str] | None = None) -> Options:
    return command_line.parse(
        Options,
        arguments,
        presets=PRESETS,
        program="soft_thinking.py",
        description="Feed mixtures of tokens to SmolLM2 and see which it follows.",
        about_presets="full: minutes on two CPU cores; smoke: seconds, with a tiny "
        "random model, for the tests (default: full)",
        contradiction=_contradiction,
    )


def _contradiction(o: Options) -> str | None:
    if o.tokens > o.top_k:
        return f"--tokens must be at most --top-k {o.top_k}, got {o.tokens}"
    if o.top_p > 1:
        return f"--top-p must be at most 1, got {o.top_p}"
    return None
