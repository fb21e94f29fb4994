"""The largest score of a row as something that can be subtracted from -inf."""

import jax.numpy as jnp
from jaxtyping import Array


def at_least_finite(maximum: Array) -> Array:
    """The maximum, but at least the least finite number: -inf minus it is -inf."""
    return jnp.maximum(maximum, float(jnp.finfo(maximum.dtype).min))


def finite(maximum: Array) -> Array:
    """The maximum, 0 in an empty row, so that it can be subtracted from -inf."""
    return jnp.where(maximum == -jnp.inf, 0, maximum)
