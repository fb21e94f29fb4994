"""The command to run when a GPU or a TPU is at hand: right first, then how fast.

`python -m benchmarks.accelerator` compares every kernel with a float64 computation on
the CPU of the same machine, then times it in turn with plain JAX and with the peers.
It writes `benchmarks/accelerator-<device>.md` and a figure. Nothing is timed whose
result is wrong. `--rehearse` does all of it at small sizes on whatever there is.
"""

import argparse
import dataclasses
import logging
import pathlib
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import softlib
from pallas_kernels import _devices
from softlib.testing import assert_close

from .accelerator_problems import PROBLEMS, Problem, Program, Size, gradient_of
from .measure import machine, prepare, ratio, reason_of, take_turns
from .report import mebibytes, table

REPOSITORY = pathlib.Path(__file__).parents[1]
OURS, PLAIN = "softlib", "softlib xla"


@dataclasses.dataclass(frozen=True)
class Row:
    """One program on one problem; `reason` says why there are no numbers."""

    problem: str
    name: str
    seconds: float | None = None
    against_plain: str = "-"
    of_peak: str = "-"
    temporary_bytes: int | None = None
    reason: str | None = None


def passes(problem: Problem) -> list[tuple[str, Callable[[Program], Program], int]]:
    """Name, what makes the program, and its products as a multiple of the forward."""
    step = lambda program: gradient_of(program, problem.differentiated)
    found: list[tuple[str, Callable[[Program], Program], int]] = [
        (problem.name, lambda program: program, 1)
    ]
    if problem.differentiated:
        found.append((f"{problem.name}, gradients", step, 3))
    return found


# -------------------------------------------------------------------------- correctness
def check(problem: Problem) -> list[tuple[str, str]]:
    """What was computed, and `right` or what is wrong."""
    arrays = problem.small.arrays()
    found = []
    for name, pass_, _ in passes(problem):
        try:
            actual = jax.jit(pass_(problem.program(None)))(*arrays)
            definition = problem.definition or problem.program("reference")
            expected = _in_float64(pass_(definition), arrays)
            pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
            for value, wanted in pairs:
                # Sums are in float32: results are rounded to bfloat16 a few times,
                # however long the sums are.
                actual_value = np.asarray(value, np.float64)
                assert_close(actual_value, wanted, dtype=jnp.bfloat16, length=1)
            found.append((name, "right"))
        except Exception as error:  # whatever is wrong is a row of the table
            found.append((name, reason_of(error)))
    return found


def _in_float64(program: Program, arrays: Sequence[jax.Array]) -> Any:
    wide = [np.asarray(x.astype(jnp.float32)) for x in arrays]
    with jax.enable_x64(), jax.default_device(jax.devices("cpu")[0]):
        given = [
            jnp.asarray(w, x.dtype if jnp.issubdtype(x.dtype, jnp.integer) else float)
            for w, x in zip(wide, arrays, strict=True)
        ]
        return jax.tree.map(np.asarray, jax.jit(program)(*given))


# -------------------------------------------------------------------------------- speed
def compare(problem: Problem, size: Size, *, rounds: int) -> list[Row]:
    arrays = size.arrays()
    rows = []
    for name, pass_, factor in passes(problem):
        programs = {
            OURS: problem.program(None),
            PLAIN: problem.program("xla"),
            **problem.peers,
        }
        ready, reasons = {}, {}
        for program_name, program in programs.items():
            try:
                ready[program_name] = prepare(pass_(program), *arrays)
            except Exception as error:  # a peer that cannot run is a row that says so
                reasons[program_name] = reason_of(error)
        calls = {key: value.call for key, value in ready.items()}
        seconds = take_turns(calls, rounds=rounds, pause=0.0, shuffled=True).seconds
        for program_name in programs:
            if program_name in reasons:
                reason = reasons[program_name]
                rows.append(Row(name, program_name, reason=reason))
                continue
            own = seconds[program_name]
            against = ratio(own, seconds[PLAIN]) if PLAIN in seconds else None
            rows.append(
                Row(
                    name,
                    program_name,
                    statistics.median(own),
                    f"{against.median:.2f} ({against.low:.2f} to {against.high:.2f})"
                    if against
                    else "-",
                    _of_peak(size, factor, statistics.median(own)),
                    ready[program_name].temporary_bytes,
                )
            )
    return rows


def _of_peak(size: Size, factor: int, seconds: float) -> str:
    """Of the device: of its products, or of its memory where that bounds more."""
    platform = jax.devices()[0].platform
    device = _devices.tpu() if platform == "tpu" else _devices.gpu()
    if platform == "cpu" or device is None:
        return "-"
    products = factor * size.flops / device.flops
    memory = factor * size.moved / device.bytes_per_second
    which = "products" if products >= memory else "memory"
    return f"{max(products, memory) / seconds:.0%} of {which}"


# --------------------------------------------------------------------------------- page
def markdown(checked: Sequence[tuple[str, str]], rows: Sequence[Row]) -> str:
    known = ", ".join(f"{key} {value}" for key, value in machine().items())
    parts = [
        "<!-- Written by `python -m benchmarks.accelerator`; do not edit. -->",
        f"{known}.",
        table(("computation", "small and ragged, against float64"), checked),
        table(
            ("computation", "program", "ms", "by plain JAX", "of peak", "scratch MiB"),
            map(_cells, rows),
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _cells(row: Row) -> tuple[str, ...]:
    if row.seconds is None:
        return row.problem, row.name, row.reason or "-", "-", "-", "-"
    milliseconds = f"{row.seconds * 1e3:.3g}"
    scratch = "-"
    if row.temporary_bytes is not None:
        scratch = mebibytes(row.temporary_bytes)
    return row.problem, row.name, milliseconds, row.against_plain, row.of_peak, scratch


def draw(rows: Sequence[Row], path: pathlib.Path) -> None:
    """Bars of the time by that of plain JAX."""
    problems = list(dict.fromkeys(row.problem for row in rows))
    figure = Figure((8, 1.2 + 0.7 * len(problems)), layout="constrained")
    axes = figure.subplots()
    for place, problem in enumerate(problems):
        known = [r for r in rows if r.problem == problem and r.seconds is not None]
        plain = next((r.seconds for r in known if r.name == PLAIN), None)
        if plain is None:
            continue
        height = 0.8 / max(len(known), 1)
        for i, row in enumerate(known):
            assert row.seconds is not None
            at = place - 0.4 + (i + 0.5) * height
            color = "C0" if row.name == OURS else "C7"
            axes.barh(at, row.seconds / plain, height, color=color)
            axes.text(row.seconds / plain, at, f" {row.name}", va="center", fontsize=7)
    axes.axvline(1, color="k", lw=0.8)
    axes.set_yticks(range(len(problems)), problems)
    axes.invert_yaxis()
    axes.set_xlabel("time by that of plain JAX (softlib xla); shorter is faster")
    figure.savefig(path, dpi=120)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accelerator", description=__doc__
    )
    parser.add_argument("--only", default="", help="problems with this in their name")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="small sizes only, on a CPU too; prints and writes nothing",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    # Peers log at every call that their tuning data does not cover.
    logging.getLogger("absl").setLevel(logging.ERROR)
    device = jax.devices()[0]
    if device.platform == "cpu" and not options.rehearse:
        print("neither a GPU nor a TPU is at hand; try --rehearse", file=sys.stderr)
        return 2
    checked: list[tuple[str, str]] = []
    rows: list[Row] = []
    for problem in PROBLEMS:
        if options.only not in problem.name:
            continue
        _say(f"checking {problem.name}")
        found = check(problem)
        checked += found
        if any(verdict != "right" for _, verdict in found):
            continue
        size = problem.small if options.rehearse else problem.large
        if not options.rehearse:
            print(softlib.explain(problem.program(None), *size.arrays()))
        _say(f"timing {problem.name}")
        rows += compare(problem, size, rounds=3 if options.rehearse else options.rounds)
    page = markdown(checked, rows)
    print(page, end="")
    if not options.rehearse:
        kind = re.sub(r"\W+", "-", device.device_kind.lower()).strip("-")
        path = REPOSITORY / "benchmarks" / f"accelerator-{kind}.md"
        path.write_text(page)
        draw(rows, path.with_suffix(".png"))
        _say(f"wrote {path}")
    return int(any(verdict != "right" for _, verdict in checked))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
