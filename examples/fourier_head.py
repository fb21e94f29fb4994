#!/usr/bin/env python3
"""Forecast real series as distributions over bins: a linear layer and Fourier heads.

    python examples/fourier_head.py

takes minutes on two CPU cores and leaves numbers and a picture in `runs/fourier-head`.
Start reading at `fourier_head_study/session.py`; the lines that use softlib are in
`fourier_head_study/model.py`.
"""

import sys

from fourier_head_study.options import parse
from study import program


def main(arguments: list[str] | None = None) -> int:
    return program.run(parse(arguments), "fourier_head_study.session")


if __name__ == "__main__":
    sys.exit(main())
