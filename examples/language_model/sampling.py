"""Text from the model: the plain way, one full forward pass a token."""

import functools

import jax
import numpy as np
import tiktoken
from flax import nnx

from .model import LanguageModel


def generate(
    model: LanguageModel,
    tokenizer: tiktoken.Encoding,
    *,
    prompt: str,
    tokens: int,
    temperature: float,
    context: int,
    key: jax.Array,
) -> str:
    """Continues `prompt` by `tokens` tokens and returns the continuation.

    The model sees the last `context` tokens, as many as in training. Without a cache of
    keys and values this costs O(context) forward work a token: fine for a sample.
    """
    graph, state = nnx.split(model)
    ids = tokenizer.encode_ordinary(prompt) or tokenizer.encode_ordinary("\n")
    for key_t in jax.random.split(key, tokens):
        seen = ids[-context:]
        window = np.zeros(context, np.int32)
        window[: len(seen)] = seen
        ids.append(int(_next(graph, state, window, len(seen), temperature, key_t)))
    return tokenizer.decode(ids[-tokens:]) if tokens else ""


@functools.partial(jax.jit, static_argnums=0)
def _next(graph, state, window, length, temperature, key):
    model = nnx.merge(graph, state)
    # Causal: what stands behind position length - 1 cannot change it.
    logits = model(window[None])[0, length - 1].materialize()
    return jax.random.categorical(key, logits / temperature)
