"""Softmax and logsumexp beside jax.nn, in and out of the caches of a CPU.

`make bench-softmax` measures in about two minutes and writes benchmarks/softmax.md;
`--quick` prints only. A time is also given as the bandwidth that is reached: the bytes
that must be read and written at least, as a fraction of what a plain read or a plain
write over an array reaches.
"""

import argparse
import dataclasses
import importlib
import pathlib
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from softlib import softmax

from .measure import machine, ratio, reason_of, take_turns
from .report import table

REPOSITORY = pathlib.Path(__file__).parents[1]
SHAPES = ((512, 1024), (4096, 256), (64, 65_536), (1024, 65_536))

type Program = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """Programs that compute the same; the first of them is the yardstick.

    Attributes:
        name: Of what they compute.
        programs: By name.
        donated: Whether the argument may be overwritten.
        limit: The plain pass with the same traffic.
    """

    name: str
    programs: dict[str, Program]
    donated: bool
    limit: str


CASES = (
    Case(
        "logsumexp",
        {
            "jax.nn": lambda x: jax.nn.logsumexp(x, -1),
            "softlib": softmax.logsumexp,
            "softlib two-pass": lambda x: softmax.two_pass_logsumexp(
                x, compensated=False
            ),
        },
        donated=False,
        limit="read",
    ),
    Case(
        "softmax",
        {
            "jax.nn": lambda x: jax.nn.softmax(x, -1),
            "softlib": softmax.softmax,
            "softlib two-pass": lambda x: softmax.two_pass_softmax(
                x, compensated=False
            ),
        },
        donated=False,
        limit="copy",
    ),
    Case(
        "softmax, donated",
        {
            "jax.nn": lambda x: jax.nn.softmax(x, -1),
            "softlib in place": lambda x: softmax.softmax(x, implementation="in_place"),
        },
        donated=True,
        limit="copy in place",
    ),
)
LIMITS: dict[str, tuple[Program, bool]] = {
    "read": (lambda x: x.reshape(-1, 16).sum(0), False),
    "copy": (lambda x: x + 1, False),
    "copy in place": (lambda x: x + 1, True),
}


@dataclasses.dataclass(frozen=True)
class Line:
    """One program at one shape."""

    shape: tuple[int, int]
    case: str
    program: str
    milliseconds: float
    ratio: str
    of_limit: float


def compiled(
    program: Program, scores: jax.Array, *, donated: bool
) -> Callable[[], Any]:
    """A call; where the argument is given up, on a copy that it goes on with."""
    donate = 0 if donated else ()
    run = jax.jit(program, donate_argnums=donate).lower(scores).compile()
    ready = [scores.copy() if donated else scores]

    def call() -> Any:
        found = jax.block_until_ready(run(ready[0]))
        if donated:
            # Its pages stay: what is overwritten next is what was found now.
            ready[0] = jax.tree.leaves(found)[0]
        return found

    call()
    return call


def measure(shape: tuple[int, int], rounds: int) -> list[Line]:
    """Small arrays are repeated more often: a call of theirs is short and varies more.

    The programs of a case read the same array, so that each finds the caches as the
    others do.
    """
    rounds *= max(1, min(25, SHAPES[-1][0] * SHAPES[-1][1] // (shape[0] * shape[1])))
    scores = jax.random.normal(jax.random.key(0), shape, jnp.float32)
    lines = []
    for case in CASES:
        limit, limit_donated = LIMITS[case.limit]
        calls = {"limit": compiled(limit, scores, donated=limit_donated)}
        for name, program in case.programs.items():
            calls[name] = compiled(program, scores, donated=case.donated)
        turns = take_turns(calls, rounds=rounds, pause=0, shuffled=True)
        least = statistics.median(turns.seconds["limit"])
        for name in case.programs:
            seconds = turns.seconds[name]
            found = ratio(seconds, turns.seconds["jax.nn"])
            middle = statistics.median(seconds)
            text = f"{found.median:.2f} ({found.low:.2f}-{found.high:.2f})"
            lines.append(
                Line(shape, case.name, name, 1e3 * middle, text, least / middle)
            )
        lines += torch_lines(shape, case, least, rounds)
    return lines


def torch_lines(
    shape: tuple[int, int], case: Case, least: float, rounds: int
) -> list[Line]:
    """PyTorch in this process, after the others, where it is installed."""
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError as error:
        print(reason_of(error), file=sys.stderr)
        return []
    x = torch.randn(shape)
    name = "logsumexp" if case.name == "logsumexp" else "softmax"
    call = lambda: getattr(torch, name)(x, -1)
    call()
    seconds = take_turns({"torch": call}, rounds=rounds, pause=0).seconds["torch"]
    middle = statistics.median(seconds)
    return [Line(shape, case.name, "PyTorch", 1e3 * middle, "-", least / middle)]


def markdown(lines: Sequence[Line]) -> str:
    known = machine()
    rows = [
        [
            f"{line.shape[0]} x {line.shape[1]}",
            line.case,
            line.program,
            f"{line.milliseconds:.2f}",
            line.ratio,
            f"{line.of_limit:.2f}",
        ]
        for line in lines
    ]
    heads = ["rows", "map", "program", "ms", "x jax.nn", "of the plain pass"]
    parts = [
        "<!-- Written by `make bench-softmax`; do not edit. -->",
        f"Measured on {known['cores']} cores of {known['device']}; jax {known['jax']}, "
        "float32.",
        table(heads, rows),
        "*x* is the time divided by that of jax.nn in the same round, median and sign "
        "interval. The last column is the time of a plain pass with the same traffic "
        "(a read for logsumexp, a copy for softmax, in place where the argument is "
        "donated) by the time of the program.",
    ]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small; prints only")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=pathlib.Path, default=REPOSITORY)
    options = parser.parse_args(arguments)
    shapes = ((32, 64),) if options.quick else SHAPES
    rounds = 3 if options.quick else options.rounds
    page = markdown([line for shape in shapes for line in measure(shape, rounds)])
    print(page, end="")
    if not options.quick:
        (options.output / "benchmarks" / "softmax.md").write_text(page)


if __name__ == "__main__":
    main()
