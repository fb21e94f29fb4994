"""One key that matches among many that do not: who still finds it?

No training. The query is the matching key plus noise (cosine 0.93), the other keys are
random directions, as attention meets them in a long context.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from softlib.attention import length_log_scale, softplus_weights

from .model import ATTEND, POWER

FEATURES, TRIALS, NOISE = 64, 16, 0.4


class Sharpness(NamedTuple):
    """How attention is spread over `keys` keys, means over the trials.

    Attributes:
        keys: How many keys there are.
        weight: On the key that matches.
        entropy: Of the weights, divided by `log(keys)`: 1 is uniform.
    """

    keys: int
    weight: float
    entropy: float


def measure(attention: str, keys: int, seed: int) -> Sharpness:
    draw_key, draw_query = jax.random.split(jax.random.key(seed))
    key = jax.random.normal(draw_key, (TRIALS, keys, 1, FEATURES))
    noise = jax.random.normal(draw_query, (TRIALS, 1, 1, FEATURES))
    key, query = map(_rescaled, (key, key[:, :1] + NOISE * noise))
    # The attended value is the weight of the first key if its value is 1, others 0.
    first = jnp.zeros((TRIALS, keys, 1, 1)).at[:, 0].set(1)
    weight = ATTEND[attention](query, key, first).mean()
    entropy = _entropy(attention, query[:, 0, 0], key[:, :, 0])
    return Sharpness(keys, float(weight), float(entropy) / math.log(keys))


@functools.partial(jax.jit, static_argnames="attention")
def _entropy(attention: str, query: Array, key: Array) -> Array:
    # Both are of norm sqrt(d): this is the cosine.
    cosine = jnp.einsum("bd,bnd->bn", query, key) / FEATURES
    if attention == "softmax":
        weights = jax.nn.softmax(cosine * math.sqrt(FEATURES))
    else:
        scale = length_log_scale(jnp.asarray(cosine.shape[-1]), FEATURES)
        power = POWER[attention]
        weights = softplus_weights(cosine * scale, power=power)
    return jax.scipy.special.entr(weights).sum(-1).mean()


def _rescaled(x: Array) -> Array:
    """To norm sqrt(d), so that the softmax sees scores of up to sqrt(d)."""
    norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x * (math.sqrt(FEATURES) / norm)
