"""Compiles every kernel for every machine it is written for, none of which is needed.

Says what the compilers say, and fails where a program of softlib is not as promised.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from . import before, report, roofline, sweep, targets
from .case import Case
from .cases import chosen
from .compiled import Compiled, faults
from .process import compile_all
from .report import from_json, row, to_json

NUMBERS = pathlib.Path(__file__).parents[1] / "kernels.json"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compile_kernels", description=__doc__
    )
    parser.add_argument(
        "--targets",
        nargs="+",
        default=targets.TARGETS,
        choices=targets.TARGETS,
        help="machines to compile for; all by default",
    )
    parser.add_argument(
        "--family",
        default="",
        help="only these kernels; `all` adds peers and sizes of tiles not chosen",
    )
    parser.add_argument("--case", default="", help="only cases with this in their name")
    parser.add_argument(
        "--every", type=int, default=1, help="of a target compile every so many-th case"
    )
    parser.add_argument(
        "--jobs", type=int, default=2, help="targets that are compiled at a time"
    )
    parser.add_argument(
        "--write",
        action="store_true",
        help="compile all, or all of --family, and write their numbers and the tables: "
        "benchmarks/kernels.json and kernels*.md",
    )
    parser.add_argument(
        "--render", action="store_true", help="compile nothing: tables from the numbers"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.render:
        _write(chosen("all", ""), from_json(NUMBERS.read_text()))
        return 0
    if options.write:
        options.family, options.case, options.every = options.family or "all", "", 1
    cases = chosen(options.family, options.case)
    by_key = {(c.family, c.name, target): c for c in cases for target in c.targets}
    reasons = {target: targets.missing(target) for target in options.targets}
    possible = [target for target, reason in reasons.items() if reason is None]
    for target, reason in reasons.items():
        if reason is not None:
            print(f"{target}: {reason}", file=sys.stderr)

    def compiled_for(target: str) -> list[Compiled]:
        found = []
        for compiled in compile_all(
            target, options.family, options.case, options.every
        ):
            print(row(compiled), flush=True)
            found.append(compiled)
        return found

    with ThreadPoolExecutor(options.jobs) as pool:
        everything = [c for found in pool.map(compiled_for, possible) for c in found]
    wrong = [
        f"{compiled.target}, {compiled.name}: {fault}"
        for compiled in everything
        for fault in faults(by_key[compiled.key], compiled)
    ]
    for fault in wrong:
        print(fault, file=sys.stderr)
    if options.write:
        every_case = chosen("all", "")
        numbers = _among(from_json(NUMBERS.read_text()), everything, every_case)
        NUMBERS.write_text(to_json(numbers))
        _write(every_case, numbers)
    print(f"{len(everything)} programs compiled, {len(wrong)} faults", file=sys.stderr)
    return int(bool(wrong) or len(possible) < len(options.targets))


def _among(
    old: Sequence[Compiled], new: Sequence[Compiled], cases: Sequence[Case]
) -> list[Compiled]:
    """The new numbers, and the old ones of cases that are not among them."""
    numbers = {compiled.key: compiled for compiled in (*old, *new)}
    keys = [
        (case.family, case.name, target)
        for target in targets.TARGETS
        for case in cases
        if target in case.targets
    ]
    found = [numbers.pop(key) for key in keys if key in numbers]
    return [*found, *numbers.values()]  # of peers that are not installed here


def _write(cases: list[Case], everything: list[Compiled]) -> None:
    pages = {
        "": report.markdown(cases, everything),
        "-roofline": "\n\n".join(
            [report.HEADING, *roofline.markdown(cases, everything)]
        ),
        "-sweep": sweep.markdown(cases, everything),
        "-before": before.markdown(before.numbers(), everything),
    }
    for name, text in pages.items():
        path = NUMBERS.with_name(f"kernels{name}.md")
        path.write_text(text.rstrip() + "\n")


if __name__ == "__main__":
    sys.exit(main())
