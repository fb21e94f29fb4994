"""The texts: passages of addresses, and answers that the model writes itself."""

import re

import numpy as np
from language_model.failures import Failure
from smollm2 import answers
from smollm2.checkpoints import Pretrained
from smollm2.questions import QUESTIONS
from study.packed_text import read_text

from .options import Options


def passages(pretrained: Pretrained, options: Options) -> list[np.ndarray]:
    """Pieces of addresses of equal length, from places that the seed decides."""
    text, _ = read_text(options.corpus)
    text = re.sub(r"^== (\d{4}) \|.*\n", "", text, flags=re.MULTILINE)
    random = np.random.default_rng(options.seed)
    width = 16 * options.context
    found = []
    for start in random.integers(0, len(text) - width, options.passages):
        # From the beginning of a word.
        words = text[start : start + width].partition(" ")[2]
        ids = pretrained.tokenizer.encode(words).ids[: options.context]
        if len(ids) < options.context:
            raise Failure(f"{options.corpus} has a passage of {len(ids)} tokens.")
        found.append(np.array(ids, np.int32))
    return found


def answered(
    pretrained: Pretrained, options: Options
) -> tuple[list[np.ndarray], list[int]]:
    """Questions with the answers to them, and the place at which each answer begins."""
    if options.questions > len(QUESTIONS):
        raise Failure(f"--questions must be at most {len(QUESTIONS)}.")
    prompts = answers.encoded(
        pretrained, [answers.chat(q) for q in QUESTIONS[: options.questions]]
    )
    room = max(map(len, prompts)) + options.answer + 16
    found = answers.write(
        pretrained, prompts, max_length=options.answer, cache_size=room
    )
    rows = zip(
        prompts, np.asarray(found.tokens), np.asarray(found.lengths), strict=True
    )
    texts = [np.array([*p, *row[:length]], np.int32) for p, row, length in rows]
    return texts, [len(prompt) for prompt in prompts]
