"""Sparsemax and entmax against the form that sorts, for flat and for peaked scores.

`python -m benchmarks.sparse_softmax` prints a table. Times are those of one thread and
of the processor, which other work on the machine does not lengthen: XLA and NumPy must
not use others, so the program starts itself again with the flag that says so.
"""

import argparse
import dataclasses
import functools
import importlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from softlib import softmax

from .measure import machine, prepare, reason_of
from .report import table

FLAG = "--xla_cpu_multi_thread_eigen=false"
SPREADS = {"flat": 0.01, "normal": 1.0, "peaked": 10.0}

type Map = Callable[[Any], Any]


def sorted_sparsemax(z: jax.Array) -> jax.Array:
    """By sorting and running sums, as in the paper."""
    s = -jnp.sort(-z, axis=-1)
    k = jnp.arange(1, z.shape[-1] + 1, dtype=z.dtype)
    total = jnp.cumsum(s, axis=-1)
    count = (1 + k[None] * s > total).sum(-1, keepdims=True)
    tau = (jnp.take_along_axis(total, count - 1, -1) - 1) / count
    return jnp.maximum(z - tau, 0)


def sorted_entmax15(z: jax.Array) -> jax.Array:
    """By sorting and running moments, as in the paper."""
    z = (z - z.max(-1, keepdims=True)) / 2
    s = -jnp.sort(-z, axis=-1)
    k = jnp.arange(1, z.shape[-1] + 1, dtype=z.dtype)[None]
    mean, square = jnp.cumsum(s, axis=-1) / k, jnp.cumsum(s * s, axis=-1) / k
    tau = mean - jnp.sqrt(jnp.maximum((1 - k * (square - mean**2)) / k, 0))
    count = (tau <= s).sum(-1, keepdims=True)
    return jnp.maximum(z - jnp.take_along_axis(tau, count - 1, -1), 0) ** 2


def softlib_maps() -> dict[str, Map]:
    return {
        "sparsemax": softmax.sparsemax,
        "entmax15": softmax.entmax15,
        "entmax, alpha 1.25": functools.partial(softmax.entmax, alpha=1.25),
        "entmax, alpha 1.7": functools.partial(softmax.entmax, alpha=1.7),
    }


# No alpha but these has a closed form on a given support: entmax is held against that
# of 1.5.
SORTED = {"sparsemax": sorted_sparsemax, "entmax15": sorted_entmax15}


def torch_maps() -> dict[str, Map]:
    """Of the package `entmax`, if it is installed."""
    torch: Any = importlib.import_module("torch")
    entmax: Any = importlib.import_module("entmax")
    torch.set_num_threads(1)
    return {
        "sparsemax": entmax.sparsemax,
        "entmax15": entmax.entmax15,
        "entmax, alpha 1.25": functools.partial(entmax.entmax_bisect, alpha=1.25),
        "entmax, alpha 1.7": functools.partial(entmax.entmax_bisect, alpha=1.7),
    }


@dataclasses.dataclass(frozen=True)
class Line:
    """Milliseconds of the processor for one map of one kind of scores."""

    scores: str
    name: str
    softlib: float
    by_sorting: float
    torch: float | str


def scores(rows: int, classes: int, spread: float) -> np.ndarray:
    random = np.random.default_rng(0)
    return (spread * random.normal(size=(rows, classes))).astype(np.float32)


def milliseconds(call: Callable[[], Any], rounds: int) -> float:
    """The median time of the processor, over all threads of this process."""
    taken = []
    for _ in range(rounds):
        start = time.process_time()
        call()
        taken.append(1e3 * (time.process_time() - start))
    return statistics.median(taken)


def measure(rows: int, classes: int, rounds: int) -> Iterator[Line]:
    peers: dict[str, Map] = {}
    missing = ""
    try:
        peers = torch_maps()
    except ImportError as error:
        missing = reason_of(error)
    for kind, spread in SPREADS.items():
        z = scores(rows, classes, spread)
        slow = {
            name: milliseconds(prepare(program, jnp.asarray(z)).call, rounds)
            for name, program in SORTED.items()
        }
        for name, program in softlib_maps().items():
            own = milliseconds(prepare(program, jnp.asarray(z)).call, rounds)
            torch: float | str = missing
            if name in peers:
                operand = importlib.import_module("torch").from_numpy(z)
                torch = milliseconds(lambda n=name, z=operand: peers[n](z), rounds)
            yield Line(kind, name, own, slow.get(name, slow["entmax15"]), torch)


def markdown(lines: Sequence[Line]) -> str:
    body = [
        [
            line.scores,
            line.name,
            f"{line.softlib:.1f}",
            f"{line.by_sorting:.1f}",
            f"{line.by_sorting / line.softlib:.1f}",
            line.torch if isinstance(line.torch, str) else f"{line.torch:.1f}",
        ]
        for line in lines
    ]
    heads = ["scores", "map", "softlib, ms", "by sorting, ms", "ratio", "entmax, ms"]
    return table(heads, body)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--classes", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args(arguments)
    if FLAG not in os.environ.get("XLA_FLAGS", ""):
        flags = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}".strip()
        command = [sys.executable, "-m", "benchmarks.sparse_softmax"]
        sizes = {"--rows": given.rows, "--classes": given.classes}
        for name, value in {**sizes, "--rounds": given.rounds}.items():
            command += [name, str(value)]
        subprocess.run(command, check=True, env={**os.environ, "XLA_FLAGS": flags})
        return
    for name, value in machine().items():
        print(f"{name}: {value}")
    print(f"{given.rows} rows of {given.classes}, float32, one thread\n")
    print(markdown(list(measure(given.rows, given.classes, given.rounds))))


if __name__ == "__main__":
    main()
