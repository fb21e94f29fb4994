"""The command line of `radial_video.py`."""

import dataclasses
import pathlib
from typing import Annotated, Any

from study import command_line
from study.command_line import EXAMPLES, Flag

from .video import FRAMES, PIXELS


@dataclasses.dataclass(frozen=True)
class Options:
    """Everything a run depends on; the values here are those of `--preset full`."""

    video: Annotated[pathlib.Path, Flag("the clip")] = (
        EXAMPLES / "data" / "bigbuckbunny_128x88x160x3.u8diff.xz"
    )
    train_frames: Annotated[
        int, Flag("first frames of the clip; the others are held out")
    ] = 96
    components: Annotated[int, Flag("principal components that stand for a patch")] = 32
    frames: Annotated[int, Flag("frames of a training clip", least=2)] = 8
    extension: Annotated[
        int, Flag("the longer clips have so many times the frames")
    ] = 4
    tube: Annotated[int, Flag("frames for which a place is hidden or visible")] = 4
    hidden_percent: Annotated[int, Flag("share of the patches that are hidden")] = 75
    width: Annotated[int, Flag("features of a token")] = 64
    layers: Annotated[int, Flag("transformer blocks")] = 2
    heads: Annotated[int, Flag("attention heads; must divide the width evenly")] = 4
    block: Annotated[int, Flag("least half width of the radial bands")] = 128
    steps: Annotated[int, Flag("optimiser steps of each of the two models")] = 300
    learning_rate: Annotated[float, Flag("peak, after the warm-up")] = 0.006
    evaluate_every: Annotated[int, Flag("steps between held-out evaluations")] = 50
    draws: Annotated[int, Flag("choices of hidden patches in an evaluation")] = 4
    rank: Annotated[int, Flag("of the adapters of the longer clips")] = 8
    adapter_steps: Annotated[
        int, Flag("optimiser steps of the adapters, on longer clips")
    ] = 40
    adapter_learning_rate: Annotated[float, Flag("their peak")] = 0.01
    cost_frames: Annotated[
        tuple[int, ...], Flag("frames at which memory and time are measured")
    ] = (4, 8, 16, 32, 64)
    repeats: Annotated[int, Flag("runs of a timing, of which the fastest counts")] = 3
    seed: Annotated[int, Flag("decides weights, clips and hidden patches", least=0)] = 0
    out: Annotated[
        pathlib.Path, Flag("folder of checkpoints, numbers and the picture")
    ] = pathlib.Path("runs/radial-video")
    fresh: Annotated[bool, Flag("delete the run in --out and start anew")] = False


PRESETS: dict[str, dict[str, Any]] = {
    "full": {},
    "smoke": {
        "train_frames": 120,
        "components": 8,
        "frames": 4,
        "extension": 1,
        "tube": 2,
        "width": 24,
        "layers": 1,
        "heads": 2,
        "steps": 4,
        "learning_rate": 2e-2,
        "evaluate_every": 4,
        "draws": 1,
        "rank": 2,
        "adapter_steps": 2,
        "cost_frames": (6,),
        "repeats": 1,
        "out": pathlib.Path("runs/radial-video-smoke"),
    },
}

# What a checkpoint depends on. A run resumes only when all of these are the same.
IDENTITY = (
    "train_frames",
    "components",
    "frames",
    "extension",
    "tube",
    "hidden_percent",
    "width",
    "layers",
    "heads",
    "block",
    "steps",
    "learning_rate",
    "evaluate_every",
    "draws",
    "rank",
    "adapter_steps",
    "adapter_learning_rate",
    "seed",
)


def parse(arguments: list[str] | None = None) -> Options:
    return command_line.parse(
        Options,
        arguments,
        presets=PRESETS,
        program="radial_video.py",
        description="Train a small video transformer with dense and with radial "
        "attention and extend it to longer clips.",
        about_presets="full: minutes on two CPU cores; smoke: seconds, for the tests "
        "(default: full)",
        contradiction=_contradiction,
    )


def _contradiction(o: Options) -> str | None:
    if o.width % o.heads:
        return f"--heads must divide --width, got {o.heads} and {o.width}"
    if o.width // o.heads % 2 or o.width // o.heads < 6:
        return (
            "--width / --heads must be even and at least 6 (rotary positions of three "
            f"axes), got {o.width} / {o.heads}"
        )
    if o.hidden_percent > 99:
        return f"--hidden-percent must be below 100, got {o.hidden_percent}"
    if o.frames % o.tube:
        return f"--tube must divide --frames, got {o.tube} and {o.frames}"
    longer, held_out = o.frames * o.extension, FRAMES - o.train_frames
    if held_out < longer or held_out % longer or o.train_frames < longer:
        return (
            "--frames * --extension must divide the held-out frames and be at most "
            f"--train-frames, got {o.frames} * {o.extension}, {held_out} and "
            f"{o.train_frames}"
        )
    if o.components > PIXELS:
        return f"--components must be at most {PIXELS}, got {o.components}"
    return None
