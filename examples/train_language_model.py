#!/usr/bin/env python3
"""Train a decoder transformer with a 130,072-entry vocabulary on real text.

    python examples/train_language_model.py

takes minutes on two CPU cores and leaves metrics, checkpoints and a picture in
`runs/demo`; `--preset full` is the whole corpus, for an accelerator. The loss never
forms the (tokens, vocabulary) logits; `--loss optax` does, for comparison. Start
reading at `language_model/session.py`; the lines that use softlib are in
`language_model/objective.py`.
"""

import sys

from language_model.options import parse
from study import program


def main(arguments: list[str] | None = None) -> int:
    return program.run(parse(arguments), "language_model.session")


if __name__ == "__main__":
    sys.exit(main())
