"""NaN for rows that have no result."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float


def nan_where(bad: Bool[Array, "..."], x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x` with NaN where `bad`, of which a later exponential makes NaN too.

    As a constant it does not, on a CPU: LLVM works out the steps of XLA's exponential
    for it beforehand, some of which give NaN no defined result, and finds 0 or -inf.
    """
    return jnp.where(bad, lax.optimization_barrier(jnp.asarray(jnp.nan, x.dtype)), x)
