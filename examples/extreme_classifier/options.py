"""The command line of `train_extreme_classifier.py`."""

import dataclasses
import pathlib
from typing import Annotated, Any

from study import command_line
from study.command_line import Flag

EXAMPLES = pathlib.Path(__file__).resolve().parents[1]
NOUNS = EXAMPLES / "data" / "wordnet_nouns.tsv.xz"
OBJECTIVES = ("softmax", "decoupled", "one-versus-all", "sampled", "top-k")


@dataclasses.dataclass(frozen=True)
class Options:
    """Everything a run depends on; the values here are those of `--preset full`."""

    nouns: Annotated[pathlib.Path, Flag("xz text: lemmas, parents, gloss a line")] = (
        NOUNS
    )
    objectives: Annotated[
        tuple[str, ...], Flag("the losses to compare", choices=OBJECTIVES)
    ] = OBJECTIVES
    items: Annotated[int, Flag("definitions, at random")] = 82_192
    held_out: Annotated[int, Flag("of these, not trained on")] = 4000
    least: Annotated[int, Flag("definitions that a label must have")] = 5
    most: Annotated[
        float, Flag("largest share of the definitions that a label may have")
    ] = 0.05
    words: Annotated[int, Flag("words of a definition that are read")] = 24
    buckets: Annotated[int, Flag("rows of the table that words are hashed to")] = 16_384
    width: Annotated[int, Flag("features of words, queries and labels")] = 64
    batch: Annotated[int, Flag("definitions a step")] = 256
    steps: Annotated[int, Flag("optimiser steps of each objective")] = 400
    learning_rate: Annotated[float, Flag("peak, after the warm-up")] = 0.01
    evaluate_every: Annotated[int, Flag("steps between evaluations")] = 100
    k: Annotated[int, Flag("of the soft top-k loss")] = 10
    sampled: Annotated[int, Flag("labels drawn a step by the sampled loss")] = 512
    refreshes: Annotated[
        tuple[int, ...],
        Flag("points of a cluster, after each refresh of the clusters in turn"),
    ] = (1, 1, 2, 4, 8, 16)
    refresh_steps: Annotated[int, Flag("steps from one refresh to the next")] = 200
    mining_rate: Annotated[
        float, Flag("peak learning rate of the triplets, after every refresh")
    ] = 0.1
    probes: Annotated[
        int, Flag("definitions in which hard negatives are searched for")
    ] = 4096
    seed: Annotated[int, Flag("decides weights, batches and draws", least=0)] = 0
    out: Annotated[
        pathlib.Path, Flag("folder of checkpoints, numbers and the picture")
    ] = pathlib.Path("runs/extreme-classifier")
    fresh: Annotated[bool, Flag("delete the run in --out and start anew")] = False


PRESETS: dict[str, dict[str, Any]] = {
    "full": {},
    "smoke": {
        "objectives": ("softmax", "decoupled"),
        "items": 2500,
        "held_out": 400,
        "least": 20,
        "buckets": 2048,
        "width": 32,
        "batch": 128,
        "steps": 60,
        "learning_rate": 0.03,
        "evaluate_every": 30,
        "sampled": 64,
        "refreshes": (1, 64),
        "refresh_steps": 20,
        "mining_rate": 0.03,
        "probes": 512,
        "out": pathlib.Path("runs/extreme-classifier-smoke"),
    },
}

# What a checkpoint depends on. A run resumes only when all of these are the same.
IDENTITY = (
    "items",
    "held_out",
    "least",
    "most",
    "words",
    "buckets",
    "width",
    "batch",
    "steps",
    "learning_rate",
    "evaluate_every",
    "k",
    "sampled",
    "refreshes",
    "refresh_steps",
    "mining_rate",
    "seed",
)


def parse(arguments: list[str] | None = None) -> Options:
    return command_line.parse(
        Options,
        arguments,
        presets=PRESETS,
        program="train_extreme_classifier.py",
        description="Train a classifier of WordNet's definitions among thousands of "
        "labels with several losses, and with batches of clusters.",
        about_presets="full: minutes on two CPU cores; smoke: seconds, for the tests "
        "(default: full)",
        contradiction=_contradiction,
    )


def _contradiction(o: Options) -> str | None:
    if len(set(o.objectives)) < len(o.objectives):
        return f"--objectives must name none twice, got {','.join(o.objectives)}"
    if o.most > 1:
        return f"--most must be a share of at most 1, got {o.most:g}"
    if o.held_out + max(o.probes, o.batch) > o.items:
        return (
            "--items must be at least --held-out and --probes or --batch together, "
            f"got {o.items}"
        )
    return None
