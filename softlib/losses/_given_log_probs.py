"""Log-probabilities of sequences as arguments of losses: checks, margins, limits."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array

from softlib import _checks as checks
from softlib._dtypes import accumulator_dtype
from softlib.logits._compose import is_zero
from softlib.typing import Scalar


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


def margin_over_beta(
    function: str, where: ArrayLike | None, **arrays: ArrayLike
) -> tuple[Array, Array | None]:
    """The margin over beta."""
    (chosen, rejected, *reference), where = log_probs_of_sequences(
        function, where, **arrays
    )
    ref_chosen, ref_rejected = map(lax.stop_gradient, reference)
    # Policy minus reference first: each is small beside the sums over tokens.
    return (chosen - ref_chosen) - (rejected - ref_rejected), where


def logistic_loss(h: Array, slope: Scalar, limit: Array) -> Array:
    """softplus(-h) + slope * h, or its limit where `limit` is not 0.

    Both smoothed forms, a softplus(-h) + b softplus(h), are of this form because
    softplus(h) = softplus(-h) + h.
    """
    value = jax.nn.softplus(-h)
    at_plus: ArrayLike = 0.0
    if not is_zero(slope):
        value = value + slope * h
        fixed = jnp.asarray(lax.stop_gradient(slope), h.dtype)
        at_plus = jnp.where(fixed == 0, 0, jnp.copysign(jnp.inf, fixed))
    infinite = jnp.where(limit > 0, at_plus, jnp.inf)
    return jnp.where(limit == 0, value, jnp.where(jnp.isnan(limit), limit, infinite))


def mean_of_tokens(function: str, total: Array, name: str, lengths: ArrayLike) -> Array:
    lengths = jnp.asarray(lengths)
    if not (
        jnp.issubdtype(lengths.dtype, jnp.integer)
        or jnp.issubdtype(lengths.dtype, jnp.floating)
    ):
        raise TypeError(
            f"{function}: `{name}` must be numbers of tokens (an integer or floating "
            f"dtype), got {lengths.dtype}."
        )
    checks.require_shape(
        function, name, lengths, total.shape, "the shape of `chosen_log_prob`"
    )
    lengths = lax.stop_gradient(lengths)
    mean = total / jnp.where(lengths > 0, lengths, 1).astype(total.dtype)
    without = jnp.where(lengths == 0, 0.0, jnp.nan).astype(total.dtype)
    return jnp.where(lengths > 0, mean, without)
