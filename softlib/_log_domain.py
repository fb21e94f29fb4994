"""Sums of numbers of which logarithms are given; -inf is the logarithm of 0.

Derivatives are 0 where a sum is 0: those of `jnp.logaddexp` and `logsumexp` are NaN.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ._finite import finite


def log_of(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The logarithm; -inf, with a derivative of 0, where `x` is not positive."""
    none = x <= 0  # False for NaN, which stays NaN
    return jnp.where(none, -jnp.inf, jnp.log(jnp.where(none, 1, x)))


def log_add(
    a: Float[Array, "*shape"], b: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Log(e^a + e^b), with a derivative of 0 where both are -inf."""
    top = jnp.maximum(a, b)
    none = top == -jnp.inf
    gap = jnp.where(none, 0, jnp.minimum(a, b) - jnp.where(none, 0, top))
    return jnp.where(none, -jnp.inf, top + jnp.log1p(jnp.exp(gap)))


def log_sum(a: Float[Array, "*rows n"]) -> Float[Array, "*rows"]:
    """Log sum e^a over the last axis, with a derivative of 0 where all are -inf."""
    top = finite(lax.stop_gradient(a.max(-1)))
    return top + log_of(jnp.exp(a - top[..., None]).sum(-1))
