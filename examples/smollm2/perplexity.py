"""How well the model reads text: its perplexity, without an array of logits."""

import functools
import math

import jax
import numpy as np
from flax import nnx

from softlib import losses

from .model import Llama


def perplexity(model: Llama, tokens: np.ndarray) -> float:
    """Of token ids (B, T), each predicted from those before it in its row."""
    graph, state = nnx.split(model)
    return math.exp(float(_mean_loss(graph, state, tokens)))


@functools.partial(jax.jit, static_argnums=0)
def _mean_loss(graph, state, tokens):
    logits = nnx.merge(graph, state)(tokens)
    loss = losses.softmax_cross_entropy(logits[:, :-1], tokens[:, 1:])
    return loss.mean()
