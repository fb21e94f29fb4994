#!/usr/bin/env python3
"""Teach a language model preferences from noisy pairs, and make it forget a speech.

    python examples/preference_tuning.py

takes minutes on two CPU cores and leaves numbers and a picture in
`runs/preference-tuning`. Start reading at `preference_tuning_model/session.py`; the
lines that use softlib are in `preference_tuning_model/model.py`.
"""

import sys

from preference_tuning_model.options import parse
from study import program


def main(arguments: list[str] | None = None) -> int:
    return program.run(parse(arguments), "preference_tuning_model.session")


if __name__ == "__main__":
    sys.exit(main())
