"""The command line of `uncertain_answers.py`."""

import dataclasses
import pathlib
from typing import Annotated, Any

from study import command_line
from study.command_line import EXAMPLES, SMOLLM2, Flag, Weights


@dataclasses.dataclass(frozen=True)
class Options:
    """Everything a run depends on; the values here are those of `--preset full`."""

    weights: Weights = SMOLLM2
    nouns: Annotated[pathlib.Path, Flag("xz table of WordNet's nouns")] = (
        EXAMPLES / "data" / "wordnet_nouns.tsv.xz"
    )
    questions: Annotated[int, Flag("words that are asked for", least=2)] = 400
    samples: Annotated[int, Flag("sampled answers to each question", least=2)] = 10
    answer: Annotated[int, Flag("most tokens of an answer")] = 6
    batch: Annotated[int, Flag("questions at a time")] = 10
    similarity: Annotated[
        bool, Flag("also group answers by sentence features of MiniLM")
    ] = True
    threshold: Annotated[
        float, Flag("least cosine of two answers that mean the same")
    ] = 0.7
    seed: Annotated[int, Flag("of the words and the samples", least=0)] = 0
    out: Annotated[pathlib.Path, Flag("folder of the numbers and the picture")] = (
        pathlib.Path("runs/uncertain-answers")
    )


PRESETS: dict[str, dict[str, Any]] = {
    "full": {},
    "smoke": {
        "weights": pathlib.Path("tiny"),
        "questions": 6,
        "samples": 3,
        "answer": 4,
        "batch": 4,
        "similarity": False,
        "out": pathlib.Path("runs/uncertain-answers-smoke"),
    },
}


def parse(arguments: list[str] | None = None) -> Options:
    return command_line.parse(
        Options,
        arguments,
        presets=PRESETS,
        program="uncertain_answers.py",
        description="Tell wrong answers of SmolLM2-135M by scores of its uncertainty.",
        about_presets="full: minutes on two CPU cores; smoke: seconds, with a tiny "
        "random model, for the tests (default: full)",
        contradiction=lambda options: None,
    )
