"""Checks every kernel on the GPU or TPU here, then times it, and writes a report.

Results come first: every kernel in each of its dtypes, forward and with gradients, at
aligned, ragged and large tiles, against float64. What is right is timed in turn with
plain JAX and with the peers that are installed. Each case is a process of its own.
"""

import argparse
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tqdm

from . import process, sweep
from .outcome import Case, Outcome
from .problem import CHECKED, Problem
from .problems import PROBLEMS
from .report import Report, markdown

NO_DEVICE = (
    "JAX finds neither a GPU nor a TPU here; `make bench-accelerator DEVICE=cuda13` "
    "(or cuda12, tpu) installs the jax of a device, and --dry-run needs none."
)
# An interpreter needs a CPU, and no process may wait for a device.
DRY = {"JAX_PLATFORMS": "cpu"}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accelerator", description=__doc__
    )
    parser.add_argument("--only", default="", help="problems with this in their name")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument(
        "--limit", type=float, default=600.0, help="seconds for one case"
    )
    parser.add_argument("--checks", action="store_true", help="check, and time nothing")
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="check nothing: time sizes of tiles and write them for the cost models, "
        "into pallas_kernels/measured/",
    )
    parser.add_argument(
        "--output", type=pathlib.Path, help="folder of the report; benchmarks/"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="kernels of both platforms in interpreters at tiny sizes, on a CPU; the "
        "report goes to build/",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    environment = DRY if options.dry_run else {}
    device = process.run({}, seconds=options.limit, environment=environment)
    if isinstance(device, str):
        print(f"The device could not be asked: {device}", file=sys.stderr)
        return 2
    if device["platform"] == "cpu" and not options.dry_run:
        print(NO_DEVICE, file=sys.stderr)
        return 2
    if options.sweep:
        return sweep.main(options, device, options.limit)
    cases = list(cases_of(options, device["platform"]))
    report = Report(device, options.dry_run, len(cases))
    path = _path(options, device["kind"])
    for so_far in outcomes(report, cases, options.limit, environment):
        report = so_far
        path.with_suffix(".json").write_text(report.to_json())
        path.write_text(markdown(report))
    print(markdown(report), end="")
    if report.outcomes:
        print(f"wrote {path} and {path.with_suffix('.json')}", file=sys.stderr)
    return int(bool(report.faults) or not report.outcomes)


def cases_of(options: argparse.Namespace, platform: str) -> Iterator[Case]:
    """The cases of the run: for each problem its checks, then the one that is timed."""
    for problem in PROBLEMS:
        if options.only not in problem.name:
            continue
        if options.dry_run:
            yield from _dry_cases(problem)
            continue
        dtypes = problem.dtypes[platform]
        for dtype in dtypes:
            yield from (Case(problem.name, dtype, size) for size in CHECKED)
        if not options.checks:
            rounds = options.rounds
            yield Case(problem.name, dtypes[0], "large", check=False, rounds=rounds)


def _dry_cases(problem: Problem) -> Iterator[Case]:
    for platform in ("tpu", "cuda"):
        yield Case(
            problem.name,
            problem.dtypes[platform][0],
            "dry",
            # The interpreter of Mosaic GPU takes seconds for a call.
            rounds=int(platform == "tpu"),
            imitated=platform,
        )


def outcomes(
    report: Report,
    cases: Sequence[Case],
    limit: float,
    environment: Mapping[str, str],
) -> Iterator[Report]:
    """The report after each case."""
    found: list[Outcome] = []
    with tqdm.tqdm(cases, dynamic_ncols=True, disable=None) as bar:
        for case in bar:
            bar.set_description(str(case))
            outcome = outcome_of(case, found, limit, environment)
            found.append(outcome)
            if not outcome.is_right:
                bar.write(f"{case}: {outcome.verdict}", file=sys.stderr)
            yield Report(report.device, report.is_dry, report.planned, tuple(found))


def outcome_of(
    case: Case,
    before: Sequence[Outcome],
    limit: float,
    environment: Mapping[str, str],
) -> Outcome:
    wrong = [
        o
        for o in before
        if (o.case.problem, o.case.dtype) == (case.problem, case.dtype)
        and not o.is_right
    ]
    if wrong and not case.check:
        return Outcome(
            case, f"not timed, as it is not right at its {wrong[0].case.size} size"
        )
    answer = process.run(_fields(case), seconds=limit, environment=environment)
    return Outcome(case, answer) if isinstance(answer, str) else Outcome.of(answer)


def _fields(case: Case) -> dict[str, Any]:
    return dict(vars(case))


def _path(options: argparse.Namespace, kind: str) -> pathlib.Path:
    folder = options.output
    if folder is None:
        folder = process.REPOSITORY / ("build" if options.dry_run else "benchmarks")
    folder.mkdir(parents=True, exist_ok=True)
    name = "dry" if options.dry_run else re.sub(r"\W+", "-", kind.lower()).strip("-")
    return folder / f"accelerator-{name}.md"


if __name__ == "__main__":
    sys.exit(main())
