#!/usr/bin/env python3
"""Who wrote a text? Tests of SmolLM2's own text, of human text and of a shifted model.

    make study NAME=detect_generated_text

lets SmolLM2-135M (`make smollm2` installs it) go on from the beginnings of addresses,
tests its texts and those of the speakers, and takes minutes on two CPU cores. Start
reading at `generated_text_study/session.py`; the lines that use softlib are in
`generated_text_study/texts.py` and `reading.py`.
"""

import sys

from generated_text_study.options import parse
from study import program


def main(arguments: list[str] | None = None) -> int:
    return program.run(parse(arguments), "generated_text_study.session")


if __name__ == "__main__":
    sys.exit(main())
