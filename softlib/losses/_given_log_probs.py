"""Log-probabilities of whole sequences as arguments of losses: checks, finite parts."""

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array

from softlib import _checks as checks
from softlib._dtypes import accumulator_dtype


def log_probs_of_sequences(
    function: str, where: ArrayLike | None, **arrays: ArrayLike
) -> tuple[list[Array], Array | None]:
    """Checked log-probabilities of one shape and dtype, 0 where `where` is False."""
    found = {name: jnp.asarray(array) for name, array in arrays.items()}
    checks.require_floating(function, **found)
    first = next(iter(found))
    shape = found[first].shape
    for name, array in found.items():
        checks.require_shape(function, name, array, shape, f"the shape of `{first}`")
    if where is not None:
        where = checks.checked_where(function, where, shape, "the batch shape")
    dtype = accumulator_dtype(*found.values())
    return [counted(where, array.astype(dtype)) for array in found.values()], where


def counted(where: Array | None, values: Array) -> Array:
    """The values, 0 where `where` is False."""
    return values if where is None else jnp.where(where, values, 0)


def finite_part(values: Array) -> tuple[Array, Array]:
    """The finite values, 0 elsewhere; and the others without gradient, 0 elsewhere."""
    finite = jnp.isfinite(values)
    rest = lax.stop_gradient(values)
    return jnp.where(finite, values, 0), jnp.where(finite, 0, rest)
