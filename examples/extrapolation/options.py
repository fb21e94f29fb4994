"""The command line of `length_extrapolation.py`."""

import dataclasses
import pathlib
from typing import Annotated, Any

from study import command_line
from study.command_line import EXAMPLES, Flag

# In the order of the picture. The number is the power of the re-weighting.
ATTENTIONS = ("softmax", "lssa", "lssar-3", "lssar-15")


@dataclasses.dataclass(frozen=True)
class Options:
    """Everything a run depends on; the values here are those of `--preset full`."""

    corpus: Annotated[
        pathlib.Path, Flag("xz text, `== year | who | party` a speech")
    ] = EXAMPLES / "data" / "sotu.txt.xz"
    vocabulary: Annotated[
        pathlib.Path, Flag("xz BPE vocabulary; of it the first 256 entries, the bytes")
    ] = EXAMPLES / "data" / "tekken_240911.vocab.xz"
    cache: Annotated[pathlib.Path, Flag("folder of the token ids")] = pathlib.Path(
        "runs/cache"
    )
    attentions: Annotated[
        tuple[str, ...], Flag("what to compare", choices=ATTENTIONS)
    ] = ATTENTIONS
    length: Annotated[int, Flag("tokens of a training sequence", least=8)] = 64
    factor: Annotated[
        int, Flag("test sequences are so many times as long", least=2)
    ] = 16
    width: Annotated[int, Flag("features of a token")] = 128
    layers: Annotated[int, Flag("transformer blocks")] = 2
    heads: Annotated[int, Flag("attention heads; must divide the width evenly")] = 4
    rotary: Annotated[bool, Flag("rotary positions, else none")] = True
    steps: Annotated[int, Flag("optimiser steps of each model")] = 600
    batch: Annotated[int, Flag("sequences a step")] = 32
    learning_rate: Annotated[float, Flag("peak, after the warm-up")] = 0.003
    evaluate_every: Annotated[int, Flag("steps between held-out evaluations")] = 100
    test_sequences: Annotated[int, Flag("long held-out sequences")] = 64
    aligned_lengths: Annotated[
        tuple[int, ...], Flag("numbers of keys around one that matches")
    ] = (64, 128, 256, 512, 1024, 2048, 4096)
    seed: Annotated[
        int, Flag("decides the initial weights and the batches", least=0)
    ] = 0
    out: Annotated[
        pathlib.Path, Flag("folder of checkpoints, numbers and the picture")
    ] = pathlib.Path("runs/length-extrapolation")
    fresh: Annotated[bool, Flag("delete the run in --out and start anew")] = False


PRESETS: dict[str, dict[str, Any]] = {
    "full": {},
    "smoke": {
        "attentions": ("softmax", "lssar-15"),
        "length": 16,
        "factor": 4,
        "width": 32,
        "layers": 1,
        "heads": 2,
        "steps": 40,
        "batch": 16,
        "learning_rate": 1e-2,
        "evaluate_every": 20,
        "test_sequences": 8,
        "aligned_lengths": (64, 256),
        "out": pathlib.Path("runs/length-extrapolation-smoke"),
    },
}

# What a checkpoint depends on. A run resumes only when all of these are the same.
IDENTITY = (
    "length",
    "width",
    "layers",
    "heads",
    "rotary",
    "steps",
    "batch",
    "learning_rate",
    "evaluate_every",
    "seed",
)


def parse(arguments: list[str] | None = None) -> Options:
    return command_line.parse(
        Options,
        arguments,
        presets=PRESETS,
        program="length_extrapolation.py",
        description="Train small character models with softmax and with softplus "
        "attention on short sequences and test them on long ones.",
        about_presets="full: minutes on two CPU cores; smoke: seconds, for the tests "
        "(default: full)",
        contradiction=_contradiction,
    )


def _contradiction(o: Options) -> str | None:
    if o.width % o.heads:
        return f"--heads must divide --width, got {o.heads} and {o.width}"
    if o.width // o.heads % 2:
        return (
            "--width / --heads must be even (rotary embedding), got "
            f"{o.width} / {o.heads}"
        )
    if "softmax" not in o.attentions:
        return (
            "--attentions must contain softmax, which the others are compared with, "
            f"got {','.join(o.attentions)}"
        )
    return None
