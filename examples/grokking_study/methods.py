"""What is compared: a loss for each example, and what comes before Adam."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import optax
from jax import Array

from softlib.losses import softmax_cross_entropy, stablemax_cross_entropy
from softlib.optim import perp_grad
from softlib.softmax import log_stablemax

type Loss = Callable[[Array, Array], Array]


class Method(NamedTuple):
    """How a network is trained.

    Attributes:
        loss: Of logits and labels, one for each example.
        before_adam: What is done to the gradient.
    """

    loss: Loss
    before_adam: optax.GradientTransformation = optax.identity()


def _log_of_the_probability(logits: Array, labels: Array) -> Array:
    """The loss of StableMax as it is usually written."""
    log_p = log_stablemax(logits)
    return -jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]


METHODS: dict[str, Method] = {
    "plain": Method(optax.softmax_cross_entropy_with_integer_labels),
    "exact": Method(softmax_cross_entropy),
    "perp": Method(optax.softmax_cross_entropy_with_integer_labels, perp_grad()),
    "stablemax-plain": Method(_log_of_the_probability),
    "stablemax": Method(stablemax_cross_entropy),
}


def optimiser(
    method: Method, learning_rate: float, b2: float
) -> optax.GradientTransformation:
    # With the usual epsilon of 1e-8 Adam would stand still where gradients are smaller.
    adam = optax.adam(learning_rate, b1=0.9, b2=b2, eps=1e-25)
    return optax.chain(method.before_adam, adam)
