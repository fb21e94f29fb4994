#!/usr/bin/env python3
"""Find triples that sum to zero: pairwise attention against tensor attention.

    python examples/triple_detection.py

takes minutes on two CPU cores and leaves numbers and a picture in
`runs/triple-detection`. Start reading at `triple_detection_model/session.py`; the lines
that use softlib are in `triple_detection_model/model.py` and `hand_set.py`.
"""

import sys

from study import program
from triple_detection_model.options import parse


def main(arguments: list[str] | None = None) -> int:
    return program.run(parse(arguments), "triple_detection_model.session")


if __name__ == "__main__":
    sys.exit(main())
