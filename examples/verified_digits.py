#!/usr/bin/env python3
"""Which predictions may be trusted? Digits, turned, blurred, in fonts never seen.

    make study NAME=verified_digits

trains ten small networks, decides by seven rules which of their predictions to accept,
and takes three minutes on two busy CPU cores. Start reading at
`verified_digits_study/session.py`; the lines that use softlib are in
`verified_digits_study/network.py` and `rules.py`.
"""

import sys

from study import program
from verified_digits_study.options import parse


def main(arguments: list[str] | None = None) -> int:
    return program.run(parse(arguments), "verified_digits_study.session")


if __name__ == "__main__":
    sys.exit(main())
