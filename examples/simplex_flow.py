#!/usr/bin/env python3
"""Draw DNA splice sites by a flow on the simplex, and steer them with a classifier.

    python examples/simplex_flow.py

takes minutes on two CPU cores and leaves numbers and a picture in `runs/simplex-flow`.
Start reading at `simplex_flow_model/session.py`; the lines that use softlib are in
`simplex_flow_model/model.py` and `simplex_flow_model/toy.py`.
"""

import sys

from simplex_flow_model.options import parse
from study import program


def main(arguments: list[str] | None = None) -> int:
    return program.run(parse(arguments), "simplex_flow_model.session")


if __name__ == "__main__":
    sys.exit(main())
