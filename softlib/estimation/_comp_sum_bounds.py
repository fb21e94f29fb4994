r"""A bound of the error rate by a comp-sum loss, and its inverse."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._bracketed_root import decreasing_root
from softlib._compiled_once import compiled_once
from softlib._dtypes import accumulator_dtype
from softlib._expm1 import expm1
from softlib.typing import Scalar

# Beyond it tanh is 1 in float64: stands for the infinite atanh(1).
LARGEST = 40.0
NUM_NODES = 12


@array_arguments
def comp_sum_transformation(
    beta: Float[Array, "*shape"], *, tau: Scalar, num_classes: int
) -> Float[Array, "*shape"]:
    r"""The least excess comp-sum loss of a predictor whose error exceeds by `beta`.

    For every distribution of labels, expected loss minus the best expected loss is at
    least $T_\tau(\beta)$ where the error rate exceeds the best by $\beta$. With
    $a = \left(\tfrac12 (1 + \beta)^{1 / (2 - \tau)} + \tfrac12
    (1 - \beta)^{1 / (2 - \tau)}\right)^{2 - \tau}$ and $n$ classes

    $$T_\tau = \frac{2^{1 - \tau} (1 - a)}{1 - \tau}, \quad
      \tfrac{1 + \beta}{2} \log(1 + \beta) + \tfrac{1 - \beta}{2} \log(1 - \beta), \quad
      \frac{a - 1}{(\tau - 1)\, n^{\tau - 1}}, \quad
      \frac{\beta}{(\tau - 1)\, n^{\tau - 1}}$$

    for $\tau < 1$, $\tau = 1$, $1 < \tau < 2$ and $\tau \geq 2$; continuous, convex and
    increasing. Small $\beta$ costs $\beta^2 / (2^\tau (2 - \tau))$ for $\tau \leq 1$
    and $\beta^2 / (2 (2 - \tau) n^{\tau - 1})$ up to 2: the guarantee behind a large
    $\tau$ weakens with the number of classes.

    Args:
        beta: Excess error rates in [0, 1]; NaN outside.
        tau: $\tau \geq 0$ of the loss; a number is static, an array traced and, but
            for the kinks at 1 and 2, differentiable.
        num_classes: Static $n$, at least 2.

    Returns:
        A loss in nats for each, float32 or float64.

    Raises:
        TypeError: `beta` is not floating, or `num_classes` no integer.
        ValueError: `tau` or `num_classes` is out of range.

    Derivatives: forward and reverse, any order, in `beta` below 1.
    Cost: a hundred operations for each element.
    Source: "Cross-Entropy Loss Functions: Theoretical Analysis and Applications".
        Evaluated by hyperbolic functions and a quadrature in $\tau$: the powers above
        cancel for small $\beta$ and for $\tau$ near 1.

    Example:
        >>> beta = jnp.array([0.1, 0.5, 1.0])
        >>> transformation = softlib.estimation.comp_sum_transformation
        >>> print(transformation(beta, tau=1.0, num_classes=10).round(4))
        [0.005  0.1308 0.6931]
    """
    function = "comp_sum_transformation"
    beta = jnp.asarray(beta)
    checks.require_floating(function, beta=beta)
    _check(function, tau, num_classes)
    beta = beta.astype(accumulator_dtype(beta))
    inside = (beta >= 0) & (beta <= 1)
    return jnp.where(
        inside, _transformation(jnp.where(inside, beta, 0), tau, num_classes), jnp.nan
    )


@array_arguments
def comp_sum_regret_bound(
    surrogate_regret: Float[Array, "*shape"], *, tau: Scalar, num_classes: int
) -> Float[Array, "*shape"]:
    r"""The most by which the error rate can exceed the best, given an excess loss.

    The inverse of `comp_sum_transformation`: if the expected comp-sum loss of a
    predictor is $r$ above the best of all predictors, its error rate is at most
    $T_\tau^{-1}(r)$ above the best. (For a restricted class of predictors add the
    minimizability gaps: that of the loss to $r$, and subtract that of the error.)

    Args:
        surrogate_regret: Excess losses $r \geq 0$ in nats; NaN below.
        tau: $\tau \geq 0$ of the loss; a number or a traced scalar.
        num_classes: Static $n$, at least 2.

    Returns:
        Bounds in [0, 1], float32 or float64; 1 where $r$ says nothing.

    Raises:
        TypeError: `surrogate_regret` is not floating, or `num_classes` no integer.
        ValueError: `tau` or `num_classes` is out of range.

    Derivatives: forward and reverse, any order, in `surrogate_regret`: $1 / T'$, and 0
        at a bound of 0, where it is infinite, and of 1; 0 in `tau`.
    Cost: forty evaluations of the transformation.
    Source: "Cross-Entropy Loss Functions: Theoretical Analysis and Applications".

    Example:
        >>> bound = softlib.estimation.comp_sum_regret_bound
        >>> for tau in (1.0, 1.5, 2.0):  # in percent
        ...     print((100 * bound(jnp.array(0.01), tau=tau, num_classes=10)).round())
        14.0
        18.0
        10.0
    """
    function = "comp_sum_regret_bound"
    regret = jnp.asarray(surrogate_regret)
    checks.require_floating(function, surrogate_regret=regret)
    _check(function, tau, num_classes)
    regret = regret.astype(accumulator_dtype(regret))
    tau = lax.stop_gradient(jnp.asarray(tau, regret.dtype))
    known = regret >= 0
    bound = _inverse(jnp.where(known, regret, 0), tau, num_classes)
    return jnp.where(known, bound, jnp.nan)


def _check(function: str, tau: Scalar, num_classes: int) -> None:
    checks.require_scalar(function, "tau", tau, 0, math.inf)
    checks.require_positive_integer(function, "num_classes", num_classes)
    if num_classes < 2:
        raise ValueError(
            f"{function}: `num_classes` must be at least 2, got {num_classes}."
        )


def _transformation(beta: Array, tau: Scalar, num_classes: int) -> Array:
    # With beta = tanh(B) and d = 2 - tau: log a = d log cosh(B / d) - log cosh(B). That
    # is s G for s = 1 - tau, and T = -G (e^{sG} - 1) / (sG) times 2^s or n^s.
    s = 1 - jnp.asarray(tau, beta.dtype)
    is_linear = s <= -1
    s = jnp.where(is_linear, 0, s)
    below = jnp.where(beta < 1, beta, 0)
    b = jnp.where(beta < 1, jnp.minimum(jnp.arctanh(below), LARGEST), LARGEST)
    near = jnp.abs(s) < 0.5
    by_quotient = _log_a(b, 1 + jnp.where(near, 1, s)) / jnp.where(near, 1, s)
    g = jnp.where(near, _mean_slope(b, jnp.where(near, s, 0)), by_quotient)
    u = s * g
    tiny = jnp.abs(u) < jnp.finfo(u.dtype).eps
    quotient = expm1(jnp.where(tiny, 1, u)) / jnp.where(tiny, 1, u)
    base = jnp.where(s < 0, math.log(num_classes), math.log(2))
    curved = (0 - g) * jnp.where(tiny, 1 + u / 2, quotient) * jnp.exp(s * base)

    a = jnp.where(is_linear, jnp.asarray(tau, beta.dtype) - 1, 1)
    return jnp.where(is_linear, beta / (a * jnp.exp(a * math.log(num_classes))), curved)


def _log_a(b: Array, d: Array) -> Array:
    """D log cosh(b / d) - log cosh(b)."""
    # Where both are nearly linear, the linear parts cancel by themselves.
    large = b > 1
    small = jnp.where(large, 0, b)
    # sinh(b / d) of the clipped argument: for a large one log cosh is linear again.
    wide = small / d > 1
    x = jnp.where(wide, 0, small / d)
    of_small = jnp.where(wide, small / d + _rest(small / d), _log_cosh(x))
    near = d * of_small - _log_cosh(small)
    far = d * _rest(b / d) - _rest(b)
    return jnp.where(large, far, near)


def _log_cosh(x: Array) -> Array:
    """Log cosh(x) for x <= 1: exact to the last digits near 0, where it is x^2 / 2."""
    return 0.5 * jnp.log1p(jnp.sinh(x) ** 2)


def _rest(x: Array) -> Array:
    """Log cosh(x) - x, for x >= 0."""
    return jnp.log1p(jnp.exp(-2 * x)) - math.log(2)


def _mean_slope(b: Array, s: Array) -> Array:
    """(d log cosh(b / d) - log cosh(b)) / s for d = 1 + s, also at s = 0.

    The mean of the derivative log cosh(x) - x tanh(x), x = b / t, for t from 1 to d.
    """
    nodes, weights = np.polynomial.legendre.leggauss(NUM_NODES)
    one_axis_more = (*(1,) * b.ndim, NUM_NODES)
    d = 1 + s * jnp.asarray((1 + nodes) / 2, b.dtype)
    x = b[..., None] / d.reshape(one_axis_more)
    near = jnp.where(x > 1, 0, x)
    of_near = _log_cosh(near) - near * jnp.tanh(near)
    of_far = _rest(x) + 2 * x * jnp.exp(-2 * x) / (1 + jnp.exp(-2 * x))
    share = jnp.asarray(weights / 2, b.dtype).reshape(one_axis_more)
    return (share * jnp.where(x > 1, of_far, of_near)).sum(-1)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
@compiled_once(2)
def _inverse(regret: Array, tau: Array, num_classes: int) -> Array:
    # In the logarithm: a bound of 1e-6 is as accurate as one of 0.5.
    excess = lambda log_beta: (
        regret - _transformation(jnp.exp(log_beta), tau, num_classes)
    )
    # The transformation of the least beta is the smallest number there is.
    least = jnp.full_like(regret, 0.25 * math.log(jnp.finfo(regret.dtype).tiny))
    found = jnp.exp(decreasing_root(excess, least, jnp.zeros_like(regret), 40))
    return jnp.where(
        regret == 0, 0, jnp.where(excess(jnp.zeros_like(regret)) >= 0, 1, found)
    )


@_inverse.defjvp
def _inverse_jvp(num_classes, primals, tangents):
    regret, tau = primals
    beta = _inverse(regret, tau, num_classes)
    inside = (beta > 0) & (beta < 1)
    at = jnp.where(inside, beta, 0.5)
    of_beta = lambda beta: _transformation(beta, tau, num_classes)
    _, slope = jax.jvp(of_beta, (at,), (jnp.ones_like(at),))
    return beta, jnp.where(inside, tangents[0] / slope, 0)
