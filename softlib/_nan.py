"""NaN for rows that have no result."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float


def nan_where(bad: Bool[Array, "..."], x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x` with NaN where `bad`, in a form that a later exponential keeps as NaN.

    A constant NaN would not do on CPUs: LLVM folds XLA's exponential of it, in steps
    that are undefined for NaN, to 0 or -inf.
    """
    return jnp.where(bad, lax.optimization_barrier(jnp.asarray(jnp.nan, x.dtype)), x)
