"""The command line of `preference_tuning.py`."""

import dataclasses
import pathlib
from typing import Annotated, Any

from study import command_line
from study.command_line import EXAMPLES, Flag


@dataclasses.dataclass(frozen=True)
class Options:
    """Everything a run depends on; the values here are those of `--preset full`."""

    corpus: Annotated[
        pathlib.Path, Flag("xz text, `== year | who | party` a speech")
    ] = EXAMPLES / "data" / "sotu.txt.xz"
    vocabulary: Annotated[pathlib.Path, Flag("xz BPE vocabulary")] = (
        EXAMPLES / "data" / "tekken_240911.vocab.xz"
    )
    vocabulary_size: Annotated[
        int, Flag("entries of the vocabulary, from its start", least=256)
    ] = 1024
    cache: Annotated[pathlib.Path, Flag("folder of the token ids")] = pathlib.Path(
        "runs/cache"
    )
    context: Annotated[int, Flag("tokens of a window of text", least=8)] = 32
    width: Annotated[int, Flag("features of a token")] = 64
    layers: Annotated[int, Flag("transformer blocks")] = 2
    heads: Annotated[int, Flag("attention heads; must divide the width evenly")] = 4
    steps: Annotated[int, Flag("optimiser steps of the language model")] = 500
    batch: Annotated[int, Flag("windows, or pairs, a step")] = 32
    learning_rate: Annotated[float, Flag("peak, of the language model")] = 0.005
    prompt: Annotated[int, Flag("tokens of real text before a response")] = 8
    response: Annotated[int, Flag("tokens of a response")] = 16
    pairs: Annotated[int, Flag("pairs of responses to train on", least=2)] = 1536
    groups: Annotated[int, Flag("held-out prompts, with four responses each")] = 192
    flips: Annotated[
        tuple[int, ...],
        Flag("per cent of the pairs in the wrong order; 0 must be first", least=0),
    ] = (0, 10, 30)
    beta: Annotated[float, Flag("of the preference losses")] = 1.0
    tuning_steps: Annotated[int, Flag("optimiser steps of each preference loss")] = 144
    tuning_rate: Annotated[float, Flag("peak learning rate of these")] = 0.002
    forget_year: Annotated[
        int, Flag("of the address that is learned and forgotten", least=1991)
    ] = 2015
    memorise_steps: Annotated[int, Flag("steps that learn the address")] = 150
    forget_steps: Annotated[int, Flag("steps that forget it")] = 80
    forget_rate: Annotated[float, Flag("peak learning rate of the forgetting")] = 0.001
    forget_beta: Annotated[float, Flag("of negative preference optimisation")] = 0.1
    evaluate_every: Annotated[int, Flag("steps between evaluations in forgetting")] = 10
    seed: Annotated[int, Flag("decides weights, batches and draws", least=0)] = 0
    out: Annotated[
        pathlib.Path, Flag("folder of checkpoints, numbers and the picture")
    ] = pathlib.Path("runs/preference-tuning")
    fresh: Annotated[bool, Flag("delete the run in --out and start anew")] = False


PRESETS: dict[str, dict[str, Any]] = {
    "full": {},
    "smoke": {
        "vocabulary_size": 512,
        "context": 24,
        "width": 32,
        "layers": 1,
        "heads": 2,
        "steps": 60,
        "batch": 16,
        "learning_rate": 0.02,
        "prompt": 4,
        "response": 8,
        "pairs": 128,
        "groups": 32,
        "flips": (0, 30),
        "tuning_steps": 24,
        "tuning_rate": 0.005,
        "memorise_steps": 60,
        "forget_steps": 20,
        "forget_rate": 0.003,
        "out": pathlib.Path("runs/preference-tuning-smoke"),
    },
}

# What a checkpoint depends on. A run resumes only when all of these are the same; the
# language model itself depends on the first of them alone.
MODEL_IDENTITY = (
    "vocabulary_size",
    "context",
    "width",
    "layers",
    "heads",
    "steps",
    "batch",
    "learning_rate",
    "seed",
)
IDENTITY = (
    *MODEL_IDENTITY,
    "prompt",
    "response",
    "pairs",
    "beta",
    "tuning_steps",
    "tuning_rate",
    "forget_year",
    "memorise_steps",
    "forget_steps",
    "forget_rate",
    "forget_beta",
    "evaluate_every",
)


def parse(arguments: list[str] | None = None) -> Options:
    return command_line.parse(
        Options,
        arguments,
        presets=PRESETS,
        program="preference_tuning.py",
        description="Train a small language model on the State of the Union addresses, "
        "tune it to pairs of which some are in the wrong order, and make it forget one "
        "address.",
        about_presets="full: minutes on two CPU cores; smoke: seconds, for the tests "
        "(default: full)",
        contradiction=_contradiction,
    )


def _contradiction(o: Options) -> str | None:
    if o.width % o.heads or o.width // o.heads % 2:
        return (
            "--width / --heads must be an even integer (rotary embedding), got "
            f"{o.width} / {o.heads}"
        )
    if o.prompt + o.response > o.context + 1:
        return (
            "--prompt and --response must fit into --context + 1, got "
            f"{o.prompt} + {o.response} and {o.context}"
        )
    if o.flips[0] != 0 or len(set(o.flips)) < max(2, len(o.flips)) or max(o.flips) > 49:
        return (
            "--flips must begin with 0 and name another below 50, none twice, got "
            f"{','.join(map(str, o.flips))}"
        )
    if o.pairs < o.batch:
        return f"--pairs must be at least --batch, got {o.pairs} and {o.batch}"
    return None
