#!/usr/bin/env python3
"""Fewer calls of SmolLM2-135M by drafts that cost nothing: copies, and counted text.

    make study NAME=speculative_decoding

counts the tokens of a call on copied text, addresses and answers, times a few of them
(`make smollm2` installs the model), and takes a quarter of an hour on two busy cores.
Start reading at `speculative_study/session.py`; the lines that use softlib are in
`speculative_study/generation.py` and `law.py`.
"""

import sys

from speculative_study.options import parse
from study import program


def main(arguments: list[str] | None = None) -> int:
    return program.run(parse(arguments), "speculative_study.session")


if __name__ == "__main__":
    sys.exit(main())
