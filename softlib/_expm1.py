"""Numbers near 0 and 1: exp(x) - 1, and the logarithm of 1 - p from that of p.

Older releases of JAX differentiate `jnp.expm1` as its value plus 1, which cancels for
an x far below 0.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_jvp
def expm1(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jnp.expm1(x)


@expm1.defjvp
def _(primals, tangents):
    (x,), (tangent,) = primals, tangents
    return expm1(x), tangent * jnp.exp(x)


def log_one_minus_exp(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Log(1 - e^x) for x <= 0: -inf, with a derivative of 0, at x = 0."""
    certain = x == 0
    x = jnp.where(certain, -1, x)
    # By whichever of two forms does not cancel.
    near = x > -math.log(2)
    of_near = jnp.log(-expm1(jnp.where(near, x, -1)))
    of_far = jnp.log1p(-jnp.exp(jnp.where(near, -1, x)))
    return jnp.where(certain, -jnp.inf, jnp.where(near, of_near, of_far))
