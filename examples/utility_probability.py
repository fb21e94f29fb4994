#!/usr/bin/env python3
"""From utilities to probabilities: how to choose among pronunciations of a word.

    pip install --no-deps g2p-en==2.1.0     # the weights of a small GRU, 3 MB, once
    make study NAME=utility_probability

takes six minutes on two busy CPU cores. Start reading at
`utility_probability_study/session.py`; the lines that use softlib are in
`utility_probability_study/choices.py`.
"""

import sys

from study import program
from utility_probability_study.options import parse


def main(arguments: list[str] | None = None) -> int:
    return program.run(parse(arguments), "utility_probability_study.session")


if __name__ == "__main__":
    sys.exit(main())
