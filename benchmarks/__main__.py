"""Runs the benchmarks and prints one Markdown table per case."""

import argparse

from . import linear_cross_entropy
from .measure import machine


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="rounds per case")
    parser.add_argument(
        "--shape",
        type=int,
        nargs=3,
        action="append",
        metavar=("ROWS", "FEATURES", "VOCABULARY"),
        help="a shape to measure (repeatable); two of moderate size by default",
    )
    options = parser.parse_args()
    asked = options.shape or linear_cross_entropy.SHAPES
    shapes = [(rows, features, classes) for rows, features, classes in asked]

    print(f"Loss and both gradients. {machine()}.")
    for case, measurements in linear_cross_entropy.run(shapes, options.rounds):
        print(f"\n{case}\n")
        print("| | ms | ratio | range | scratch MiB |")
        print("| --- | ---: | ---: | ---: | ---: |")
        for m in measurements:
            print(
                f"| {m.name} | {1e3 * m.seconds:.0f} | {m.ratio:.2f} | "
                f"{m.lowest:.2f}-{m.highest:.2f} | {m.temporary_bytes / 2**20:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
