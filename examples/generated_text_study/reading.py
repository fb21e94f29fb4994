"""Reads texts by the model: the parts of both tests, token by token."""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from smollm2.checkpoints import Pretrained

import softlib
from softlib import LinearLogits

from .options import Options


class Reading(NamedTuple):
    """Numbers of each token (texts, length), given all before it.

    Attributes:
        surprisal: -log p of the token under the model.
        entropy: What the model expects of it.
        variance: Of the surprisal, by the model.
        log_ratio: log p of the token under the model, less that of the shifted one.
    """

    surprisal: Any
    entropy: Any
    variance: Any
    log_ratio: Any


def read(pretrained: Pretrained, tokens: np.ndarray, options: Options) -> Reading:
    """The reading of token ids (texts, prompt + length), a batch at a time."""
    graph, state = nnx.split(pretrained.model)
    parts = [
        jax.device_get(
            _read(
                graph,
                options.prompt,
                state,
                tokens[start : start + options.batch],
                options.temperature,
            )
        )
        for start in range(0, len(tokens), options.batch)
    ]
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _read(graph, prompt, state, tokens, temperature):
    logits = nnx.merge(graph, state)(tokens)[:, prompt - 1 : -1]
    labels = tokens[:, prompt:]
    shifted = LinearLogits(logits.hidden, logits.weight, temperature=temperature)
    surprisal = softlib.logits.token_surprisals(logits, labels)
    other = softlib.logits.token_surprisals(shifted, labels)
    moments = softlib.logits.moments(logits, order=2)
    return Reading(surprisal, moments.mean, moments.variance, other - surprisal)
