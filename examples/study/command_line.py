"""The command line of a study: a dataclass of options, presets, errors of one line.

Imports neither jax nor data, so that `--help` and a wrong number answer at once.
"""

import argparse
import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Annotated, Any, get_type_hints

from language_model.options import EXAMPLES, OneLineParser, integer

METAVARS = {int: "N", float: "X", tuple: "A,B,..", pathlib.Path: "PATH"}


@dataclasses.dataclass(frozen=True)
class Flag:
    """What annotates a field of an options dataclass that is a flag.

    Fields are ints, positive floats, paths, bools, or tuples of ints or names.

    Attributes:
        text: What `--help` says.
        least: The least integer.
        choices: The names that a tuple may hold; without them it holds integers.
    """

    text: str
    least: int = 1
    choices: tuple[str, ...] = ()


# What `smollm2.session.load` reads, of every study of a language model.
Weights = Annotated[
    pathlib.Path,
    Flag("smollm2, tiny (random, for tests), a GGUF file or a Hugging Face folder"),
]
SMOLLM2 = pathlib.Path("smollm2")


def parse[Options](
    kind: type[Options],
    arguments: list[str] | None,
    *,
    presets: Mapping[str, dict[str, Any]],
    program: str,
    description: str,
    about_presets: str,
    contradiction: Callable[[Options], str | None],
) -> Options:
    """Options from the command line; a wrong one ends the program with one line."""
    # The preset first: it decides the defaults that --help shows.
    first = OneLineParser(add_help=False)
    first.add_argument("--preset", choices=presets, default="full")
    preset = first.parse_known_args(arguments)[0].preset
    parser = OneLineParser(
        prog=program,
        description=f"{description} Run the same command again to resume.",
        epilog=f"Defaults shown are those of --preset {preset}. Exit codes: 0 done, "
        "2 something outside the program was wrong (one line says what), 130 / 143 "
        "stopped by Ctrl-C / SIGTERM after writing a checkpoint.",
    )
    parser.add_argument("--preset", choices=presets, default=preset, help=about_presets)
    for name, annotated in get_type_hints(kind, include_extras=True).items():
        (about,) = annotated.__metadata__
        value = presets[preset].get(name, getattr(kind, name))
        flag = "--" + name.replace("_", "-")
        text = f"{about.text} (default: {_shown(value)})"
        if isinstance(value, bool):
            action = argparse.BooleanOptionalAction
            parser.add_argument(flag, action=action, default=value, help=text)
            continue
        parser.add_argument(
            flag,
            type=_kind(value, about),
            default=value,
            help=text,
            metavar=METAVARS[_type(value)],
        )
    values = vars(parser.parse_args(arguments))
    del values["preset"]
    options = kind(**values)
    if problem := contradiction(options):
        parser.error(problem)
    return options


def _type(value: Any) -> type:
    return pathlib.Path if isinstance(value, pathlib.Path) else type(value)


def _kind(value: Any, about: Flag) -> Callable[[str], Any]:
    if isinstance(value, tuple):
        entry = _name(about.choices) if about.choices else integer(about.least)
        return lambda text: tuple(map(entry, text.split(",")))
    if isinstance(value, pathlib.Path):
        return pathlib.Path
    return integer(about.least) if isinstance(value, int) else _positive


# argparse turns ArgumentTypeError into "argument --x: message".
def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(
            f"must be a finite number above 0, got {text!r}"
        )
    return value


def _name(choices: tuple[str, ...]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(
                f"must be of {', '.join(choices)}, got {text!r}"
            )
        return text

    return parse


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, pathlib.Path) and value.is_relative_to(EXAMPLES):
        return str(value.relative_to(EXAMPLES.parent))
    return str(value)
