#!/usr/bin/env python3
"""Naive Bayes or logistic regression: how many examples each needs.

    make study NAME=generative_heads

takes minutes on two busy CPU cores. Start reading at
`generative_heads_study/session.py`; the lines that use softlib are in
`generative_heads_study/heads.py`.
"""

import sys

from generative_heads_study.options import parse
from study import program


def main(arguments: list[str] | None = None) -> int:
    return program.run(parse(arguments), "generative_heads_study.session")


if __name__ == "__main__":
    sys.exit(main())
