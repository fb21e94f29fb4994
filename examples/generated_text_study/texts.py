"""Texts of three authors that go on from the same beginnings."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from language_model.failures import Failure
from smollm2 import answers
from smollm2.checkpoints import Pretrained
from study.packed_text import read_text

from .options import Options

AFTER = 1990  # the addresses of these years
OWN, HUMAN, SHIFTED = "the model itself", "people", "the model, colder"


def written(pretrained: Pretrained, options: Options) -> dict[str, np.ndarray]:
    """Token ids (texts, prompt + length) of each author; the prompts are the same."""
    human = windows(pretrained, options)
    prompts = human[:, : options.prompt]
    key = jax.random.key(options.seed)
    # One object, so that all batches share a program.
    colder = functools.partial(jnp.multiply, 1 / options.temperature)
    found = {HUMAN: human}
    for i, (author, processors) in enumerate({OWN: (), SHIFTED: (colder,)}.items()):
        parts = []
        for start in tqdm.trange(
            0, options.texts, options.batch, desc=author, disable=None
        ):
            batch_key = jax.random.fold_in(jax.random.fold_in(key, i), start)
            generated = answers.write(
                pretrained,
                prompts[start : start + options.batch].tolist(),
                max_length=max(options.lengths),
                cache_size=human.shape[1],
                key=batch_key,
                processors=processors,
                stop=(),
            )
            parts.append(np.asarray(generated.tokens))
        found[author] = np.concatenate([prompts, np.concatenate(parts)], axis=1)
    return found


def windows(pretrained: Pretrained, options: Options) -> np.ndarray:
    """Stretches of late addresses, drawn at random, of prompt + length tokens."""
    text, _ = read_text(options.corpus)
    fields = re.split(r"^== (\d{4}) \|.*\n", text, flags=re.MULTILINE)[1:]
    late = [
        speech
        for year, speech in zip(fields[::2], fields[1::2], strict=True)
        if int(year) > AFTER
    ]
    size = options.prompt + max(options.lengths)
    found = []
    for speech in late:
        tokens = pretrained.tokenizer.encode(speech.strip()).ids
        tokens = tokens[: len(tokens) // size * size]
        found.append(np.array(tokens, np.int32).reshape(-1, size))
    every = np.concatenate(found)
    if len(every) < options.texts:
        raise Failure(
            f"{options.corpus} has {len(every)} stretches of {size} tokens after "
            f"{AFTER}, fewer than --texts {options.texts}."
        )
    order = np.random.default_rng(options.seed).permutation(len(every))
    return every[order[: options.texts]]
