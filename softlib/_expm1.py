"""exp(x) - 1 with a derivative that is accurate for every x.

Older releases of JAX differentiate `jnp.expm1` as its value plus 1, which cancels for
an x far below 0.
"""

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
