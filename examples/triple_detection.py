#!/usr/bin/env python3
"""Find triples that sum to zero: pairwise attention against tensor attention.

    python examples/triple_detection.py

takes minutes on two CPU cores and leaves numbers and a picture in
`runs/triple-detection`. Start reading at `triple_detection_model/session.py`; the lines
that use softlib are in `triple_detection_model/model.py` and `hand_set.py`.
"""

import signal
import sys

from language_model.failures import Failure, Interrupted
from triple_detection_model.options import parse


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    # Until training takes the signals over, Ctrl-C ends the process without a traceback
    # (the imports alone take seconds, which is also why they come after the parsing).
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from triple_detection_model.session import run

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
