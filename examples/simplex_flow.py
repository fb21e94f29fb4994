#!/usr/bin/env python3
"""Draw DNA splice sites by a flow on the simplex, and steer them with a classifier.

    python examples/simplex_flow.py

takes minutes on two CPU cores and leaves numbers and a picture in `runs/simplex-flow`.
Start reading at `simplex_flow_model/session.py`; the lines that use softlib are in
`simplex_flow_model/model.py` and `simplex_flow_model/toy.py`.
"""

import signal
import sys

from language_model.failures import Failure, Interrupted
from simplex_flow_model.options import parse


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    # Until training takes the signals over, Ctrl-C ends the process without a traceback
    # (the imports alone take seconds, which is also why they come after the parsing).
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from simplex_flow_model.session import run

    try:
        run(options)
    except Failure as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 2
    except Interrupted as interruption:
        print(f"stopped: {interruption}", file=sys.stderr)
        return interruption.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
