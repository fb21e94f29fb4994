#!/usr/bin/env python3
"""Mixtures of tokens as the input of SmolLM2-135M: which of their tokens it follows.

    make study NAME=soft_thinking

feeds SmolLM2-135M (`make smollm2` installs it) concept tokens and other mixtures, and
takes a quarter of an hour on two busy CPU cores. Start reading at
`soft_thinking_study/session.py`; the lines that use softlib are in
`soft_thinking_study/mixtures.py`.
"""

import sys

from soft_thinking_study.options import parse
from study import program


def main(arguments: list[str] | None = None) -> int:
    return program.run(parse(arguments), "soft_thinking_study.session")


if __name__ == "__main__":
    sys.exit(main())
