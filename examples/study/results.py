"""What a study found, as JSON that a page of the documentation draws from.

`record` writes `metrics.json` in the folder of a run; `make study NAME=...` copies it
to `examples/results/NAME.json`, which is checked in, and `load` reads it there.
"""

import dataclasses
import importlib.metadata
import json
import pathlib
import platform
import time
from typing import Any

import numpy as np

from . import output

RESULTS = pathlib.Path(__file__).parents[1] / "results"
PACKAGES = ("softlib", "jax", "jaxlib", "flax", "optax", "numpy")


class Watch:
    """Counts the seconds of a run from where it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def seconds(self) -> float:
        return round(time.perf_counter() - self._start, 1)


def record(
    out: pathlib.Path, options: Any, findings: dict[str, Any], watch: Watch
) -> None:
    """Writes what was found, with the settings, versions and seconds of the run."""
    settings = dataclasses.asdict(options)
    settings.pop("out", None)
    output.write_json(
        out / "metrics.json",
        {
            "settings": _plain(settings),
            "findings": _plain(findings),
            "versions": {
                "python": platform.python_version(),
                **{name: importlib.metadata.version(name) for name in PACKAGES},
            },
            "seconds": watch.seconds(),
        },
    )


def load(name: str) -> dict[str, Any]:
    """The checked-in result of the study of that name."""
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def _plain(value: Any) -> Any:
    """Without arrays and dataclasses; floats with seven digits."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, pathlib.Path):
        return value.name
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.7g}")
    return value
