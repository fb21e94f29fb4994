"""Runs of the examples' smoke presets in processes of their own."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any


def environment(xla_flags: str | None = None) -> dict[str, str]:
    """This process's, without what would change the devices of the child."""
    kept = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return kept if xla_flags is None else kept | {"XLA_FLAGS": xla_flags}


def command(script: pathlib.Path, *arguments: object) -> list[str]:
    return [sys.executable, str(script), "--preset", "smoke", *map(str, arguments)]


def finish(
    script: pathlib.Path, *arguments: object, xla_flags: str | None = None
) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(script, *arguments),
        capture_output=True,
        text=True,
        env=environment(xla_flags),
    )


def complete_run(
    script: pathlib.Path,
    out: pathlib.Path,
    *arguments: object,
    xla_flags: str | None = None,
) -> tuple[pathlib.Path, dict[str, Any], str]:
    """A run that is to succeed in silence: folder, metrics and what it printed."""
    done = finish(script, "--out", out, *arguments, xla_flags=xla_flags)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return out, json.loads((out / "metrics.json").read_text()), done.stdout
