"""PyTorch's side of the comparison: a process of its own, driven by lines of JSON.

PyTorch and XLA each keep a pool of threads, which would fight over the cores in one
process. The interpreter may be another one than that of JAX: this file needs only torch
and NumPy. Each line of standard input is a command, each answered by one line:

- `{"do": "load", "path": FILE, "dtype": NAME, "limit": SECONDS}` reads hidden, weight
  (V, D) and labels and runs every program once: `{program: null}`, or why it is left
  out, which one is that fails or takes longer than the limit;
- `{"do": "time"}` runs each in turn: `{program: seconds}`;
- `{"do": "gradients", "path": FILE}` writes `PROGRAM/loss`, `/hidden` and `/weight`.

The first line that it writes is the greeting, `{"version": ...}` or `{"error": ...}`.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

PAUSE = 0.08  # as in measure.py, for the threads of torch to fall asleep
COMPILED = "torch.compile"


class Programs:
    """The programs on the operands of one case, without those that cannot be timed."""

    def __init__(self, torch: Any, path: str, dtype: str, limit: float):
        numpy: Any = importlib.import_module("numpy")
        with numpy.load(path) as arrays:
            hidden, weight = (
                torch.tensor(arrays[name]).to(getattr(torch, dtype)).requires_grad_()
                for name in ("hidden", "weight")
            )
            labels = torch.tensor(arrays["labels"]).long()
        self._torch = torch
        self._operands = (hidden, weight, labels)
        self._losses: dict[str, Callable[..., Any]] = {}
        self.reasons: dict[str, str | None] = {}
        for name, loss in losses(torch).items():
            try:
                self._losses[name] = loss
                if name == COMPILED:
                    self.run(name)  # compiles
                start = time.perf_counter()
                self.run(name)
                seconds = time.perf_counter() - start
                if seconds > limit:
                    raise TimeoutError(f"{seconds:.0f} s a call, not repeated")
                self.reasons[name] = None
            except Exception as error:  # whatever stops a peer is a row of the table
                del self._losses[name]
                first = next(iter(str(error).strip().splitlines()), "")
                self.reasons[name] = f"{type(error).__name__}: {first}"[:100]

    def run(self, name: str) -> tuple[Any, Any, Any]:
        hidden, weight, labels = self._operands
        loss = self._losses[name](hidden, weight, labels)
        return loss, *self._torch.autograd.grad(loss, (hidden, weight))

    def times(self) -> dict[str, float]:
        found = {}
        for name in self._losses:
            start = time.perf_counter()
            result = self.run(name)
            found[name] = time.perf_counter() - start
            del result
            time.sleep(PAUSE)
        return found

    def write_gradients(self, path: str) -> None:
        numpy: Any = importlib.import_module("numpy")
        arrays = {}
        for name in self._losses:
            for part, value in zip(
                ("loss", "hidden", "weight"), self.run(name), strict=True
            ):
                arrays[f"{name}/{part}"] = value.detach().float().numpy()
        numpy.savez(path, **arrays)


def losses(torch: Any) -> dict[str, Callable[..., Any]]:
    functional = torch.nn.functional

    def naive(hidden, weight, labels):
        return functional.cross_entropy(functional.linear(hidden, weight), labels)

    def chunked(hidden, weight, labels):
        function = getattr(functional, "linear_cross_entropy", None)
        options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
        if function is None or options is None:
            raise NotImplementedError(
                "this torch has no linear_cross_entropy in chunks"
            )
        return function(hidden, weight, labels, options=options())

    return {
        "torch": naive,
        COMPILED: torch.compile(naive, dynamic=False),
        "torch linear_cross_entropy": chunked,
    }


def main() -> None:
    # Whatever libraries print goes to standard error: the answers stay parsable.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(content: object) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    try:
        torch: Any = importlib.import_module("torch")
        affinity = getattr(os, "sched_getaffinity", None)
        torch.set_num_threads(len(affinity(0)) if affinity else os.cpu_count() or 1)
    except ModuleNotFoundError as error:
        return answer({"error": f"not installed: {error.name}"})
    except Exception as error:
        return answer({"error": f"{type(error).__name__}: {error}".splitlines()[0]})
    answer({"version": torch.__version__})
    programs = None
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "load":
            del programs  # before the next operands need its memory
            programs = Programs(
                torch, command["path"], command["dtype"], command["limit"]
            )
            answer(programs.reasons)
        elif command["do"] == "time":
            assert programs is not None
            answer(programs.times())
        elif command["do"] == "gradients":
            assert programs is not None
            programs.write_gradients(command["path"])
            answer(None)
    return None


if __name__ == "__main__":
    main()
