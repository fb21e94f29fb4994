"""Mean of the largest values of a row."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype
from softlib._masked_mean import masked_mean


@array_arguments
def top_k_mean(
    values: Float[Array, "*batch T"],
    *,
    k: int,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""Mean of the $k$ largest values along the last axis.

    Of losses it is the conditional value at risk of level $1 - k / T$: what the worst
    cases cost on average. $k = 1$ is the maximum, $k \geq T$ the mean.

    Args:
        values: Numbers of any sign; -inf and +inf are legal.
        k: Static, at least 1. Where fewer values count, all of them are taken.
        where: True for the values that count; broadcasts to `values`.

    Returns:
        The mean, float32 (float64 for float64 values); 0 where nothing counts, NaN
        where a value that counts is NaN.

    Raises:
        TypeError: `values` is not floating, `where` not boolean, or `k` no Python int.
        ValueError: `where` does not broadcast to `values`, or `k` is below 1.

    Derivatives: any order: $1 / k$ for each of the largest, of equal ones the first.
    Cost: a partial sort of each row.
    Source: "Ethicist: Targeted Training Data Extraction Through Loss Smoothed Soft
        Prompting and Calibrated Confidence Estimation", its second term.

    Example:
        >>> print(softlib.numerics.top_k_mean(jnp.array([3.0, 1.0, 2.0, 9.0]), k=2))
        6.0
    """
    function = "top_k_mean"
    values = jnp.asarray(values)
    checks.require_floating(function, values=values)
    checks.require_rank(function, "values", values, 1, "(..., T)")
    checks.require_positive_integer(function, "k", k)
    where = checks.checked_where(function, where, values.shape, "that of `values`")
    values = jnp.where(where, values, 0).astype(accumulator_dtype(values))
    k = min(k, values.shape[-1])
    if k == 0:
        return values.sum(-1)
    broken = (jnp.isnan(values) & where).any(-1)
    # A NaN among the candidates would be sorted by its sign.
    candidates = jnp.where(where & ~jnp.isnan(values), values, -jnp.inf)
    largest = lax.top_k(candidates, k)[0]
    count = where.sum(-1, dtype=jnp.int32)
    # The largest come first, so what does not count is behind what does.
    rank = jnp.broadcast_to(jnp.arange(k, dtype=jnp.int32), largest.shape)
    return jnp.where(
        broken, jnp.nan, masked_mean(largest, rank < count[..., None], axis=-1)
    )
