"""The State of the Union addresses as windows of tokens."""

import dataclasses

import numpy as np
import tiktoken
from language_model import corpus as corpus_, options as language_model_options

from .options import Options

TRAIN_YEARS, RETAIN_YEARS = (1790, 1990), (1991, 2010)


@dataclasses.dataclass(frozen=True)
class Text:
    """Windows (n, context + 1) of three parts of the corpus.

    Attributes:
        train: Addresses of `TRAIN_YEARS`.
        forget: The one address that is learned and forgotten.
        retain: Addresses of `RETAIN_YEARS`, which are never trained on.
        tokenizer: From tokens to text.
        digest: Of everything that the tokens depend on.
    """

    train: np.ndarray
    forget: np.ndarray
    retain: np.ndarray
    tokenizer: tiktoken.Encoding
    digest: str


def load(options: Options) -> Text:
    def of(years: tuple[int, int]) -> corpus_.Corpus:
        return corpus_.load(
            language_model_options.Options(
                corpus=options.corpus,
                vocabulary=options.vocabulary,
                vocabulary_size=options.vocabulary_size,
                train_years=TRAIN_YEARS,
                held_out_years=years,
                cache=options.cache,
                context=options.context,
            )
        )

    forget, retain = of((options.forget_year,) * 2), of(RETAIN_YEARS)
    windows = lambda tokens: corpus_.windows(tokens, options.context)
    return Text(
        train=windows(forget.train),
        forget=windows(forget.held_out),
        retain=windows(retain.held_out),
        tokenizer=forget.tokenizer,
        digest=forget.digest,
    )


def rows_at(step: int, rows: int, batch: int, seed: int) -> np.ndarray:
    """Which rows make a batch: every epoch sees a row at most once."""
    batch = min(batch, rows)
    epoch, index = divmod(step, rows // batch)
    order = np.random.default_rng([seed, epoch]).permutation(rows)
    return np.sort(order[index * batch :][:batch])
