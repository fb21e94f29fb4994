"""What a study leaves behind: numbers as JSON, a picture; both whole or not at all."""

import json
import pathlib
from typing import Any

import matplotlib as mpl
from language_model.failures import Failure, reason
from language_model.whole_file import write_whole
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
    write_whole(path, lambda partial: partial.write_text(text, "utf-8"))


def save_picture(figure: Figure, path: pathlib.Path) -> None:
    write_whole(path, lambda partial: figure.savefig(partial, dpi=110, format="png"))
