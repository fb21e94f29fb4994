"""Initial weights of a generalized Gaussian law."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer
from jaxtyping import Array

from softlib import _checks as checks

MODES = ("fan_in", "fan_out", "fan_avg")


def generalized_gaussian_init(
    *,
    shape: float = 1.0,
    scale: float = 1.0,
    mode: Literal["fan_in", "fan_out", "fan_avg"] = "fan_in",
) -> Initializer:
    r"""An initializer that draws from a generalized Gaussian by the size of a layer.

    As `jax.nn.initializers.variance_scaling`, with tails of a shape $\nu$: the variance
    is `scale` divided by the number of inputs (or outputs, or their mean), and the
    density falls like $e^{-(|x| / a)^\nu}$. Trained weights are closer to $\nu = 1$
    than to a Gaussian, which is $\nu = 2$.

    Args:
        shape: Static $\nu > 0$.
        scale: Static factor of the variance, above 0.
        mode: Static. The last axis of a kernel has the outputs, the one before it the
            inputs; axes before them belong to both.

    Returns:
        A function of a key, the dimensions and a dtype, as the modules of Flax take.
        Numbers are drawn in float32 or wider and rounded once.

    Raises:
        TypeError: A number is no Python number.
        ValueError: A number is not positive, `mode` is unknown, or, in the call, there
            are fewer than two dimensions.

    Derivatives: none.
    Cost: a gamma variate per weight.
    Source: "It Takes a Good Model to Train a Good Model: Generalized Gaussian Priors
        for Optimized LLMs".

    Example:
        >>> init = softlib.nn.generalized_gaussian_init(shape=1.0)
        >>> kernel = init(jax.random.key(0), (400, 100), jnp.float32)
        >>> print(f"{400 * kernel.var():.1f}")
        1.0
    """
    function = "generalized_gaussian_init"
    checks.require_positive_number(function, "shape", shape)
    checks.require_positive_number(function, "scale", scale)
    checks.require_one_of(function, "mode", mode, MODES)
    # Of the density with a = 1 the variance is Gamma(3 / nu) / Gamma(1 / nu).
    nu, log_variance = shape, math.lgamma(3 / shape) - math.lgamma(1 / shape)

    def init(key, shape, dtype=None, out_sharding=None) -> Array:
        if len(shape) < 2:
            raise ValueError(
                f"{function}: a kernel must have at least 2 dimensions, got {shape}."
            )
        field = math.prod(shape[:-2])
        fans = {"fan_in": shape[-2] * field, "fan_out": shape[-1] * field}
        fans["fan_avg"] = (fans["fan_in"] + fans["fan_out"]) / 2
        a = math.sqrt(scale / max(fans[mode], 1)) * math.exp(-log_variance / 2)
        dtype = jnp.dtype(float) if dtype is None else dtype
        wide = jnp.promote_types(dtype, jnp.float32)
        drawn = (a * jax.random.generalized_normal(key, nu, shape, wide)).astype(dtype)
        if out_sharding is None:
            return drawn
        return jax.lax.with_sharding_constraint(drawn, out_sharding)

    return init
