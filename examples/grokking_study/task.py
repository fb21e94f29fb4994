"""The sums modulo a number, which of them are held out, and a network for them."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array


class Sums(NamedTuple):
    """Some pairs of numbers.

    Attributes:
        inputs: Two one-hot vectors after each other, (pairs, 2 * modulus).
        labels: The sum of both modulo `modulus`.
    """

    inputs: Array
    labels: Array


def sums(modulus: int, train_percent: int, seed: int) -> tuple[Sums, Sums]:
    """All pairs: those that are trained on, and those that are held out."""
    left, right = np.divmod(np.arange(modulus**2), modulus)
    order = np.random.default_rng(seed).permutation(modulus**2)
    onehot = np.eye(modulus, dtype=np.float32)
    inputs = np.concatenate([onehot[left], onehot[right]], axis=1)[order]
    labels = ((left + right) % modulus)[order].astype(np.int32)
    count = math.ceil(modulus**2 * train_percent / 100)
    train, held_out = (
        Sums(jnp.asarray(inputs[part]), jnp.asarray(labels[part]))
        for part in (slice(count), slice(count, None))
    )
    return train, held_out


class Network(nnx.Module):
    """Three matrices without biases and ReLU between them: one-hot pairs to logits.

    Without biases the logits grow with the weights: twice the weights, eight times the
    logits, and the same decisions.
    """

    def __init__(self, modulus: int, width: int, *, rngs: nnx.Rngs):
        def linear(inputs: int, outputs: int) -> nnx.Linear:
            # Uniform in +-1 / sqrt(inputs).
            uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
            return nnx.Linear(
                inputs, outputs, use_bias=False, kernel_init=uniform, rngs=rngs
            )

        self.one = linear(2 * modulus, width)
        self.two = linear(width, width)
        self.three = linear(width, modulus)

    def __call__(self, inputs: Array) -> Array:
        return self.three(nnx.relu(self.two(nnx.relu(self.one(inputs)))))


def build(modulus: int, width: int, seed: int) -> Network:
    """The seed decides every weight: all methods start from the same."""

    @nnx.jit  # one program instead of one for every initialiser
    def create() -> Network:
        return Network(modulus, width, rngs=nnx.Rngs(seed))

    return create()
