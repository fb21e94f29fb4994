"""What the model goes on from, and the text that drafts are counted on."""

import re
from typing import NamedTuple

import numpy as np
from language_model.failures import Failure
from smollm2 import answers
from smollm2.checkpoints import Pretrained
from smollm2.questions import QUESTIONS
from study.packed_text import read_text

from .options import Options

LAST = 1990  # year of the latest address that is counted; passages are from later ones
COPY, FREE, CHAT = "copied passage", "address", "answer"


class Texts(NamedTuple):
    """Token ids.

    Attributes:
        prompts: Of each kind of text, a list of prompts.
        counted: The earlier addresses, one array each.
    """

    prompts: dict[str, list[list[int]]]
    counted: list[np.ndarray]


def load(pretrained: Pretrained, options: Options) -> Texts:
    """Prompts of each kind, and the addresses to count."""
    text, _ = read_text(options.corpus)
    fields = re.split(r"^== (\d{4}) \|.*\n", text, flags=re.MULTILINE)[1:]
    speeches = [
        (int(year), speech.strip())
        for year, speech in zip(fields[::2], fields[1::2], strict=True)
    ]
    encode = pretrained.tokenizer.encode
    late = [encode(s).ids for year, s in speeches if year > LAST]
    passages = _passages(late, options)
    # The beginning of the passage once more: what follows is to be copied.
    again = options.passage // 4
    newline = encode("\n\n").ids
    questions = [answers.chat(question) for question in QUESTIONS]
    if options.questions > len(questions):
        raise Failure(f"--questions must be at most {len(questions)}.")
    return Texts(
        {
            COPY: [[*p, *newline, *p[:again]] for p in passages],
            FREE: passages,
            CHAT: answers.encoded(pretrained, questions[: options.questions]),
        },
        [np.array(encode(s).ids) for year, s in speeches if year <= LAST],
    )


def shuffled(counted: list[np.ndarray], seed: int) -> np.ndarray:
    """The addresses in an order of their own, parted by -1, as one text."""
    order = np.random.default_rng(seed).permutation(len(counted))
    return np.concatenate([np.append(counted[i], -1) for i in order])


def _passages(late: list[list[int]], options: Options) -> list[list[int]]:
    """Stretches that do not overlap, drawn at random."""
    size = options.passage
    every = [
        some[start : start + size]
        for some in late
        for start in range(0, len(some) - size + 1, size)
    ]
    if len(every) < options.passages:
        raise Failure(
            f"{options.corpus} has {len(every)} passages of {size} tokens after "
            f"{LAST}, fewer than --passages {options.passages}."
        )
    order = np.random.default_rng(options.seed).permutation(len(every))
    return [every[i] for i in order[: options.passages]]
