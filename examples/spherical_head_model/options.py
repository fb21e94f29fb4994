"""The command line of `train_spherical_head.py`."""

import dataclasses
import pathlib
from typing import Annotated, Any

from study import command_line
from study.command_line import Flag

EXAMPLES = pathlib.Path(__file__).resolve().parents[1]
TEXT = EXAMPLES / "data" / "sotu.txt.xz"


@dataclasses.dataclass(frozen=True)
class Options:
    """Everything a run depends on; the values here are those of `--preset full`."""

    corpus: Annotated[pathlib.Path, Flag("the addresses, xz")] = TEXT
    every: Annotated[
        int, Flag("one speech of so many is held out, the others trained on", least=2)
    ] = 10
    classes: Annotated[
        int, Flag("the most frequent pairs of words; fewer if there are fewer", least=9)
    ] = 1_000_000
    context: Annotated[int, Flag("words that are seen")] = 5
    word_features: Annotated[int, Flag("of the table of words")] = 16
    features: Annotated[int, Flag("of the output layer")] = 64
    batch: Annotated[int, Flag("examples a step")] = 128
    steps: Annotated[int, Flag("of training, for a Z-loss")] = 6000
    entropy_steps: Annotated[int, Flag("the same for cross-entropy")] = 40
    sharpness: Annotated[float, Flag("a of the Z-loss")] = 1.0
    scores: Annotated[tuple[int, ...], Flag("b of the Z-loss, one head each")] = (
        5,
        20,
        100,
    )
    z_rate: Annotated[float, Flag("learning rate of SGD in the head, Z-loss")] = 30.0
    entropy_rate: Annotated[float, Flag("the same for cross-entropy")] = 10.0
    rate: Annotated[float, Flag("learning rate of Adam below the head")] = 1e-3
    evaluations: Annotated[int, Flag("of the held-out examples while training")] = 5
    held_out: Annotated[int, Flag("examples of an evaluation")] = 512
    timed: Annotated[tuple[int, ...], Flag("numbers of classes to time steps of")] = (
        8_192,
        32_768,
        131_072,
        380_000,
    )
    rounds: Annotated[int, Flag("steps timed of each")] = 12
    seed: Annotated[int, Flag("decides weights and batches", least=0)] = 0
    out: Annotated[pathlib.Path, Flag("folder of the numbers and the picture")] = (
        pathlib.Path("runs/spherical-head")
    )


PRESETS: dict[str, dict[str, Any]] = {
    "full": {},
    "smoke": {
        "classes": 2_048,
        "word_features": 4,
        "features": 16,
        "steps": 160,
        "entropy_steps": 60,
        "scores": (5, 20),
        "evaluations": 2,
        "held_out": 128,
        "timed": (512, 2_048),
        "rounds": 2,
        "out": pathlib.Path("runs/spherical-head-smoke"),
    },
}


def parse(arguments: list[str] | None = None) -> Options:
    return command_line.parse(
        Options,
        arguments,
        presets=PRESETS,
        program="train_spherical_head.py",
        description="Predict the next two words as one class, with a Z-loss whose head "
        "is kept in factors, and with cross-entropy. Nothing is kept of a stopped run.",
        about_presets="full: minutes on two CPU cores; smoke: seconds, for the tests "
        "(default: full)",
        contradiction=_contradiction,
    )


def _contradiction(o: Options) -> str | None:
    if len(set(o.scores)) < len(o.scores):
        return f"--scores must name none twice, got {','.join(map(str, o.scores))}"
    return None
