"""The code length of weights under a generalized Gaussian."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from softlib import _checks as checks
from softlib._array_arguments import array_arguments, as_array
from softlib._dtypes import accumulator_dtype
from softlib.typing import Scalar


@array_arguments
def generalized_gaussian_rate(
    params: PyTree, *, shape: Scalar, epsilon: Scalar = 1e-3
) -> Float[Array, ""]:
    r"""The mean of $(|w| + \varepsilon)^\nu$ over all weights, to be added to a loss.

    Up to factors and constants the code length of weights that follow a generalized
    Gaussian: its gradient $\nu\, \mathrm{sign}(w) (|w| + \varepsilon)^{\nu - 1}$, over
    their number, draws small weights to 0 the more strongly the smaller $\nu$. Fit the
    shape anew from time to time (`softlib.numerics.generalized_gaussian_fit`).

    Args:
        params: Weights, in a pytree; every element counts alike.
        shape: $\nu > 0$; a number or a scalar array.
        epsilon: $\varepsilon \geq 0$, which keeps the gradient finite near 0 for shapes
            below 1; a number or a scalar array.

    Returns:
        A number, float32 (float64 if a leaf is float64); 0 without weights.

    Raises:
        TypeError: A leaf is not floating.
        ValueError: `shape` is not positive, or `epsilon` negative.

    Derivatives: forward and reverse; 0 in a weight of exactly 0.
    Cost: a power per weight.
    Source: "It Takes a Good Model to Train a Good Model: Generalized Gaussian Priors
        for Optimized LLMs".

    Example:
        >>> weights = {"kernel": jnp.array([0.25, -1.0]), "bias": jnp.array([0.0])}
        >>> rate = softlib.losses.generalized_gaussian_rate
        >>> print(rate(weights, shape=0.5, epsilon=0.0))
        0.5
    """
    function = "generalized_gaussian_rate"
    leaves = [as_array(function, "params", leaf) for leaf in jax.tree.leaves(params)]
    for leaf in leaves:
        checks.require_floating(function, params=leaf)
    checks.require_positive_scalars(function, shape=shape)
    checks.require_scalar(function, "epsilon", epsilon, 0, math.inf)
    dtype = accumulator_dtype(*leaves)
    nu, least = jnp.asarray(shape, dtype), jnp.asarray(epsilon, dtype)
    total = jnp.zeros((), dtype)
    for leaf in leaves:
        size = jnp.abs(leaf.astype(dtype)) + least
        zero = size == 0  # only without an epsilon; its logarithm has no derivative
        power = jnp.exp(nu * jnp.log(jnp.where(zero, 1, size)))
        total += jnp.where(zero, 0, power).sum()
    return total / max(sum(leaf.size for leaf in leaves), 1)
