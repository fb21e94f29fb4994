"""What a study leaves behind: numbers as JSON, a picture; both whole or not at all."""

import contextlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
from language_model.failures import Failure, reason
from matplotlib.figure import Figure

mpl.use("Agg")

# Okabe and Ito's palette: told apart with every common form of colour blindness.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
SKY, GREY, BLACK = "#56B4E9", "#888888", "#222222"


def make_folder(path: pathlib.Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Failure(f"cannot use --out {path}: {reason(error)}.") from error


def write_json(path: pathlib.Path, content: Any) -> None:
    text = json.dumps(content, indent=1, default=str) + "\n"
    _replace(path, lambda partial: partial.write_text(text, "utf-8"))


def save_picture(figure: Figure, path: pathlib.Path) -> None:
    _replace(path, lambda partial: figure.savefig(partial, dpi=110, format="png"))


def _replace(path: pathlib.Path, write: Callable[[pathlib.Path], Any]) -> None:
    """Writes beside `path`, then renames: a reader sees the old file or the new one."""
    partial = path.with_name(path.name + ".partial")
    try:
        write(partial)
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise Failure(f"cannot write {path}: {reason(error)}.") from error
