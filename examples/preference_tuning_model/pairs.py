"""Responses drawn from the model, and an annotator who likes short words.

The reward of a response is a number of its text alone, minus the mean length of its
words in letters, so that anyone can check what was learned. The annotator prefers the
better of two with the probability of Bradley and Terry, sigmoid(difference); a share of
the pairs is then put in the wrong order.
"""

import dataclasses
import re

import jax
import numpy as np
import tiktoken
from language_model.model import LanguageModel

from . import model as model_
from .options import Options

CANDIDATES = 4
WORD = re.compile(r"[A-Za-z]+")


def reward(text: str) -> float:
    """Minus the mean number of letters of a word; 0 without words."""
    words = WORD.findall(text)
    return -sum(map(len, words)) / len(words) if words else 0.0


def rewards(tokens: np.ndarray, prompt: int, tokenizer: tiktoken.Encoding):
    """Of the responses behind prompts of so many tokens, (..., length) -> (...)."""
    flat = tokens.reshape(-1, tokens.shape[-1])[:, prompt:]
    found = [reward(tokenizer.decode(row)) for row in flat.tolist()]
    return np.array(found).reshape(tokens.shape[:-1])


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Drawn responses, before anyone has flipped an order.

    Attributes:
        tokens: (pairs, 2, length): the one that the annotator prefers first.
        flip: (pairs,) uniform numbers; a pair is flipped if its own is below the rate,
            so that a higher rate flips more of the same pairs.
        groups: (groups, 4, length) held-out prompts with several responses.
        rewards: (groups, 4) of these.
    """

    tokens: np.ndarray
    flip: np.ndarray
    groups: np.ndarray
    rewards: np.ndarray

    def flipped(self, per_cent: int) -> np.ndarray:
        """Which pairs are in the wrong order."""
        return self.flip < per_cent / 100


def draw(
    model: LanguageModel,
    prompts: np.ndarray,
    held_out_prompts: np.ndarray,
    tokenizer: tiktoken.Encoding,
    options: Options,
) -> Pairs:
    """Two responses to each prompt to train on, four to each held-out one."""
    key, key_groups = jax.random.split(jax.random.key(options.seed + 1))

    def several(prompts, count, key):
        repeated = np.repeat(prompts, count, axis=0)
        found = model_.respond(model, repeated, options.response, key)
        return found.reshape(len(prompts), count, -1)

    tokens = several(prompts, 2, key)
    groups = several(held_out_prompts, CANDIDATES, key_groups)
    random = np.random.default_rng([options.seed, 1])
    of_pairs = rewards(tokens, options.prompt, tokenizer)
    first = 1 / (1 + np.exp(of_pairs[:, 1] - of_pairs[:, 0]))
    swap = random.uniform(size=len(tokens)) > first
    return Pairs(
        tokens=np.where(swap[:, None, None], tokens[:, ::-1], tokens),
        flip=random.uniform(size=len(tokens)),
        groups=groups,
        rewards=rewards(groups, options.prompt, tokenizer),
    )
