"""Candidate pronunciations of each word, and the choice among them.

The lines that use softlib.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from softlib import decoding, logits, scoring

from . import gru
from .dictionary import BEGIN, END, Words
from .gru import Parameters


class Candidates(NamedTuple):
    """Sequences that end, (B, N) of them.

    Attributes:
        tokens: (B, N, L) without the end, then -1.
        lengths: (B, N), with the end.
        log_probs: Their log-probabilities.
        utilities: Sums of their logits.
        where: False for a duplicate of an earlier one, or none at all.
    """

    tokens: Any
    lengths: Any
    log_probs: Any
    utilities: Any
    where: Any


@functools.partial(jax.jit, static_argnums=(3, 4))
def search(
    p: Parameters, letters: jax.Array, lengths: jax.Array, beams: int, longest: int
) -> decoding.Beams:
    """The likeliest sequences by beam search; with one beam the greedy ones."""
    first, state = gru.begin(p, gru.encode(p, letters, lengths))
    return decoding.beam_search(
        functools.partial(gru.step, p),
        state,
        first,
        num_beams=beams,
        max_length=longest,
        stop=(END,),
    )


@functools.partial(jax.jit, static_argnums=(4, 5))
def sample(
    p: Parameters,
    key: jax.Array,
    letters: jax.Array,
    lengths: jax.Array,
    count: int,
    longest: int,
) -> jax.Array:
    """Drawn sequences (B, count, L), -1 behind the end."""
    h = jnp.repeat(gru.encode(p, letters, lengths), count, axis=0)
    first, state = gru.begin(p, h)
    found = decoding.generate(
        functools.partial(gru.step, p),
        state,
        first,
        key=key,
        max_length=longest,
        stop=(END,),
    )
    return found.tokens.reshape(len(letters), count, longest)


@jax.jit
def scored(
    p: Parameters, letters: jax.Array, lengths: jax.Array, tokens: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities and utilities (B, N) of sequences (B, N, L), ends included."""
    count, longest = tokens.shape[1:]
    flat = tokens.reshape(-1, longest)
    h = jnp.repeat(gru.encode(p, letters, lengths), count, axis=0)
    before = jnp.concatenate([jnp.full((len(flat), 1), BEGIN), flat[:, :-1]], axis=1)

    def visit(h: jax.Array, token: jax.Array) -> tuple[jax.Array, Any]:
        following, h = gru.step(p, jnp.maximum(token, 0), h)
        return h, following.hidden

    _, hidden = jax.lax.scan(visit, h, before.T)
    value = gru.LinearLogits(hidden.swapaxes(0, 1), p["fc_w"], bias=p["fc_b"])
    where = flat >= 0
    shaped = lambda x: x.reshape(len(letters), count)
    return (
        shaped(logits.sequence_log_probs(value, flat, where=where)),
        shaped(decoding.sequence_utility(value, flat, where=where)),
    )


def candidates(
    p: Parameters, words: Words, tokens: np.ndarray, lengths: np.ndarray
) -> Candidates:
    """Sequences with their scores; of equal ones the first counts."""
    log_probs, utilities = scored(p, words.letters, words.lengths, tokens)
    first = jax.vmap(scoring.identical_groups)(jnp.asarray(tokens))
    where = (np.asarray(first) == np.arange(tokens.shape[1])) & (lengths > 0)
    plain = np.where(tokens == END, -1, tokens)
    return Candidates(
        plain, lengths, np.asarray(log_probs), np.asarray(utilities), where
    )


def most_probable(scores: np.ndarray, found: Candidates, power: float = 0.0):
    """Index of the best candidate by score / length ** power."""
    log_probs = decoding.candidate_log_probs(
        jnp.asarray(scores),
        lengths=found.lengths.clip(1),
        length_power=power,
        where=found.where,
    )
    return np.asarray(log_probs.argmax(-1))


def agreed(
    found: Candidates, gain: np.ndarray, *, power: float, temperature: float
) -> np.ndarray:
    """Index of the candidate of the least Bayes risk under the candidates' law."""
    log_probs = decoding.candidate_log_probs(
        jnp.asarray(found.log_probs),
        lengths=found.lengths.clip(1),
        length_power=power,
        temperature=temperature,
        where=found.where,
    )
    return np.asarray(decoding.minimum_bayes_risk(log_probs, jnp.asarray(gain)))


def of_samples(tokens: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """The same of draws: each weighs the same, a sequence as often as it was drawn."""
    even = jnp.zeros(tokens.shape[:2])
    return np.asarray(decoding.minimum_bayes_risk(even, jnp.asarray(gain)))


def similarity(tokens: np.ndarray, others: np.ndarray) -> np.ndarray:
    """One less the edit distance by the greater length, (B, N) and (B, M): (B, N, M).

    Sequences end at the first -1; two empty ones are equal.
    """
    a, b = tokens[:, :, None], others[:, None]
    long = [(x >= 0).sum(-1) for x in (a, b)]
    shape = np.broadcast_shapes(a.shape, b.shape)[:-1]
    # Distance of the first i symbols to the first j, a row of the table at a time.
    last = [np.full(shape, j, np.int16) for j in range(b.shape[-1] + 1)]
    distance = np.where(long[0] == 0, long[1], 0).astype(np.int16)
    for i in range(1, a.shape[-1] + 1):
        row = [np.full(shape, i, np.int16)]
        for j in range(1, b.shape[-1] + 1):
            change = last[j - 1] + (a[..., i - 1] != b[..., j - 1])
            row.append(np.minimum(np.minimum(last[j], row[-1]) + 1, change))
        last = row
        # A word of i symbols ends here.
        at = np.stack(row, -1)
        found = np.take_along_axis(at, np.broadcast_to(long[1], shape)[..., None], -1)[
            ..., 0
        ]
        distance = np.where(long[0] == i, found, distance)
    return 1 - distance / np.maximum(np.maximum(*long), 1)
