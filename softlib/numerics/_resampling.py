"""Unbiased resampling of a weighted sum to fewer terms of equal weight."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype


class ResampledTerms(NamedTuple):
    r"""Terms that were drawn from a weighted sum.

    Attributes:
        indices: Of the terms, int32, in ascending order.
        weights: $\operatorname{sign}(w_m) \sum |w| / n$ of each, float32 (float64 for
            float64).
    """

    indices: Int[Array, " N"]
    weights: Float[Array, " N"]


@array_arguments
def systematic_resample(
    key: Array, weights: Float[Array, " M"], *, num_samples: int
) -> ResampledTerms:
    r"""Draws indices and weights that keep every weighted sum in expectation.

    $\mathbb{E} \sum_k w'_k f(i_k) = \sum_m w_m f(m)$ for every $f$. Index $m$ is drawn
    in proportion to $|w_m|$, at $n$ evenly spaced quantiles with one random offset,
    hence $\lfloor n p_m \rfloor$ or $\lceil n p_m \rceil$ times: the variance is below
    that of independent draws. Use it to differentiate fewer terms of a weighted sum.

    Args:
        key: Of `jax.random`.
        weights: Of any sign; one of 0 is never drawn.
        num_samples: Static number $n$ of draws, at least 1.

    Returns:
        Indices and their weights. Weights that are all 0 give weights 0; a weight that
        is NaN or infinite makes all of them NaN.

    Raises:
        TypeError: `weights` is not floating, or `num_samples` no Python int.
        ValueError: `weights` has not exactly one axis or is empty, or `num_samples` is
            below 1.

    Derivatives: none are meant; stop the gradient of `weights` before.
    Cost: O(M + N log M).
    Source: "Training Chain-of-Thought via Latent-Variable Inference", its subsampled
        gradient; the scheme is that of particle filters.

    Example:
        >>> weights = jnp.array([0.5, -0.5, 0.0, 0.0])
        >>> print(*systematic_resample(jax.random.key(0), weights, num_samples=2))
        [0 1] [ 0.5 -0.5]
    """
    function = "systematic_resample"
    weights = jnp.asarray(weights)
    checks.require_floating(function, weights=weights)
    if weights.ndim != 1 or weights.size == 0:
        raise ValueError(
            f"{function}: `weights` must have one axis with an entry at least, got "
            f"shape {weights.shape}."
        )
    checks.require_positive_integer(function, "num_samples", num_samples)
    weights = weights.astype(accumulator_dtype(weights))
    size = jnp.abs(weights)
    # Rounding in a parallel scan may make sums fall, or rise at a weight of 0.
    cumulative = lax.cummax(jnp.where(size > 0, jnp.cumsum(size), 0))
    total = cumulative[-1]
    # Divided, so that the cumulative size ends at exactly 1.
    cumulative = cumulative / jnp.where(total > 0, total, 1)
    offset = jax.random.uniform(key, (), weights.dtype)
    points = (jnp.arange(num_samples, dtype=weights.dtype) + offset) / num_samples
    below_one = 1 - jnp.finfo(weights.dtype).epsneg
    points = jnp.minimum(points, below_one)
    # The first index whose cumulative size exceeds the point: its own size is not 0.
    indices = jnp.searchsorted(cumulative, points, side="right").astype(jnp.int32)
    indices = jnp.minimum(indices, len(weights) - 1)
    share = jnp.where(jnp.isfinite(total), total, jnp.nan) / num_samples
    return ResampledTerms(indices, jnp.sign(weights[indices]) * share)
