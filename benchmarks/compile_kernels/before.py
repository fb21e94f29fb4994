"""Compares programs in plain JAX with those that an older softlib makes of them.

    git worktree add /tmp/old COMMIT
    python -m benchmarks.compile_kernels.before --library /tmp/old

compiles the training steps of `cases_plain` and `cases_plain_attention` with the
folders softlib and pallas_kernels of another checkout and writes
benchmarks/kernels-before.json. `make kernels` has the numbers of this checkout. Both
write the table benchmarks/kernels-before.md.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from unittest import mock

from . import cases_plain, cases_plain_attention, targets, worker
from .case import Case
from .compiled import Compiled
from .report import HEADING, byte_count, from_json, to_json

FOLDER = pathlib.Path(__file__).parents[1]
NUMBERS = FOLDER / "kernels-before.json"
TABLE = FOLDER / "kernels-before.md"
NOW = FOLDER / "kernels.json"
# Packages of the other checkout, and of this one.
_OLD = ("softlib", "pallas_kernels")
_NEW = ("benchmarks", "tests")


def numbers() -> list[Compiled]:
    """The numbers of the older programs, read from the file."""
    return from_json(NUMBERS.read_text()) if NUMBERS.exists() else []


def cases(target: str | None = None) -> list[Case]:
    """The programs with gradients, on a target or on any."""
    every = [*cases_plain.cases(), *cases_plain_attention.cases()]
    return [
        case
        for case in every
        if case.name.endswith(("training step", "gradients"))
        and "(D, V)" not in case.name
        and "sum" not in case.name
        and (target is None or target in case.targets)
    ]


def compile_old(library: pathlib.Path, target: str) -> Iterator[Compiled]:
    """The programs of the other checkout, one process for all of a target."""
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryDirectory() as dumps,
    ):
        for names, root in ((_OLD, library), (_NEW, FOLDER.parent)):
            for name in names:
                pathlib.Path(folder, name).symlink_to(root.resolve() / name)
        # Modules of the folder in which a process starts come first.
        process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.before", "--worker", target, dumps],
            cwd=folder,
            env={
                k: v for k, v in worker.environment(dumps).items() if k != "PYTHONPATH"
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdout is not None
        with process:
            for line in process.stdout:
                yield Compiled.of(json.loads(line))


def markdown(before: Sequence[Compiled], now: Sequence[Compiled]) -> str:
    """A line for each program and target: before, and as it is."""
    old = {compiled.key: compiled for compiled in before}
    new = {compiled.key: compiled for compiled in now}
    lines = [
        "| program | target | before: launches | steps x launches | temporaries "
        "| moved | now: launches | steps x launches | temporaries | moved |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: | --- | ---: | ---: |",
    ]
    for case in cases():
        for target in case.targets:
            key = (case.family, case.name, target)
            cells = [*_cells(old.get(key)), *_cells(new.get(key))]
            lines.append(f"| {case.name} | {target} | {' | '.join(cells)} |")
    return "\n".join([HEADING, "", *lines]) + "\n"


def _cells(compiled: Compiled | None) -> tuple[str, str, str, str]:
    if compiled is None:
        return "?", "?", "?", "?"
    if compiled.error is not None:
        return "-", compiled.error.splitlines()[0][:60], "-", "-"
    loops = ", ".join(
        f"{loop.steps} x {loop.launches}" if loop.launches else f"{loop.steps}"
        for loop in compiled.loops
    )
    launches = f"{compiled.launches:,}" if compiled.launches else "-"
    memory = (byte_count(compiled.temp_bytes), byte_count(compiled.moved_bytes))
    return launches, loops or "-", *memory


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compile_kernels.before",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--library", type=pathlib.Path, required=True, help="another checkout"
    )
    parser.add_argument(
        "--targets", nargs="+", default=cases_plain.MACHINES, choices=targets.TARGETS
    )
    options = parser.parse_args(arguments)
    found = {compiled.key: compiled for compiled in numbers()}
    for target in options.targets:
        for compiled in compile_old(options.library, target):
            print(target, compiled.name, *_cells(compiled), flush=True)
            found[compiled.key] = compiled
            NUMBERS.write_text(to_json(list(found.values())))
    TABLE.write_text(markdown(list(found.values()), from_json(NOW.read_text())))
    return 0


def _work(target: str, dumps: str) -> None:
    # softlib once took the steps of a host with few cores for all platforms. The host
    # of an accelerator has many.
    with mock.patch.object(os, "cpu_count", return_value=64):
        worker.answer(cases(target), target, dumps)


if __name__ == "__main__":
    if sys.argv[1] == "--worker":
        _work(*sys.argv[2:])
    else:
        sys.exit(main())
