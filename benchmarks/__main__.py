"""Compares the linear cross-entropy with its peers: tables, a figure, raw numbers."""

import argparse
import logging
import pathlib
import sys
from collections.abc import Sequence

from . import correctness, figure, growth, report, speed
from .cases import Case
from .measure import machine
from .results import Results, from_json, to_json
from .torch_process import TorchProcess

REPOSITORY = pathlib.Path(__file__).parents[1]
SHAPES = ((1024, 512, 32_768), (2048, 256, 65_536), (2048, 512, 131_072))
QUICK_SHAPES = ((256, 128, 8_192),)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one small shape, few rounds, nothing else; prints and writes nothing",
    )
    parser.add_argument(
        "--shape",
        type=int,
        nargs=3,
        action="append",
        metavar=("ROWS", "FEATURES", "VOCABULARY"),
        help="a shape to time (repeatable) instead of the usual three",
    )
    parser.add_argument("--dtype", default="float32", help="of the timed shapes")
    parser.add_argument(
        "--rounds", type=int, default=9, help="the most rounds per case"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=20.0,
        help="no further round of a case starts after these, but three are run",
    )
    parser.add_argument(
        "--torch-python",
        default=sys.executable,
        metavar="PATH",
        help="an interpreter that has torch; the one running this by default",
    )
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=REPOSITORY,
        metavar="FOLDER",
        help="where benchmarks/results.* and docs/images/benchmarks.png are written",
    )
    parser.add_argument(
        "--render",
        action="store_true",
        help="measure nothing: tables and figure again from benchmarks/results.json",
    )
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace) -> Results:
    shapes = options.shape or (QUICK_SHAPES if options.quick else SHAPES)
    rounds = min(options.rounds, 3) if options.quick else options.rounds
    with TorchProcess(options.torch_python) as torch:
        speeds = []
        for sizes in shapes:
            for case in speed.layouts_of(Case(*sizes, dtype=options.dtype)):
                _say(f"timing {case.shape}, weight {case.layout}")
                speeds.append(
                    speed.run(case, rounds=rounds, seconds=options.seconds, torch=torch)
                )
        errors = []
        for case in correctness.CASES[: 1 if options.quick else None]:
            _say(f"errors at V = {case.vocabulary}, {case.dtype}")
            errors += correctness.run(case, torch=torch)
        known = machine() | ({"torch": torch.version} if torch.version else {})
    if options.quick:
        return Results(known, speeds, errors, [], [])
    _say("scratch memory of large heads")
    temporaries = growth.heads()
    _say("growth")
    grown = growth.run(rounds=min(rounds, 5), seconds=options.seconds / 2)
    return Results(known, speeds, errors, temporaries, grown)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    # Peers log at every call that their tuning data does not cover.
    logging.getLogger("absl").setLevel(logging.ERROR)
    numbers = options.output / "benchmarks" / "results.json"
    results = from_json(numbers.read_text()) if options.render else measure(options)
    print(report.markdown(results), end="")
    if options.quick:
        return
    numbers.parent.mkdir(parents=True, exist_ok=True)
    numbers.write_text(to_json(results))
    picture = options.output / report.FIGURE
    figure.draw(results, picture)
    page = numbers.with_suffix(".md")
    page.write_text(report.markdown(results, figure=f"../{report.FIGURE}"))
    _say(f"wrote {page}, {numbers} and {picture}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
