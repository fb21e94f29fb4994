"""Compiles training steps of an 8 B decoder for many devices, none of which is needed.

Prints what each device exchanges, computes and keeps in a step, and what that is
against the links that makers of devices state.
"""

import argparse
import dataclasses
import itertools
import pathlib
import platform
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata

from benchmarks.accelerator import process
from benchmarks.compile_kernels import targets

from . import report, worker
from .divisions import DIVISIONS, HEADS
from .model import Model
from .outcome import NUMBERS, Case, Outcome, Results, from_json, to_json

DEVICES = (8, 64, 256)
LIMIT = 1200.0  # seconds for one program
TINY = Model(
    layers=2,
    features=64,
    heads=4,
    key_heads=2,
    head_size=16,
    gated=128,
    vocabulary=512,
    length=256,
)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale", description=__doc__
    )
    names = [division.name for division in DIVISIONS]
    parser.add_argument("--devices", nargs="+", type=int, default=DEVICES)
    parser.add_argument("--host", type=int, default=8, help="devices with fast links")
    parser.add_argument("--divisions", nargs="+", default=names, choices=names)
    parser.add_argument("--heads", nargs="+", default=HEADS, choices=HEADS)
    parser.add_argument(
        "--target", default="h100", choices=("h100", "cpu"), help="the compiler"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="a model of two layers, to try the command"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="programs that are compiled at a time"
    )
    parser.add_argument(
        "--texts", type=pathlib.Path, help="a folder to keep the compiled programs in"
    )
    parser.add_argument(
        "--write",
        action="store_true",
        help="write the numbers to benchmarks/scale.json, where those of other cases "
        "stay; `python -m benchmarks.scale.page` makes the page from them",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    reason = None if options.target == "cpu" else targets.missing(options.target)
    if reason is not None:
        print(f"{options.target}: {reason}", file=sys.stderr)
        return 1
    model = TINY if options.tiny else Model()
    cases = [
        Case(division, head, devices, min(options.host, devices), options.target)
        for devices, division, head in itertools.product(
            options.devices, options.divisions, options.heads
        )
    ]

    def compiled(case: Case) -> Outcome:
        found = _outcome(case, model, options.texts)
        print(report.lines(found), flush=True)
        return found

    with ThreadPoolExecutor(options.jobs) as pool:
        outcomes = list(pool.map(compiled, cases))
    if options.write:
        results = Results(model, _versions(), _among(_kept(model), outcomes))
        NUMBERS.write_text(to_json(results))
    wrong = sum(each.error is not None for each in outcomes)
    print(f"{len(outcomes)} programs compiled, {wrong} failed", file=sys.stderr)
    return int(bool(wrong))


def _outcome(case: Case, model: Model, texts: pathlib.Path | None) -> Outcome:
    job = {
        "case": dataclasses.asdict(case),
        "model": dataclasses.asdict(model),
        "text": None if texts is None else str(texts.absolute() / f"{case.name}.txt"),
    }
    found = process.run(
        job,
        seconds=LIMIT,
        environment=worker.environment(case),
        command=(sys.executable, "-m", worker.__name__),
    )
    return Outcome(case, found) if isinstance(found, str) else Outcome.of(found)


def _kept(model: Model) -> Sequence[Outcome]:
    """Outcomes of the same model and the same versions, which stay."""
    if not NUMBERS.exists():
        return ()
    old = from_json(NUMBERS.read_text())
    same = old.model == model and old.versions == _versions()
    return old.outcomes if same else ()


def _among(old: Sequence[Outcome], new: Sequence[Outcome]) -> tuple[Outcome, ...]:
    """The new outcomes and the old ones of other cases, in the order of the table."""
    found = {each.case: each for each in (*old, *new)}
    names = [division.name for division in DIVISIONS]

    def place(case: Case) -> tuple[int, int, int]:
        return case.devices, names.index(case.division), HEADS.index(case.head)

    known = (case for case in found if case.division in names)
    return tuple(found[case] for case in sorted(known, key=place))


def _versions() -> dict[str, str]:
    packages = ("jax", "jaxlib", "jax-cuda13-plugin", "optax")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "missing"
    return found


if __name__ == "__main__":
    sys.exit(main())
