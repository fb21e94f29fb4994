r"""One head of tensor attention that solves the task with weights written down.

With angles a = 2 pi x / M, cos(a + b + c) is a sum of four products of one factor for
each of the three numbers: a trilinear form of width 4, largest where the sum is zero
modulo M. A fifth feature belongs to a blank on both axes, whose logit lies half a gap
below that of a match. Values are 1, and 0 for the blank, so that the output is the
weight on triples: above 1/2 where one sums to zero.

The gap of the cosine is 2 pi^2 / M^2, so that logits need 2 log2(M) bits: float32, with
24, is still enough at M = 4,096 and not at 16,384.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from softlib.attention import kronecker_attention

from .options import Options
from .task import Sequences

# Of the weight of a match, how much all other pairs together may take.
DELTA = 0.05
AT_ONCE = 16  # sequences
DTYPES = ("float64", "float32")


class Scores(NamedTuple):
    """What the head says to `answers` positions of sequences of `length` numbers.

    Attributes:
        dtype: Of the head.
        length: n, with numbers modulo n^2.
        answers: How many answers it gave.
        positive: The share whose true answer is 1.
        false_positives: Answers above 1/2 that should be 0.
        false_negatives: The other way round.
        least_match: The lowest score where a triple sums to zero.
        most_other: The highest score elsewhere.
    """

    dtype: str
    length: int
    answers: int
    positive: float
    false_positives: int
    false_negatives: int
    least_match: float
    most_other: float


def scores(tokens: np.ndarray, modulus: int, dtype: str) -> np.ndarray:
    """In [0, 1], (B, n): above 1/2 is the answer 1."""
    batch, n = tokens.shape
    gap = 1 - math.cos(2 * math.pi / modulus)
    beta = 2 / gap * math.log(n**2 / DELTA)
    angle = 2 * math.pi / modulus * tokens
    cos, sin, zero = np.cos(angle), np.sin(angle), np.zeros_like(angle)
    # cos(a + b + c) = ca cb cc - ca sb sc - sa sb cc - sa cb sc
    query = beta * np.stack([cos, cos, sin, sin, zero + 1 - gap / 2], -1)
    key_1 = np.stack([cos, sin, sin, cos, zero], -1)
    key_2 = np.stack([cos, -sin, -cos, -sin, zero], -1)
    blank = np.broadcast_to(np.eye(5)[4], (batch, 1, 5))
    keys = (np.concatenate([blank, key], axis=1) for key in (key_1, key_2))
    value = np.broadcast_to(np.arange(n + 1)[:, None] > 0, (batch, n + 1, 1))
    with jax.enable_x64(dtype == "float64"):
        one_head = lambda array: jnp.asarray(array[:, :, None], dtype)
        found = _attend(one_head(query), *map(one_head, keys), one_head(value))
        return np.asarray(found)[:, :, 0, 0]


@jax.jit
def _attend(query, key_1, key_2, value) -> jax.Array:
    return kronecker_attention(query, (key_1, key_2), (value, value), scale=1.0)


def measure(dtype: str, length: int, options: Options) -> Scores:
    modulus = length**2
    sequences = Sequences(length, modulus, options.seeds[0])
    parts = -(-options.hand_set_answers // (length * AT_ONCE))
    tokens, answers = sequences.fresh(parts * AT_ONCE)
    found = np.concatenate(
        [scores(part, modulus, dtype) for part in np.split(tokens, parts)]
    )
    said = found > 0.5
    return Scores(
        dtype,
        length,
        answers.size,
        float(answers.mean()),
        int((said & ~answers).sum()),
        int((answers & ~said).sum()),
        float(found[answers].min()),
        float(found[~answers].max()),
    )
