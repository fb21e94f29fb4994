"""A small network with a linear layer over the bins, or a Fourier head."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from softlib.losses import softmax_cross_entropy
from softlib.metrics import smoothness_metric
from softlib.nn import FourierHead

from .options import Options


class Network(nnx.Module):
    """Windows (B, P) to logits of the bins; the heads alone differ."""

    def __init__(
        self, past: int, frequencies: int | None, options: Options, *, rngs: nnx.Rngs
    ):
        width = options.width
        self.first = nnx.Linear(past, width, rngs=rngs)
        self.second = nnx.Linear(width, width, rngs=rngs)
        if frequencies is None:
            self.head = nnx.Linear(width, options.bins, rngs=rngs)
        else:
            self.head = FourierHead(
                width, options.bins, num_frequencies=frequencies, rngs=rngs
            )

    def __call__(self, past: Array) -> Array:
        return self.head(nnx.relu(self.second(nnx.relu(self.first(past)))))


def loss(model: Network, past: Array, labels: Array) -> Array:
    """Mean negative log-likelihood of the bins, in nats."""
    return softmax_cross_entropy(model(past), labels).mean()


@nnx.jit
def forecast(model: Network, past: Array) -> Array:
    """Probabilities of the bins."""
    return jax.nn.softmax(model(past))


@jax.jit
def roughness(probabilities: Array) -> Array:
    return jnp.mean(smoothness_metric(probabilities))
