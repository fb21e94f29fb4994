"""The command line of `triple_detection.py`."""

import dataclasses
import pathlib
from typing import Annotated, Any

from study import command_line
from study.command_line import Flag

# In the order of the picture; `deeper` is pairwise attention in two layers.
ATTENTIONS = ("tensor", "pairwise", "deeper")


@dataclasses.dataclass(frozen=True)
class Options:
    """Everything a run depends on; the values here are those of `--preset full`."""

    attentions: Annotated[
        tuple[str, ...], Flag("what to compare", choices=ATTENTIONS)
    ] = ATTENTIONS
    length: Annotated[int, Flag("numbers of a sequence")] = 8
    modulus: Annotated[int, Flag("numbers are added modulo this one", least=2)] = 32
    width: Annotated[int, Flag("features of a token")] = 64
    head_features: Annotated[int, Flag("features of an attention head")] = 16
    tensor_heads: Annotated[int, Flag("heads of tensor attention")] = 4
    pairwise_heads: Annotated[
        int, Flag("heads of pairwise attention, which has fewer parameters a head")
    ] = 8
    mlp_features: Annotated[int, Flag("hidden size of the network per token")] = 128
    steps: Annotated[int, Flag("optimiser steps of each model")] = 2000
    batch: Annotated[int, Flag("new sequences a step")] = 128
    learning_rate: Annotated[float, Flag("peak, after the warm-up")] = 0.005
    evaluate_every: Annotated[int, Flag("steps between evaluations")] = 100
    test_sequences: Annotated[int, Flag("fresh sequences of an evaluation")] = 4096
    seeds: Annotated[
        tuple[int, ...],
        Flag("each decides weights and sequences of one model of each kind", least=0),
    ] = (0, 1, 2)
    hand_set_lengths: Annotated[
        tuple[int, ...],
        Flag("numbers of a sequence for the head that is not trained", least=2),
    ] = (8, 16, 32, 64, 128)
    hand_set_answers: Annotated[int, Flag("answers that it gives at each length")] = (
        4096
    )
    cost_lengths: Annotated[
        tuple[int, ...], Flag("lengths at which time and error are measured", least=2)
    ] = (4, 8, 16, 32, 64, 128, 256, 512)
    repeats: Annotated[int, Flag("runs of a timing, of which the fastest counts")] = 3
    out: Annotated[
        pathlib.Path, Flag("folder of checkpoints, numbers and the picture")
    ] = pathlib.Path("runs/triple-detection")
    fresh: Annotated[bool, Flag("delete the run in --out and start anew")] = False


PRESETS: dict[str, dict[str, Any]] = {
    "full": {},
    "smoke": {
        "attentions": ("tensor", "pairwise"),
        "length": 6,
        "modulus": 16,
        "width": 32,
        "tensor_heads": 2,
        "pairwise_heads": 4,
        "mlp_features": 32,
        "steps": 20,
        "learning_rate": 1e-2,
        "evaluate_every": 10,
        "test_sequences": 256,
        "seeds": (0,),
        "hand_set_lengths": (8,),
        "hand_set_answers": 256,
        "cost_lengths": (32,),
        "repeats": 1,
        "out": pathlib.Path("runs/triple-detection-smoke"),
    },
}

# What a checkpoint depends on. A run resumes only when all of these are the same.
IDENTITY = (
    "length",
    "modulus",
    "width",
    "head_features",
    "tensor_heads",
    "pairwise_heads",
    "mlp_features",
    "steps",
    "batch",
    "learning_rate",
    "evaluate_every",
    "test_sequences",
)


def parse(arguments: list[str] | None = None) -> Options:
    return command_line.parse(
        Options,
        arguments,
        presets=PRESETS,
        program="triple_detection.py",
        description="Train small models with pairwise and with tensor attention to "
        "find triples that sum to zero.",
        about_presets="full: minutes on two CPU cores; smoke: seconds, for the tests "
        "(default: full)",
        contradiction=_contradiction,
    )


def _contradiction(o: Options) -> str | None:
    if "tensor" not in o.attentions:
        return (
            "--attentions must contain tensor, which the others are compared with, "
            f"got {','.join(o.attentions)}"
        )
    for name in ("attentions", "seeds", "hand_set_lengths", "cost_lengths"):
        given = getattr(o, name)
        if len(set(given)) < len(given):
            flag = "--" + name.replace("_", "-")
            return f"{flag} must name none twice, got {','.join(map(str, given))}"
    return None
