"""Runs workers: one for each target, and another one where a compiler has aborted."""

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator

from . import worker
from .cases import chosen
from .compiled import Compiled

LIMIT = 300.0  # seconds for one program


def compile_all(
    target: str, family: str, name: str, every: int = 1
) -> Iterator[Compiled]:
    """All cases of the target; a case that ends its process is an error of its own."""
    cases = chosen(family, name, target, every)
    done = 0
    while done < len(cases):
        for compiled in _answers(target, family, name, str(every), str(done)):
            yield compiled
            done += 1
        if done < len(cases):
            case = cases[done]
            reason = f"the compiler gave no answer within {LIMIT:.0f} s, or aborted"
            yield Compiled(case.family, case.name, target, reason)
            done += 1


def _answers(target: str, *which: str) -> Iterator[Compiled]:
    with tempfile.TemporaryDirectory() as dumps:
        process = subprocess.Popen(
            [sys.executable, "-m", worker.__name__, target, dumps, *which],
            env=worker.environment(dumps),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdout is not None
        with process:
            while True:
                alarm = threading.Timer(LIMIT, process.kill)
                alarm.start()
                try:
                    line = process.stdout.readline()
                finally:
                    alarm.cancel()
                if not line:
                    return
                yield Compiled.of(json.loads(line))
