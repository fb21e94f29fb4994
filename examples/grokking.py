#!/usr/bin/env python3
"""Modular addition: where training stops by rounding, and what makes it go on.

    python examples/grokking.py

takes minutes on two CPU cores and leaves numbers and a picture in `runs/grokking`.
Start reading at `grokking_study/session.py`; the lines that use softlib are in
`grokking_study/methods.py`.
"""

import sys

from grokking_study.options import parse
from study import program


def main(arguments: list[str] | None = None) -> int:
    return program.run(parse(arguments), "grokking_study.session")


if __name__ == "__main__":
    sys.exit(main())
