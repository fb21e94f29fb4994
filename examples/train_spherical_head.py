#!/usr/bin/env python3
"""Train an output layer of 380,000 classes at a cost that does not see them.

    python examples/train_spherical_head.py

takes minutes on two CPU cores, leaves numbers and a picture in `runs/spherical-head`.
Start reading at `spherical_head_model/session.py`; the lines that use softlib are in
`spherical_head_model/model.py`.
"""

import sys

from spherical_head_model.options import parse
from study import program


def main(arguments: list[str] | None = None) -> int:
    return program.run(parse(arguments), "spherical_head_model.session")


if __name__ == "__main__":
    sys.exit(main())
