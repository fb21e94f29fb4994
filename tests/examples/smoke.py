"""Runs of the examples' smoke presets in processes of their own."""

import json
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np

from tests import children


def command(script: pathlib.Path, *arguments: object) -> list[str]:
    return [sys.executable, str(script), "--preset", "smoke", *map(str, arguments)]


def finish(script: pathlib.Path, *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(script, *arguments),
        capture_output=True,
        text=True,
        env=children.environment(),
    )


def complete_run(
    script: pathlib.Path,
    out: pathlib.Path,
    *arguments: object,
) -> tuple[pathlib.Path, dict[str, Any], str]:
    """A run that is to succeed in silence: folder, metrics and what it printed."""
    done = finish(script, "--out", out, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return out, json.loads((out / "metrics.json").read_text()), done.stdout


def colours(pixels: np.ndarray, levels: int = 15) -> int:
    """The number of colours, each part of a colour rounded to one of a few levels."""
    rounded = (pixels.reshape(-1, 3) * levels).round().astype(np.int64)
    # As numbers: rows would be compared entry by entry, which takes seconds.
    return len(np.unique(rounded @ (levels + 1) ** np.arange(3)))
