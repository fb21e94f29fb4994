#!/usr/bin/env python3
"""Train a decoder transformer with a 130,072-entry vocabulary on real text.

    python examples/train_language_model.py --preset demo

takes minutes on two CPU cores and leaves metrics, checkpoints and a picture in
`runs/demo`. The loss never forms the (tokens, vocabulary) logits; `--loss optax` does,
for comparison. Start reading at `language_model/session.py`; the lines that use softlib
are in `language_model/objective.py`.
"""

import signal
import sys

from language_model.failures import Failure, Interrupted
from language_model.options import parse


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    # Until training takes the signals over, Ctrl-C ends the process without a traceback
    # (the imports alone take seconds, which is also why they come after the parsing).
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from language_model.session import run

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
