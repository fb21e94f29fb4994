"""Token losses whose largest few weigh more: a smoother curve along the sequence."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype
from softlib._masked_mean import masked_mean
from softlib.typing import Scalar


@array_arguments
def smoothed_token_loss(
    token_nll: Float[Array, "*batch T"],
    *,
    num_largest: int = 5,
    alpha: Scalar = 0.7,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""Mean loss of the tokens of a sequence, and $\alpha$ times that of the worst.

    $$L = \frac{1}{T} \sum_t l_t + \frac{\alpha}{N} \sum_{t \in \mathrm{top}_N} l_t$$

    A sequence is recited only if no token fails, so those of the largest loss get
    $\alpha T / N$ times as much more gradient than the others. Made for recovering
    memorised text with a soft prompt; $\alpha = 0$ is the mean.

    Args:
        token_nll: $l_t$, negative log-probabilities in nats.
        num_largest: Static $N \geq 1$; a shorter sequence takes all its tokens.
        alpha: $\alpha \geq 0$; a number or a scalar array.
        where: True for the tokens that count; broadcasts to `token_nll`.

    Returns:
        The loss per sequence, float32 (float64 for float64); 0 for one without tokens.
        NaN if a token that counts is NaN.

    Raises:
        TypeError: `token_nll` is not floating, `where` not boolean, or `num_largest` no
            Python int.
        ValueError: Shapes do not fit together, or a number is out of range.

    Derivatives: any order, with respect to `token_nll` and `alpha`. Among equal losses
        the first ones are among the largest.
    Cost: a partial sort of each sequence.
    Source: "Ethicist: Targeted Training Data Extraction Through Loss Smoothed Soft
        Prompting and Calibrated Confidence Estimation". There the second term is
        averaged over the batch as well.

    Example:
        >>> nll = jnp.array([[0.25, 0.25, 6.5, 1.0]])
        >>> print(softlib.losses.smoothed_token_loss(nll, num_largest=1, alpha=0.5))
        [5.25]
    """
    function = "smoothed_token_loss"
    checks.require_scalar(function, "alpha", alpha, 0, jnp.inf)
    values, where = _counted(function, "token_nll", token_nll, where)
    worst = _top_k_mean(function, "num_largest", values, num_largest, where)
    return masked_mean(values, where, -1) + jnp.asarray(alpha, values.dtype) * worst


@array_arguments
def top_k_mean(
    values: Float[Array, "*batch T"],
    k: int,
    *,
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
        >>> print(softlib.losses.top_k_mean(jnp.array([3.0, 1.0, 2.0, 9.0]), 2))
        6.0
    """
    function = "top_k_mean"
    values, where = _counted(function, "values", values, where)
    return _top_k_mean(function, "k", values, k, where)


def _counted(
    function: str, name: str, values: Array, where: Array | None
) -> tuple[Float[Array, "*batch T"], Bool[Array, "*batch T"]]:
    """Values in the dtype of sums, 0 where they do not count."""
    values = jnp.asarray(values)
    checks.require_floating(function, **{name: values})
    checks.require_rank(function, name, values, 1, "(..., T)")
    mask = checks.checked_where(function, where, values.shape, f"that of `{name}`")
    return jnp.where(mask, values, 0).astype(accumulator_dtype(values)), mask


def _top_k_mean(
    function: str,
    name: str,
    values: Float[Array, "*batch T"],
    k: int,
    where: Bool[Array, "*batch T"],
) -> Float[Array, "*batch"]:
    checks.require_positive_integer(function, name, k)
    k = min(k, values.shape[-1])
    if k == 0:
        return values.sum(-1)
    broken = (jnp.isnan(values) & where).any(-1)
    # A NaN among the candidates would be sorted by its sign.
    candidates = jnp.where(where & ~jnp.isnan(values), values, -jnp.inf)
    largest = lax.top_k(candidates, k)[0]
    count = where.sum(-1, dtype=jnp.int32)
    # The largest come first, so what does not count is behind what does.
    place = jnp.broadcast_to(jnp.arange(k, dtype=jnp.int32), largest.shape)
    kept = place < count[..., None]
    return jnp.where(broken, jnp.nan, masked_mean(largest, kept, -1))
