"""The task, Match3: which numbers of a sequence belong to a triple that sums to zero?

The answer for position i is 1 if some positions j and k, which may be equal to each
other and to i, have x_i + x_j + x_k = 0 modulo M.
"""

import dataclasses

import jax
import numpy as np
import optax
from flax import nnx


def matches(tokens: np.ndarray, modulus: int) -> np.ndarray:
    """(..., i, j, k), True where the three numbers sum to zero."""
    pair = (tokens[..., :, None] + tokens[..., None, :])[..., None, :, :]
    return (tokens[..., :, None, None] + pair) % modulus == 0


def answers(tokens: np.ndarray, modulus: int) -> np.ndarray:
    return matches(tokens, modulus).any((-2, -1))


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Sequences, a function of the seed and the number of the draw alone.

    The number is that of a training step; the fresh sequences of an evaluation have
    numbers of their own.
    """

    length: int
    modulus: int
    seed: int

    def at(self, draw: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Numbers (count, length) and answers (count, length)."""
        random = np.random.default_rng([self.seed, draw])
        tokens = random.integers(0, self.modulus, (count, self.length), np.int32)
        return tokens, answers(tokens, self.modulus)

    def fresh(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        return self.at(FRESH, count)


# Beyond every step.
FRESH = 1 << 40


def mean_loss(model: nnx.Module, tokens: jax.Array, answers: jax.Array) -> jax.Array:
    """Nats of an answer."""
    logits = model(tokens)
    return optax.sigmoid_binary_cross_entropy(
        logits, answers.astype(logits.dtype)
    ).mean()
