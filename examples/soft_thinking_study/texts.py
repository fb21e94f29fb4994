"""The texts: passages of addresses, and answers that the model writes itself."""

import re

import numpy as np
from language_model.failures import Failure
from smollm2 import answers
from smollm2.checkpoints import Pretrained
from study.packed_text import read_text

from .options import Options

QUESTIONS = (
    "Why is the sky blue?",
    "How does a bicycle stay upright?",
    "What should I cook for dinner tonight?",
    "Explain how rain forms.",
    "Tell me a short story about a lighthouse.",
    "What makes a good friend?",
    "How do I learn a new language?",
    "Why do leaves change colour in autumn?",
    "Describe a busy market.",
    "What is the purpose of a constitution?",
    "How can I sleep better?",
    "What is the difference between a lake and a sea?",
    "Give me advice for a job interview.",
    "How do computers store numbers?",
    "Why do people tell stories?",
    "What happens when water boils?",
    "Plan a weekend in a quiet village.",
    "What is music made of?",
    "How do birds find their way?",
    "Write a letter to a future self.",
    "What causes the seasons?",
    "How do I keep a small garden?",
    "What is a fair game?",
    "Why is history worth reading?",
    "Describe the taste of bread.",
    "How does a bridge carry its load?",
    "What would you take to a desert island?",
    "Explain what money is for.",
    "How do plants grow from seeds?",
    "What makes a city pleasant to live in?",
    "Tell me about a journey by train.",
    "How should one disagree politely?",
)


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
