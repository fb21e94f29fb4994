"""Runs a job in a process of its own, for so long and no longer."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

REPOSITORY = pathlib.Path(__file__).parents[2]
WORKER = (sys.executable, "-m", "benchmarks.accelerator.worker")


def run(
    job: Mapping[str, Any],
    *,
    seconds: float,
    environment: Mapping[str, str],
    command: Sequence[str] = WORKER,
) -> dict[str, Any] | str:
    """The answer; a sentence if there is none.

    Args:
        job: Given to the process as JSON.
        seconds: After these the process and its children are killed.
        environment: Of the process, beside this one's.
        command: The program; it gets the job and the path of a file for its answer.
    """
    with tempfile.TemporaryDirectory() as name:
        answer, printed = pathlib.Path(name, "answer"), pathlib.Path(name, "printed")
        with printed.open("wb") as sink:
            process = subprocess.Popen(
                [*command, json.dumps(job), str(answer)],
                cwd=REPOSITORY,
                env={**os.environ, **environment},
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status = process.wait(seconds)
            except subprocess.TimeoutExpired:
                return f"no answer within {seconds:g} s; killed"
            finally:
                # Children too, such as assemblers; also when this process is stopped.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if status == 0 and answer.exists():
            return json.loads(answer.read_text())
        lines = printed.read_text(errors="replace").strip().splitlines()
        return f"the process ended with {_ending(status)}: {' / '.join(lines[-3:])}"


def _ending(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"status {status}"
