r"""Generalized Gaussian densities: values, quantiles, fits and maps of the shape.

The density is $\frac{\nu}{2 a \Gamma(1 / \nu)} e^{-(|x| / a)^\nu}$ with shape $\nu$ and
scale $a$: a Gaussian for $\nu = 2$, a Laplace density for 1.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.special import digamma, gammainc, gammaincc, gammaln
from jaxtyping import Array, Bool, Float

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._bracketed_root import decreasing_root
from softlib._compiled_once import compiled_once
from softlib._dtypes import accumulator_dtype
from softlib.typing import Scalar

LEAST_SHAPE, MOST_SHAPE = 0.1, 10.0


class GeneralizedGaussianFit(NamedTuple):
    r"""A generalized Gaussian with the first two absolute moments of samples.

    Attributes:
        shape: $\nu$, between 0.1 and 10.
        scale: $a$.
        entropy: That of the fitted density in nats,
            $\frac1\nu + \log \frac{2 a \Gamma(1 / \nu)}{\nu}$: the most that a density
            with its $E |x|^\nu$ can have.
        negative_log_likelihood: The mean over the samples in nats: what they cost
            under the fit. It is far from the entropy where the fit is poor.

    Derivatives: see `generalized_gaussian_fit`.
    Cost: four numbers.

    Example:
        >>> x = jax.random.laplace(jax.random.key(0), (4096,))
        >>> fit = softlib.numerics.generalized_gaussian_fit(x)
        >>> print(f"{fit.shape:.1f} {fit.scale:.1f}")
        1.0 1.0
    """

    shape: Float[Array, ""]
    scale: Float[Array, ""]
    entropy: Float[Array, ""]
    negative_log_likelihood: Float[Array, ""]


@array_arguments
def generalized_gaussian_log_prob(
    x: Float[Array, "*batch"], *, shape: Scalar, scale: Scalar
) -> Float[Array, "*batch"]:
    r"""The logarithm of a generalized Gaussian density.

    $$\log p(x) = \log \frac{\nu}{2 a \Gamma(1 / \nu)} - (|x| / a)^\nu$$

    Args:
        x: Any numbers.
        shape: $\nu > 0$; a number or a differentiable scalar array.
        scale: $a > 0$; a number or a differentiable scalar array.

    Returns:
        Log-densities in nats, float32 (float64 for float64 `x`); NaN where an array is
        not positive.

    Raises:
        TypeError: `x` is not floating.
        ValueError: `shape` or `scale` is not positive.

    Derivatives: forward and reverse, any order; in `x` 0 at $x = 0$, where that of a
        shape of at most 1 does not exist.
    Cost: a power per element.
    Source: "It Takes a Good Model to Train a Good Model: Generalized Gaussian Priors
        for Optimized LLMs".

    Example:
        >>> log_prob = softlib.numerics.generalized_gaussian_log_prob
        >>> print(log_prob(jnp.array([0.0, 3.0]), shape=1.0, scale=0.5).round(4))
        [ 0. -6.]
    """
    function = "generalized_gaussian_log_prob"
    x = jnp.asarray(x)
    checks.require_floating(function, x=x)
    shape, scale = _parameters(function, accumulator_dtype(x), shape, scale)
    return _log_prob(x.astype(shape.dtype), shape, scale)


@array_arguments
def generalized_gaussian_quantile(
    probabilities: Float[Array, "*batch"], *, shape: Scalar, scale: Scalar
) -> Float[Array, "*batch"]:
    r"""The numbers below which a generalized Gaussian has given probabilities.

    $F^{-1}(u) = \mathrm{sign}(u - \tfrac12)\, a\, z^{1 / \nu}$ with
    $P(1 / \nu, z) = |2 u - 1|$, the inverse of the regularized incomplete gamma
    function, found by bracketing in $\log z$ from the nearer tail.

    Args:
        probabilities: $u$ in $[0, 1]$; NaN outside.
        shape: $\nu > 0$; a number or a differentiable scalar array.
        scale: $a > 0$; a number or a differentiable scalar array.

    Returns:
        Quantiles, float32 (float64 for float64 probabilities); $\mp \infty$ at 0 and 1.
        Numbers next to 1 are as far apart as their precision: take the negative of the
        lower tail for an upper tail beyond that.

    Raises:
        TypeError: `probabilities` is not floating.
        ValueError: `shape` or `scale` is not positive.

    Derivatives: forward and reverse, first order, by the implicit rule:
        $1 / p(x)$ in $u$, $x / a$ in the scale, $-\partial_\nu F / p(x)$ in the shape.
    Cost: fifty incomplete gamma functions per element.
    Source: "It Takes a Good Model to Train a Good Model: Generalized Gaussian Priors
        for Optimized LLMs".

    Example:
        >>> quantile = softlib.numerics.generalized_gaussian_quantile
        >>> print(quantile(jnp.array([0.25, 0.5, 0.9]), shape=1.0, scale=1.0).round(2))
        [-0.69  0.    1.61]
    """
    function = "generalized_gaussian_quantile"
    u = jnp.asarray(probabilities)
    checks.require_floating(function, probabilities=u)
    shape, scale = _parameters(function, accumulator_dtype(u), shape, scale)
    return scale * _unit_quantile(u.astype(shape.dtype), shape)


@array_arguments
def generalized_gaussian_fit(
    x: Float[Array, "*batch"], *, where: Bool[Array, "..."] | None = None
) -> GeneralizedGaussianFit:
    r"""Fits a generalized Gaussian to samples by their absolute moments.

    The shape is where
    $\Gamma(\tfrac1\nu) \Gamma(\tfrac3\nu) / \Gamma(\tfrac2\nu)^2 = E x^2 / (E |x|)^2$,
    which falls with $\nu$, and the scale then
    $a^2 = E x^2\, \Gamma(\tfrac1\nu) / \Gamma(\tfrac3\nu)$.

    Args:
        x: Samples around 0, of any shape; all count as one set.
        where: True for the samples that count; broadcasts. Others may hold anything.

    Returns:
        `GeneralizedGaussianFit`, float32 (float64 for float64 samples). The shape is
        that of the nearer end where the moments ask for one outside of $[0.1, 10]$.
        Samples that are all 0, or none, have shape 2, scale 0, entropy and cost -inf.

    Raises:
        TypeError: `x` is not floating, or `where` not boolean.
        ValueError: `where` does not broadcast.

    Derivatives: forward and reverse, first order, by the implicit rule; of the shape 0
        at an end of its range.
    Cost: two passes over the samples.
    Source: "It Takes a Good Model to Train a Good Model: Generalized Gaussian Priors
        for Optimized LLMs", there by a table.

    Example:
        >>> x = jax.random.normal(jax.random.key(0), (4096,))
        >>> fit = softlib.numerics.generalized_gaussian_fit(x)
        >>> print(f"{fit.shape:.1f} {fit.scale:.1f}")
        2.0 1.4
    """
    function = "generalized_gaussian_fit"
    x = jnp.asarray(x)
    checks.require_floating(function, x=x)
    counts = checks.checked_where(function, where, x.shape, "the samples")
    return GeneralizedGaussianFit(*_fit(x.astype(accumulator_dtype(x)), counts))


@array_arguments
def reshape_distribution(
    x: Float[Array, "*batch"], *, shape: Scalar, scale: Scalar, strength: Scalar = 1.0
) -> Float[Array, "*batch"]:
    r"""Numbers in the same order whose distribution is a generalized Gaussian.

    The $i$-th smallest of $n$ becomes the quantile of $(i + \tfrac12) / n$, or with
    `strength` $t$ below 1 the mixture $(1 - t) x + t F^{-1}$. Smaller shapes give
    weights that cost fewer bits once they are rounded.

    Args:
        x: Numbers, of any shape; all are ranked as one set, equal ones in their order.
        shape: $\nu > 0$; a number or a scalar array.
        scale: $a > 0$; a number or a scalar array.
        strength: $t \in [0, 1]$; a number or a scalar array.

    Returns:
        Numbers in the dtype of `x`.

    Raises:
        TypeError: `x` is not floating.
        ValueError: A number is out of range.

    Derivatives: $1 - t$ in `x`, whose ranks have none; first order in the others.
    Cost: sorting, and a quantile per element.
    Source: "It Takes a Good Model to Train a Good Model: Generalized Gaussian Priors
        for Optimized LLMs". Its own map is not public; this one keeps every order.

    Example:
        >>> x = jnp.array([3.0, -1.0, 0.5])
        >>> reshape = softlib.numerics.reshape_distribution
        >>> print(reshape(x, shape=1.0, scale=1.0).round(1))
        [ 1.1 -1.1  0. ]
    """
    function = "reshape_distribution"
    x = jnp.asarray(x)
    checks.require_floating(function, x=x)
    checks.require_scalar(function, "strength", strength, 0, 1)
    shape, scale = _parameters(function, accumulator_dtype(x), shape, scale)
    flat = x.reshape(-1).astype(shape.dtype)
    t = jnp.asarray(strength, flat.dtype)
    ranks = jnp.argsort(jnp.argsort(flat, stable=True))
    u = (ranks.astype(flat.dtype) + 0.5) / max(flat.size, 1)
    mapped = (1 - t) * flat + t * scale * _unit_quantile(u, shape)
    return mapped.reshape(x.shape).astype(x.dtype)


def _parameters(
    function: str, dtype: jnp.dtype, shape: Scalar, scale: Scalar
) -> tuple[Array, Array]:
    checks.require_positive_scalars(function, shape=shape, scale=scale)
    return jnp.asarray(shape, dtype), jnp.asarray(scale, dtype)


def _log_prob(x: Array, shape: Array, scale: Array) -> Array:
    zero = x == 0
    # The power of 0 has no derivative for shapes below 1.
    power = jnp.exp(shape * jnp.log(jnp.abs(jnp.where(zero, 1, x)) / scale))
    log_norm = jnp.log(shape / (2 * scale)) - gammaln(1 / shape)
    return log_norm - jnp.where(zero, 0, power)


@jax.custom_jvp
@compiled_once()
def _unit_quantile(u: Float[Array, "*batch"], shape: Float[Array, ""]) -> Array:
    """The quantile at scale 1."""
    s = 1 / shape
    central = jnp.abs(2 * u - 1)
    tail = 2 * jnp.minimum(u, 1 - u)
    inside = (central > 0) & (tail > 0)
    p, q = jnp.where(inside, central, 0.5), jnp.where(inside, tail, 0.5)
    a = jnp.broadcast_to(s, u.shape)

    def excess(log_z: Array) -> Array:
        z = jnp.exp(log_z)
        return jnp.where(p < 0.5, p - gammainc(a, z), gammaincc(a, z) - q)

    # P(s, z) <= z^s / Gamma(s + 1), and Q(s, 4 (s - log q)) <= q by Chernoff.
    low = shape * (jnp.log(p) + gammaln(1 + s))
    high = jnp.log(4 * (a - jnp.log(q)))
    log_z = decreasing_root(excess, jnp.minimum(low, high), high, 48)
    magnitude = jnp.where(
        inside, jnp.exp(log_z * s), jnp.where(central > 0, jnp.inf, 0)
    )
    valid = (u >= 0) & (u <= 1) & (shape > 0)
    return jnp.where(valid, jnp.sign(u - 0.5) * magnitude, jnp.nan)


@_unit_quantile.defjvp
def _unit_quantile_jvp(primals, tangents):
    (u, shape), (du, dshape) = primals, tangents
    t = _unit_quantile(u, shape)
    regular = jnp.isfinite(t) & (t != 0)
    log_t = jnp.log(jnp.abs(jnp.where(regular, t, 1)))
    density = jnp.exp(
        _log_prob(jnp.where(jnp.isfinite(t), t, 0), shape, jnp.ones_like(shape))
    )

    def distribution(shape: Array) -> Array:
        s = jnp.broadcast_to(1 / shape, u.shape)
        return jnp.sign(u - 0.5) / 2 * gammainc(s, jnp.exp(shape * log_t))

    _, by_shape = jax.jvp(distribution, (shape,), (dshape,))
    return t, (du - jnp.where(regular, by_shape, 0)) / density


def _log_ratio(shape: Array) -> Array:
    """Log E x² / (E |x|)² of a generalized Gaussian."""
    g = lambda k: gammaln(k / shape)
    return g(1) + g(3) - 2 * g(2)


@compiled_once()
def _fit(x: Float[Array, "*batch"], counts: Bool[Array, "*batch"]) -> tuple[Array, ...]:
    magnitude = jnp.where(counts, jnp.abs(x), 0)
    most = lax.stop_gradient(magnitude.max(initial=0))
    empty = most == 0
    # Relative to the largest: squares neither overflow nor vanish.
    relative = jnp.where(empty, 1, magnitude / jnp.where(empty, 1, most))
    number = jnp.maximum(counts.sum(), 1).astype(x.dtype)
    mean = jnp.where(empty, 1, relative.sum() / number)
    square = jnp.where(empty, 1, (relative**2).sum() / number)
    wanted = jnp.log(square) - 2 * jnp.log(mean)

    fixed = lax.stop_gradient(wanted)
    low, high = (jnp.full_like(fixed, math.log(e)) for e in (LEAST_SHAPE, MOST_SHAPE))
    excess = lambda log_shape: _log_ratio(jnp.exp(log_shape)) - fixed
    found = jnp.exp(decreasing_root(excess, low, high, 40))
    # One step of Newton from a constant has the derivative of the implicit rule.
    d = lambda k: -k * digamma(k / found) / found**2
    slope = d(1) + d(3) - 2 * d(2)
    shape = jnp.clip(
        found + (wanted - _log_ratio(found)) / slope, LEAST_SHAPE, MOST_SHAPE
    )
    shape = jnp.where(empty, 2, shape)

    log_a = (jnp.log(square) + gammaln(1 / shape) - gammaln(3 / shape)) / 2
    log_norm = log_a + gammaln(1 / shape) + math.log(2) - jnp.log(shape)
    unit = jnp.where(empty, 1, jnp.exp(log_a))
    zero = relative == 0
    power = jnp.exp(shape * jnp.log(jnp.where(zero, 1, relative) / unit))
    powers = jnp.where(zero | ~counts, 0, power).sum() / number
    log_most = jnp.log(jnp.where(empty, 1, most))
    entropy, cost = (log_most + log_norm + extra for extra in (1 / shape, powers))
    scale = jnp.where(empty, 0, most * unit)
    entropy, cost = (jnp.where(empty, -jnp.inf, one) for one in (entropy, cost))
    return shape, scale, entropy, cost
