"""The command line of `simplex_flow.py`."""

import dataclasses
import pathlib
from typing import Annotated, Any

from study import command_line
from study.command_line import Flag

EXAMPLES = pathlib.Path(__file__).resolve().parents[1]
SITES = EXAMPLES / "data" / "human_5ss_counts.txt.xz"


@dataclasses.dataclass(frozen=True)
class Options:
    """Everything a run depends on; the values here are those of `--preset full`."""

    sites: Annotated[pathlib.Path, Flag("xz text, `SEQUENCE COUNT` a line")] = SITES
    common: Annotated[
        int, Flag("count in the genome from which a site is common: the class to reach")
    ] = 500
    # Of ten pairs of beta and decay the one whose samples from the exact denoiser were
    # nearest to the sites. With the 2 and 3 of `softlib.decoding` these lack more bits
    # than letters drawn on their own: 1.16 against 0.99 for 20,000 sequences.
    beta: Annotated[float, Flag("inverse size of the noise of the flow")] = 1.5
    tau_max: Annotated[float, Flag("temperature of the flow at time 0")] = 10.0
    decay: Annotated[float, Flag("of the temperature over time 0 to 1")] = 1.0
    width: Annotated[int, Flag("features of the denoiser and of the classifier")] = 256
    layers: Annotated[int, Flag("residual layers of the denoiser")] = 3
    steps: Annotated[int, Flag("optimiser steps of the denoiser")] = 3000
    classifier_steps: Annotated[int, Flag("optimiser steps of the classifier")] = 200
    batch: Annotated[int, Flag("sequences a step")] = 512
    learning_rate: Annotated[float, Flag("peak, after the warm-up")] = 0.002
    evaluate_every: Annotated[int, Flag("steps between held-out evaluations")] = 500
    flow_steps: Annotated[int, Flag("steps of the sampler from time 0 to 1")] = 20
    samples: Annotated[int, Flag("sequences drawn to compare with the data")] = 20_000
    guided_samples: Annotated[int, Flag("sequences drawn at each strength")] = 1000
    guidance_samples: Annotated[
        int, Flag("clean sequences that the gradient of a step is the mean of")
    ] = 10
    strengths: Annotated[
        tuple[int, ...],
        Flag("of guidance, in hundredths; 0 is none and must be first", least=0),
    ] = (0, 5, 10, 20, 40, 80, 160, 320, 640, 1280)
    seed: Annotated[int, Flag("decides weights, batches and draws", least=0)] = 0
    out: Annotated[
        pathlib.Path, Flag("folder of checkpoints, numbers and the picture")
    ] = pathlib.Path("runs/simplex-flow")
    fresh: Annotated[bool, Flag("delete the run in --out and start anew")] = False


PRESETS: dict[str, dict[str, Any]] = {
    "full": {},
    "smoke": {
        "width": 64,
        "layers": 1,
        "steps": 250,
        "classifier_steps": 120,
        "batch": 256,
        "learning_rate": 1e-2,
        "evaluate_every": 125,
        "flow_steps": 8,
        "samples": 1000,
        "guided_samples": 200,
        "guidance_samples": 4,
        "strengths": (0, 50, 400),
        "out": pathlib.Path("runs/simplex-flow-smoke"),
    },
}

# What a checkpoint depends on. A run resumes only when all of these are the same.
IDENTITY = (
    "common",
    "beta",
    "tau_max",
    "decay",
    "width",
    "layers",
    "steps",
    "classifier_steps",
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
        program="simplex_flow.py",
        description="Train a denoiser and a classifier on human splice sites, draw new "
        "ones by a flow on the simplex, and steer them to common ones.",
        about_presets="full: minutes on two CPU cores; smoke: seconds, for the tests "
        "(default: full)",
        contradiction=_contradiction,
    )


def _contradiction(o: Options) -> str | None:
    if o.strengths[0] != 0 or len(set(o.strengths)) < max(2, len(o.strengths)):
        return (
            "--strengths must begin with 0 and name another, none twice, got "
            f"{','.join(map(str, o.strengths))}"
        )
    return None
