"""Starts, asks and ends the process of PyTorch; whatever goes wrong is a reason."""

import json
import pathlib
import subprocess
import sys
import tempfile
import threading
from typing import Any

import jax
import numpy as np

from .cases import Case, as_float

WORKER = pathlib.Path(__file__).with_name("torch_worker.py")
NAMES = ("torch", "torch.compile", "torch linear_cross_entropy")
LAYOUT = 0  # torch's linear layers hold (V, D)
LIMIT = 300.0  # seconds for one answer; torch.compile may take a minute
SLOW = 12.0  # seconds of one call, above which a program is not timed in turns


class TorchProcess:
    """Use as a context manager, so that the process ends.

    Attributes:
        version: Of torch, if it runs.
        reasons: Why a program cannot run, by name; None if it can.
    """

    def __init__(self, interpreter: str = sys.executable):
        self.version: str | None = None
        self.reasons: dict[str, str | None] = {}
        self._folder = tempfile.TemporaryDirectory()
        self._process: subprocess.Popen[str] | None = None
        try:
            self._process = subprocess.Popen(
                [interpreter, str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            greeting: Any = self._answer()
        except OSError as error:
            greeting = {"error": f"{type(error).__name__}: {error.strerror}"}
        self.version = greeting.get("version")
        if self.version is None:
            self._stop(greeting["error"])

    def __enter__(self) -> "TorchProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop("ended")
        self._folder.cleanup()

    @property
    def process(self) -> int | None:
        return self._process.pid if self._process else None

    def load(self, case: Case, operands: tuple[jax.Array, ...]) -> None:
        """Hands over the operands, of layout (V, D); updates `reasons`."""
        if self._process is None:
            return
        assert case.vocab_axis == LAYOUT
        path = pathlib.Path(self._folder.name, "operands.npz")
        hidden, weight, labels = operands
        np.savez(
            path,
            hidden=as_float(hidden),
            weight=as_float(weight),
            labels=np.asarray(labels),
        )
        answer = self._ask(do="load", path=str(path), dtype=case.dtype, limit=SLOW)
        self.reasons = self.reasons if answer is None else answer
        path.unlink()

    def times(self) -> dict[str, float]:
        """Seconds of each program that runs."""
        return self._ask(do="time") or {}

    def gradients(self) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Loss and both gradients of each program that runs."""
        path = pathlib.Path(self._folder.name, "gradients.npz")
        self._ask(do="gradients", path=str(path))
        if not path.exists():
            return {}
        with np.load(path) as arrays:
            names = [name for name in NAMES if f"{name}/loss" in arrays]
            parts = ("loss", "hidden", "weight")
            found = {n: tuple(arrays[f"{n}/{part}"] for part in parts) for n in names}
        path.unlink()
        return found

    def _ask(self, **command: str | float) -> Any:
        if self._process is None:
            return None
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
            answer: Any = self._answer()
        except OSError as error:
            answer = {"error": f"{type(error).__name__}: {error.strerror}"}
        if answer and "error" in answer:
            self._stop(answer["error"])
            return None
        return answer

    def _answer(self) -> Any:
        assert self._process is not None
        assert self._process.stdout is not None
        alarm = threading.Timer(LIMIT, self._process.kill)
        alarm.start()
        try:
            line = self._process.stdout.readline()
        finally:
            alarm.cancel()
        if not line:
            return {"error": f"its process ended with {self._process.wait()}"}
        return json.loads(line)

    def _stop(self, reason: str) -> None:
        self.reasons = dict.fromkeys(NAMES, reason)
        if self._process is not None:
            with self._process as process:  # closes its pipes and waits
                process.kill()
            self._process = None
