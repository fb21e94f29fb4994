"""Speeches as token ids, and language models of two sizes."""

import jax
import numpy as np
from flax import nnx
from language_model import corpus as corpus_, options as language_model_options
from language_model.model import LanguageModel

from softlib import LinearLogits

from .options import Options

TRAIN_YEARS, HELD_OUT_YEARS = (1945, 1990), (1991, 2021)


def load(options: Options) -> corpus_.Corpus:
    return corpus_.load(
        language_model_options.Options(
            corpus=options.corpus,
            vocabulary=options.vocabulary,
            vocabulary_size=options.tokens,
            train_years=TRAIN_YEARS,
            held_out_years=HELD_OUT_YEARS,
            cache=options.cache,
            context=options.context,
        )
    )


def batches(corpus: corpus_.Corpus, options: Options) -> corpus_.Batches:
    return corpus_.Batches(
        corpus.train, options.text_batch, options.context, options.seed
    )


def held_out(corpus: corpus_.Corpus, options: Options) -> tuple[np.ndarray, np.ndarray]:
    every = corpus_.windows(corpus.held_out, options.context)
    count = min(options.held_out, len(every))
    chosen = every[np.linspace(0, len(every) - 1, count).astype(int)]
    return chosen[:, :-1], chosen[:, 1:]


def teacher(options: Options) -> LanguageModel:
    return _build(options, options.text_teacher_width, options.text_teacher_layers)


def student(options: Options) -> LanguageModel:
    return _build(options, options.text_student_width, 1)


def _build(options: Options, width: int, layers: int) -> LanguageModel:
    return LanguageModel(
        vocabulary_size=options.tokens,
        width=width,
        layers=layers,
        heads=2,
        feed_forward=2 * width,
        rngs=nnx.Rngs(options.seed),
    )


def logits(model: LanguageModel, tokens: jax.Array) -> LinearLogits:
    """With the model's own table, of which a compiled function would return a copy."""
    return LinearLogits(_hidden(model, tokens), model.table)


_hidden = nnx.jit(lambda model, tokens: model(tokens).hidden)
