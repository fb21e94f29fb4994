#!/usr/bin/env python3
"""Give WordNet's definitions their superordinate concepts: thousands of labels.

    python examples/train_extreme_classifier.py

takes minutes on two CPU cores and leaves numbers and a picture in
`runs/extreme-classifier`. Start reading at `extreme_classifier/session.py`; the lines
that use softlib are in `extreme_classifier/objectives.py` and `mining.py`.
"""

import sys

from extreme_classifier.options import parse
from study import program


def main(arguments: list[str] | None = None) -> int:
    return program.run(parse(arguments), "extreme_classifier.session")


if __name__ == "__main__":
    sys.exit(main())
