"""The weights of StableMax, in the maps, the losses and attention."""

import jax.numpy as jnp
from jaxtyping import Array


def stable_weight(x: Array) -> Array:
    """The weight s of StableMax; 0 for -inf. JAX differentiates it exactly."""
    # Neither branch overflows or divides by 0 where the other is taken, since
    # 1 + |x| >= 1, so no derivative is NaN; at 0 both have slope 1.
    u = distance(x)
    return jnp.where(x < 0, 1 / u, u)


def log_stable_weight(x: Array) -> Array:
    """The logarithm of s; -inf for -inf. JAX differentiates it exactly."""
    magnitude = jnp.where(x < 0, -x, x)
    return jnp.where(x < 0, -1.0, 1.0).astype(x.dtype) * jnp.log1p(magnitude)


def distance(x: Array) -> Array:
    """1 + |x|, with slope 1 at 0, unlike `jnp.abs`."""
    return jnp.where(x < 0, 1 - x, 1 + x)
