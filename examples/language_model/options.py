"""The command line: presets give defaults, every number is a flag.

Imports neither jax nor the corpus, so that `--help` and a wrong number answer at once.
"""

import argparse
import dataclasses
import math
import pathlib
from collections.abc import Callable
from typing import Any

EXAMPLES = pathlib.Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Options:
    """Everything a run depends on; the values here are those of `--preset demo`."""

    corpus: pathlib.Path = EXAMPLES / "data" / "sotu.txt.xz"
    vocabulary: pathlib.Path = EXAMPLES / "data" / "tekken_240911.vocab.xz"
    vocabulary_size: int = 0
    train_years: tuple[int, int] = (1950, 1990)
    held_out_years: tuple[int, int] = (1991, 2021)
    cache: pathlib.Path = pathlib.Path("runs/cache")

    width: int = 64
    layers: int = 2
    heads: int = 4
    feed_forward: int = 176
    context: int = 64

    loss: str = "softlib"
    steps: int = 480
    batch: int = 2
    learning_rate: float = 5e-3
    warmup: int = 10
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0

    evaluate_every: int = 120
    evaluation_tokens: int = 8_192
    checkpoint_every: int = 120
    compare: int = 60
    memory_chart: bool = True

    prompt: str = "Mr. Speaker, Mr. Vice President, Members of Congress:"
    sample_tokens: int = 40
    temperature: float = 0.8

    out: pathlib.Path = pathlib.Path("runs/demo")
    fresh: bool = False


PRESETS: dict[str, dict[str, Any]] = {
    "demo": {},
    "full": {
        "train_years": (1790, 1990),
        "width": 256,
        "layers": 6,
        "heads": 8,
        "feed_forward": 704,
        "context": 256,
        "steps": 4000,
        "batch": 16,
        "learning_rate": 2e-3,
        "warmup": 100,
        "evaluate_every": 200,
        "evaluation_tokens": 65_536,
        "checkpoint_every": 200,
        "compare": 100,
        "sample_tokens": 80,
        "out": pathlib.Path("runs/full"),
    },
    "smoke": {
        "train_years": (1985, 1990),
        "held_out_years": (1991, 1992),
        "vocabulary_size": 1_024,
        "width": 16,
        "layers": 1,
        "heads": 2,
        "feed_forward": 32,
        "context": 16,
        "steps": 12,
        "batch": 4,
        "learning_rate": 3e-2,
        "warmup": 2,
        "evaluate_every": 4,
        "evaluation_tokens": 512,
        "checkpoint_every": 4,
        "compare": 12,
        "sample_tokens": 8,
        "out": pathlib.Path("runs/smoke"),
    },
}

# What a checkpoint depends on. A run resumes only when all of these are the same.
IDENTITY = (
    "vocabulary_size",
    "train_years",
    "width",
    "layers",
    "heads",
    "feed_forward",
    "context",
    "loss",
    "steps",
    "batch",
    "learning_rate",
    "warmup",
    "weight_decay",
    "clip",
    "seed",
)


METAVARS = {int: "N", float: "X", str: "TEXT", tuple: "FIRST-LAST"}


def parse(arguments: list[str] | None = None) -> Options:
    """Options from the command line; a wrong one ends the program with one line."""
    # The preset first: it decides the defaults that --help shows.
    first = OneLineParser(add_help=False)
    first.add_argument("--preset", choices=PRESETS, default="demo")
    preset = first.parse_known_args(arguments)[0].preset
    defaults = dataclasses.replace(Options(), **PRESETS[preset])
    parser = _parser(preset, defaults)
    values = vars(parser.parse_args(arguments))
    del values["preset"]
    options = Options(**values)
    if problem := _contradiction(options):
        parser.error(problem)
    return options


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message} (--help lists every option)\n")


def _parser(preset: str, defaults: Options) -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="train_language_model.py",
        description="Train a decoder transformer with a 130,072-entry vocabulary on "
        "the State of the Union addresses, with softlib's memory-efficient loss. "
        "Run the same command again to resume.",
        epilog=f"Defaults shown are those of --preset {preset}. Exit codes: 0 done, "
        "2 something outside the program was wrong (one line says what), 130 / 143 "
        "stopped by Ctrl-C / SIGTERM after writing a checkpoint.",
    )
    # Only so that --help lists it; its value was read before.
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default=preset,
        help="demo: minutes on two CPU cores; full: the whole corpus, for an "
        "accelerator (a day or more on two cores); smoke: seconds, for the tests "
        "(default: demo)",
    )

    def add(group, name: str, kind: Callable[[str], Any], text: str, **more) -> None:
        value = getattr(defaults, name)
        group.add_argument(
            "--" + name.replace("_", "-"),
            type=kind,
            default=value,
            help=f"{text} (default: {_shown(value)})",
            **{"metavar": METAVARS.get(type(value), "PATH"), **more},
        )

    data = parser.add_argument_group("corpus")
    add(data, "corpus", pathlib.Path, "xz text, one `== year | who | party` a speech")
    add(data, "vocabulary", pathlib.Path, "xz BPE vocabulary, base64 in rank order")
    add(
        data,
        "vocabulary_size",
        integer(0),
        "keep only the first ranks of the vocabulary (at least 256); 0 keeps all",
    )
    add(data, "train_years", _years, "speeches to train on")
    add(data, "held_out_years", _years, "speeches to evaluate on")
    add(data, "cache", pathlib.Path, "folder of the token ids, named by content")

    model = parser.add_argument_group("model")
    add(model, "width", integer(1), "features of a token")
    add(model, "layers", integer(1), "transformer blocks")
    add(model, "heads", integer(1), "attention heads; must divide the width evenly")
    add(model, "feed_forward", integer(1), "features inside the gated MLP")
    add(model, "context", integer(2), "tokens of a sequence")

    training = parser.add_argument_group("training")
    add(
        training,
        "loss",
        str,
        "softlib streams over the vocabulary; optax forms all logits",
        choices=("softlib", "optax"),
        metavar="{softlib,optax}",
    )
    add(training, "steps", integer(1), "optimiser steps of the whole run")
    add(training, "batch", integer(1), "sequences a step")
    add(training, "learning_rate", _positive, "peak, after the warm-up")
    add(training, "warmup", integer(0), "steps of linear warm-up, then a cosine")
    add(training, "weight_decay", _number, "of the matrices inside the blocks")
    add(training, "clip", _positive, "largest global norm of the gradient")
    add(training, "seed", integer(0), "decides the initial weights and the batches")

    watch = parser.add_argument_group("evaluation and report")
    add(watch, "evaluate_every", integer(1), "steps between held-out evaluations")
    add(watch, "evaluation_tokens", integer(1), "held-out tokens of an evaluation")
    add(watch, "checkpoint_every", integer(1), "steps between checkpoints")
    add(
        watch,
        "compare",
        integer(0),
        "then train the first steps once more, with the other loss at the same seed, "
        "and report how far the curves are apart; 0 does not",
    )
    watch.add_argument(
        "--memory-chart",
        action=argparse.BooleanOptionalAction,
        default=defaults.memory_chart,
        help="compile both losses at several sizes and chart their memory (default: "
        f"{'yes' if defaults.memory_chart else 'no'})",
    )
    add(watch, "prompt", str, "start of the generated text")
    add(watch, "sample_tokens", integer(0), "length of the generated text")
    add(watch, "temperature", _positive, "of the generated text")

    place = parser.add_argument_group("output")
    add(place, "out", pathlib.Path, "folder of checkpoints, metrics and the picture")
    place.add_argument(
        "--fresh",
        action="store_true",
        help="delete the run in --out and start anew instead of resuming it",
    )
    return parser


def _contradiction(o: Options) -> str | None:
    if o.width % o.heads:
        return f"--heads must divide --width, got {o.heads} and {o.width}"
    if o.width // o.heads % 2:
        return (
            "--width / --heads must be even (rotary embedding), got "
            f"{o.width} / {o.heads}"
        )
    if o.warmup >= o.steps:
        return f"--warmup must be below --steps, got {o.warmup} and {o.steps}"
    if 0 < o.vocabulary_size < 256:
        return (
            "--vocabulary-size must be 0 or at least 256 (the single bytes), got "
            f"{o.vocabulary_size}"
        )
    (a, b), (c, d) = o.train_years, o.held_out_years
    if max(a, c) <= min(b, d):
        return (
            f"--train-years and --held-out-years must not overlap, got {a}-{b} "
            f"and {c}-{d}"
        )
    return None


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return "-".join(map(str, value))
    if isinstance(value, pathlib.Path) and value.is_relative_to(EXAMPLES):
        return str(value.relative_to(EXAMPLES.parent))
    return str(value)


# argparse turns ArgumentTypeError into "argument --x: message".
def integer(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text.replace("_", ""))
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(
                f"must be an integer of at least {least}, got {text!r}"
            )
        return value

    return parse


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(
            f"must be a finite number of at least 0, got {text!r}"
        )
    return value


def _positive(text: str) -> float:
    value = _number(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text!r}")
    return value


def _years(text: str) -> tuple[int, int]:
    first, dash, last = text.partition("-")
    if not (dash and first.isdigit() and last.isdigit() and int(first) <= int(last)):
        raise argparse.ArgumentTypeError(
            f"must look like 1950-1990, first year not after the last, got {text!r}"
        )
    return int(first), int(last)
