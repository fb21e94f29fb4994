#!/usr/bin/env python3
"""Mixtures of tokens as the input of SmolLM2-135M: which of their tokens it follows.

    make smollm2     # installs the weights (93 MB) once
    python examples/soft_thinking.py

takes minutes on two CPU cores and leaves numbers and a picture in
`runs/soft-thinking`. Start reading at `soft_thinking_study/session.py`; the lines that
use softlib are in `soft_thinking_study/mixtures.py`.
"""

import sys

from soft_thinking_study.options import parse
from study import program


def main(arguments: list[str] | None = None) -> int:
    return program.run(parse(arguments), "soft_thinking_study.session")


if __name__ == "__main__":
    sys.exit(main())
