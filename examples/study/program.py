"""The end of every script: what it returns, and what a failure or a signal prints."""

import importlib
import signal
import sys
from typing import Any

from language_model.failures import Failure, Interrupted


def run(options: Any, session: str) -> int:
    """Runs `run(options)` of the module `session`; the exit code of the process."""
    # Until training takes the signals over, Ctrl-C ends the process without a traceback
    # (the imports alone take seconds, which is also why they come after the parsing).
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    start = importlib.import_module(session).run
    try:
        start(options)
    except Failure as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 2
    except Interrupted as interruption:
        print(f"stopped: {interruption}", file=sys.stderr)
        return interruption.exit_code
    return 0
