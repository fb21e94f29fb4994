#!/usr/bin/env python3
"""Modular addition: where training stops by rounding, and what makes it go on.

    python examples/grokking.py

takes minutes on two CPU cores and leaves numbers and a picture in `runs/grokking`.
Start reading at `grokking_study/session.py`; the lines that use softlib are in
`grokking_study/methods.py`.
"""

import signal
import sys

from grokking_study.options import parse
from language_model.failures import Failure, Interrupted


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    # Until training takes the signals over, Ctrl-C ends the process without a traceback
    # (the imports alone take seconds, which is also why they come after the parsing).
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from grokking_study.session import run

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
