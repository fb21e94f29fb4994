#!/usr/bin/env python3
"""Train on short text, read long text: softmax against softplus attention.

    python examples/length_extrapolation.py

takes minutes on two CPU cores and leaves numbers and a picture in
`runs/length-extrapolation`. Start reading at `extrapolation/session.py`; the lines that
use softlib are in `extrapolation/model.py`.
"""

import sys

from extrapolation.options import parse
from study import program


def main(arguments: list[str] | None = None) -> int:
    return program.run(parse(arguments), "extrapolation.session")


if __name__ == "__main__":
    sys.exit(main())
