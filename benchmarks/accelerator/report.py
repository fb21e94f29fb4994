"""The report of a run: Markdown for an issue, and JSON with every number."""

import dataclasses
import json
import statistics
from collections.abc import Iterator
from typing import Any

from benchmarks.report import mebibytes, table

from .outcome import Outcome, Time

MOST_CHARACTERS = 60


@dataclasses.dataclass(frozen=True)
class Report:
    """The outcomes of a run so far.

    Attributes:
        device: As `device.describe` found it.
        is_dry: Whether interpreters ran the kernels, at tiny sizes.
        planned: Number of cases.
        outcomes: Of those that are done.
    """

    device: dict[str, Any]
    is_dry: bool
    planned: int
    outcomes: tuple[Outcome, ...] = ()

    @property
    def faults(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if not outcome.is_right]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Report":
        values = json.loads(text)
        outcomes = tuple(map(Outcome.of, values.pop("outcomes")))
        return cls(**values, outcomes=outcomes)


def markdown(report: Report) -> str:
    name = "a dry run" if report.is_dry else report.device["kind"]
    parts = [
        "<!-- Written by `make bench-accelerator`; do not edit. -->",
        f"## Kernels of softlib on {name}",
        *_dry(report),
        ", ".join(f"{key} {value}" for key, value in _machine(report).items()) + ".",
        _summary(report),
        *_faults(report),
        *_checks(report),
        *_times(report),
        *_tiles(report),
    ]
    return "\n\n".join(parts) + "\n"


def _dry(report: Report) -> Iterator[str]:
    if report.is_dry:
        yield (
            "**Dry: no kernel ran on a device.** Interpreters on a CPU ran them at "
            "tiny sizes; what is counted are kernels of the same programs lowered for "
            "a TPU and a Hopper GPU. The times mean nothing."
        )


def _machine(report: Report) -> dict[str, Any]:
    return {"devices": report.device["devices"], **report.device["machine"]}


def _summary(report: Report) -> str:
    done, wrong = len(report.outcomes), len(report.faults)
    text = f"{done} of {report.planned} cases, {done - wrong} right, {wrong} not."
    return text if done == report.planned else f"{text} **The run was not finished.**"


def _faults(report: Report) -> Iterator[str]:
    if report.faults:
        yield "### What is wrong"
        yield "\n".join(f"- {o.case}: {_line(o.verdict)}" for o in report.faults)


def _checks(report: Report) -> Iterator[str]:
    """A row for each result that was compared."""
    checked = [o for o in report.outcomes if o.case.check]
    if checked:
        yield "### Results against float64"
        yield (
            "*Kernels* are those in the program of the forward pass, and of it with "
            "its gradients. *Largest* is the largest error by the largest value, "
            "*norm* that of all errors by that of all values; both of the worst result."
        )
        header = ("computation", "dtype", "size", "verdict", "kernels")
        rows = map(_check_cells, checked)
        yield table((*header, "largest", "norm", "s"), rows)


def _check_cells(outcome: Outcome) -> tuple[str, ...]:
    case = outcome.case
    worst = [max(column) for column in zip(*outcome.errors, strict=True)] or [None] * 2
    verdict = _line(outcome.verdict)
    if len(verdict) > MOST_CHARACTERS:
        verdict = f"{verdict[: MOST_CHARACTERS - 3]}..."
    return (
        _problem(outcome),
        case.dtype,
        case.size,
        verdict,
        ", ".join(map(str, outcome.kernels)) or "-",
        *("-" if x is None else f"{x:.1e}" for x in worst),
        f"{outcome.seconds:.0f}",
    )


def _times(report: Report) -> Iterator[str]:
    timed = [o for o in report.outcomes if o.times]
    if not timed:
        return
    yield "### Times"
    yield (
        "In turn in one process. *By plain JAX* is the median over the rounds of the "
        "time by that of `softlib xla` in the same round, with the sign interval of "
        "that median. *Of peak* is what the definition must multiply, or move, by the "
        "peak of the device. *Differs* is the largest difference from the results of "
        "`softlib xla`, by their largest value."
    )
    header = ("computation", "program", "ms", "by plain JAX", "of peak")
    rows = [
        (f"{_problem(o)}, {time.pass_}", *_time_cells(time))
        for o in timed
        for time in o.times
    ]
    yield table((*header, "scratch MiB", "differs"), rows)


def _time_cells(time: Time) -> tuple[str, ...]:
    if not time.seconds:
        return time.program, _line(time.reason or "-"), *4 * "-"
    against = "-"
    if time.ratio is not None:
        median, low, high = time.ratio
        against = f"{median:.2f} ({low:.2f} to {high:.2f})"
    scratch, differs = time.temporary_bytes, time.difference
    return (
        time.program,
        f"{1e3 * statistics.median(time.seconds):.3g}",
        against,
        time.of_peak,
        "-" if scratch is None else mebibytes(scratch),
        "-" if differs is None else f"{differs:.1e}",
    )


def _tiles(report: Report) -> Iterator[str]:
    lines = [
        f"- {outcome.case}: {'; '.join(outcome.tiles)}"
        for outcome in report.outcomes
        if outcome.tiles and (outcome.case.size == "shipped" or outcome.times)
    ]
    if lines:
        yield "### Tiles"
        yield "\n".join(lines)


def _problem(outcome: Outcome) -> str:
    imitated = outcome.case.imitated
    return f"{outcome.case.problem} ({imitated})" if imitated else outcome.case.problem


def _line(text: str) -> str:
    return " ".join(text.replace("|", "/").split())
