#!/usr/bin/env python3
"""Teach small models by the predictions of larger ones, glyphs and a language model.

    python examples/distillation.py

takes minutes on two CPU cores and leaves numbers and a picture in `runs/distillation`.
Start reading at `distillation_study/session.py`; the lines that use softlib are in
`distillation_study/glyph_losses.py`, `text_losses.py` and `memory.py`.
"""

import sys

from distillation_study.options import parse
from study import program


def main(arguments: list[str] | None = None) -> int:
    return program.run(parse(arguments), "distillation_study.session")


if __name__ == "__main__":
    sys.exit(main())
