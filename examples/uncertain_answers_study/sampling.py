"""A greedy answer and samples to each question, scored by the head that wrote them.

The questions share what they begin with: it is read once, and its cache is repeated.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from smollm2 import answers
from smollm2.checkpoints import Pretrained
from smollm2.model import Cache

from softlib import decoding, scoring

from .questions import ENDS


class Answers(NamedTuple):
    """Answers of any leading shape with their scores.

    Attributes:
        tokens: (..., L), -1 behind the end.
        lengths: Number of tokens, the one that ended the answer included.
        nll: Negative log-likelihood of each, in nats.
        entropy: Sum of the entropies of its next-token distributions.
    """

    tokens: Any
    lengths: Any
    nll: Any
    entropy: Any


class Asked(NamedTuple):
    """To B questions: one greedy answer each, and S samples, (B, S)."""

    greedy: Answers
    samples: Answers


def ends(pretrained: Pretrained) -> tuple[int, ...]:
    """Tokens that end an answer: those of the model, and all that end a clause."""
    size = pretrained.model.config.vocabulary_size
    texts = pretrained.tokenizer.decode_batch([[token] for token in range(size)])
    ending = (i for i, text in enumerate(texts) if any(end in text for end in ENDS))
    return tuple(sorted({*ending, *pretrained.stop}))


def ask(
    pretrained: Pretrained,
    shown: str,
    questions: Sequence[str],
    key: jax.Array,
    *,
    samples: int,
    max_length: int,
    width: int,
    stop: tuple[int, ...],
) -> Asked:
    """Answers to some questions.

    Args:
        pretrained: The model.
        shown: What all questions begin with.
        questions: The rest of each.
        key: Of `jax.random`.
        samples: S, sampled answers to each.
        max_length: L, the most tokens of an answer.
        width: Room for the tokens of a question.
        stop: Tokens that end an answer.
    """
    vocabulary = pretrained.model.config.vocabulary_size
    begin = np.array(answers.encoded(pretrained, [shown]), np.int32)
    tokens, lengths = answers.padded(
        answers.encoded(pretrained, questions), vocabulary=vocabulary, multiple=width
    )
    graph, state = nnx.split(pretrained.model)
    return jax.device_get(
        _asked(graph, samples, max_length, stop, state, begin, tokens, lengths, key)
    )


@functools.partial(jax.jit, static_argnums=range(4))
def _asked(graph, samples, max_length, stop, state, begin, tokens, lengths, key):
    model = nnx.merge(graph, state)
    batch, width = tokens.shape
    size = begin.shape[1] + width + max_length
    read = model.prefill(begin, jnp.array([begin.shape[1]]), size=size)
    cache = model.extend(tokens, _repeated(read.cache, batch)).cache
    # The last token of a question is read again: its logits are those of an answer.
    cache = cache._replace(lengths=begin.shape[1] + lengths - 1)
    last = tokens[jnp.arange(batch), lengths - 1]

    def step(token, cache):
        read = model.extend(token[:, None], cache)
        return read.logits[:, 0], read.cache

    def written(last, cache, key):
        first, after = step(last, cache)
        found = decoding.generate(
            step, after, first, key=key, max_length=max_length, stop=stop
        )
        given = jnp.concatenate([last[:, None], found.tokens[:, :-1]], axis=1)
        logits = model.extend(jnp.maximum(given, 0), cache).logits
        where = jnp.arange(max_length)[None] < found.lengths[:, None]
        labels = jnp.where(where, found.tokens, 0)
        return Answers(
            found.tokens,
            found.lengths,
            scoring.greedy_nll(logits, where=where)
            if key is None
            else scoring.sequence_nll(logits, labels, where=where),
            scoring.sequence_entropy(logits, where=where),
        )

    greedy = written(last, cache, None)
    many = written(jnp.repeat(last, samples), _repeated(cache, samples), key)
    apart = lambda array: array.reshape(batch, samples, *array.shape[1:])
    return Asked(greedy, jax.tree.map(apart, many))


def _repeated(cache: Cache, count: int) -> Cache:
    """Each sequence so many times, beside each other."""
    return Cache(
        jnp.repeat(cache.key, count, axis=1),
        jnp.repeat(cache.value, count, axis=1),
        jnp.repeat(cache.lengths, count),
    )
