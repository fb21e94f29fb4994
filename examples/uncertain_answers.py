#!/usr/bin/env python3
"""Does a language model know when it is wrong? One greedy answer, or ten samples.

    make study NAME=uncertain_answers

asks SmolLM2-135M (`make smollm2` installs it) what kinds of things there are, compares
scores of its uncertainty with what WordNet says, and takes half an hour on two busy CPU
cores. Start reading at `uncertain_answers_study/session.py`; the lines that use softlib
are in `uncertain_answers_study/sampling.py` and `scores.py`.
"""

import sys

from study import program
from uncertain_answers_study.options import parse


def main(arguments: list[str] | None = None) -> int:
    return program.run(parse(arguments), "uncertain_answers_study.session")


if __name__ == "__main__":
    sys.exit(main())
