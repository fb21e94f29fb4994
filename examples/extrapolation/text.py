"""The State of the Union addresses as bytes: short batches, long held-out sequences."""

import dataclasses

import numpy as np
from language_model import corpus as corpus_, options as language_model_options

from .options import Options

TRAIN_YEARS, HELD_OUT_YEARS = (1790, 1990), (1991, 2021)
# The first 256 ranks of the vocabulary are the single bytes.
VOCABULARY_SIZE = 256


def load(options: Options) -> corpus_.Corpus:
    """Token ids are bytes, that is characters: the text is 99.98 % ASCII."""
    return corpus_.load(
        language_model_options.Options(
            corpus=options.corpus,
            vocabulary=options.vocabulary,
            vocabulary_size=VOCABULARY_SIZE,
            train_years=TRAIN_YEARS,
            held_out_years=HELD_OUT_YEARS,
            cache=options.cache,
            context=options.length * options.factor,
        )
    )


@dataclasses.dataclass(frozen=True)
class Batches:
    """Sequences from random places, a function of the seed and the step alone."""

    tokens: np.ndarray
    batch: int
    length: int
    seed: int

    def at(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and labels, each (batch, length)."""
        random = np.random.default_rng([self.seed, step])
        starts = random.integers(0, len(self.tokens) - self.length, self.batch)
        found = self.tokens[starts[:, None] + np.arange(self.length + 1)]
        return found[:, :-1], found[:, 1:]


def long_sequences(tokens: np.ndarray, count: int, length: int) -> np.ndarray:
    """(count, length + 1), spread evenly over the held-out text."""
    every = corpus_.windows(tokens, length)
    return every[np.linspace(0, len(every) - 1, min(count, len(every))).astype(int)]
