"""Distances of a distribution over bins from blurred copies of itself."""

import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype


@array_arguments
def smoothness_metric(
    pmf: Float[Array, "*batch m"], *, max_sigma: int = 100
) -> Float[Array, "*batch"]:
    r"""Roughness of distributions over bins; lower is smoother, 0 is uniform.

    $s(p) = \sum_{\sigma = 1}^{100} \frac{6}{\pi^2 \sigma^2} \| p - G_\sigma * p \|_2$
    with $G_\sigma$ a Gaussian of $\sigma$ bins, cut off beyond $m - 1$ bins on either
    side, renormalised, and wrapped around the ends.

    Args:
        pmf: Probabilities of bins in their order.
        max_sigma: Static; the last $\sigma$. The weights add up to 0.994, and
            to 1 in the limit.

    Returns:
        The metric, float32 (float64 for float64 probabilities).

    Raises:
        TypeError: `pmf` does not hold floating numbers.
        ValueError: There is no bin, or `max_sigma` is not a positive integer.

    Derivatives: forward and reverse mode, first order; 0 where a norm is 0.
    Cost: a Fourier transform per row and m x `max_sigma` / 2 multiply-adds: a blur
        multiplies every wave by a number.
    Source: "Fourier Head: Helping Large Language Models Learn Complex Probability
        Distributions", whose code blurs in a loop.

    Example:
        >>> pmf = jnp.array([[0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.1, 0.1]])
        >>> print(softlib.metrics.smoothness_metric(pmf).round(3))
        [0.    0.476]
    """
    function = "smoothness_metric"
    pmf = jnp.asarray(pmf)
    checks.require_floating(function, pmf=pmf)
    checks.require_rank(function, "pmf", pmf, 1, "(..., m)")
    checks.require_positive_integer(function, "max_sigma", max_sigma)
    bins = pmf.shape[-1]
    if bins == 0:
        raise ValueError(
            f"{function}: `pmf` must have at least one bin, got shape {pmf.shape}."
        )
    p = pmf.astype(accumulator_dtype(pmf))
    waves = jnp.fft.rfft(p)
    power = jnp.square(waves.real) + jnp.square(waves.imag)
    kept = jnp.asarray(_removed(bins, max_sigma), p.dtype)
    squares = jnp.matmul(power, kept, precision=lax.Precision.HIGHEST)
    # The slope of a square root at 0 is infinite.
    some = squares > 0
    norms = jnp.where(some, jnp.sqrt(jnp.where(some, squares, 1)), 0)
    weights = 6 / (math.pi * np.arange(1, max_sigma + 1)) ** 2
    return jnp.dot(norms, jnp.asarray(weights, p.dtype), precision="highest")


def _removed(bins: int, max_sigma: int) -> np.ndarray:
    """The share of each wave's power that each blur removes, (waves, sigmas).

    By Parseval's theorem a norm is a sum over waves. A real signal has each of them
    twice, except the first, and the last of an even number.
    """
    offsets = np.arange(bins)
    sigmas = np.arange(1, max_sigma + 1)[:, None]
    tail = np.exp(-0.5 * (offsets / sigmas) ** 2)
    kernel = tail.copy()
    kernel[:, 1:] += tail[:, :0:-1]  # wrapped: the taps on the other side
    kernel /= kernel.sum(axis=1, keepdims=True)
    factors = 1 - np.fft.rfft(kernel).real
    factors[:, 0] = 0  # the mean stays, exactly
    times = np.full(factors.shape[1], 2.0)
    times[0] = 1
    if bins % 2 == 0:
        times[-1] = 1
    return (factors**2 * times / bins).T
