r"""Divergences of two distributions: terms to be summed over classes.

Terms are functions of $s = \log p$ and $t = \log q$ of a class. The sum of
$p \log(p / q)$ cancels where the distributions are close: its terms are of the order of
the difference, the sum of the order of its square. Both distributions sum to 1, so
adding $q - p$ to each term does not change the sum, but makes every term positive,

    p log(p / q) - p + q = p phi(t - s),   phi(d) = e^d - 1 - d >= 0,

so that nothing cancels, and an error of a logsumexp enters squared.
"""

import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from softlib._expm1 import expm1

type Divergence = Literal["kl", "jensen_shannon", "cross_entropy"]


class Slopes(NamedTuple):
    """Derivatives of a divergence with respect to log p, log q and the mixing weight.

    Terms that vanish in a sum over all classes are left out.
    """

    target: Array
    other: Array
    mixture: Array | None = None


class Terms(NamedTuple):
    """A class's term of a divergence of p, the target, and q; and its derivatives."""

    value: Array
    slopes: Slopes


def terms(
    divergence: Divergence, s: Array, t: Array, mixture: Float[Array, ""] | None
) -> Terms:
    """Terms of all classes: 0 for p = q = 0, perhaps +inf for q = 0.

    In a row with an infinite term the derivatives are those of the finite terms.
    """
    if divergence == "kl":
        return _kl(s, t)
    if divergence == "cross_entropy":
        return _cross_entropy(s, t)
    assert mixture is not None
    return _jensen_shannon(s, t, mixture)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def values(
    divergence: Divergence, s: Array, t: Array, mixture: Float[Array, ""] | None
) -> Array:
    """The values of `terms`, with its slopes as derivatives."""
    return terms(divergence, s, t, mixture).value


@values.defjvp
def _(divergence, primals, tangents):
    found = terms(divergence, *primals)
    ds, dt, dmixture = tangents
    slopes = found.slopes
    tangent = slopes.target * ds + slopes.other * dt
    if slopes.mixture is not None:
        tangent = tangent + slopes.mixture * dmixture
    return found.value, tangent


def _kl(s: Array, t: Array) -> Terms:
    p, q = jnp.exp(s), jnp.exp(t)
    d, both = _difference(s, t)
    near = both & (jnp.abs(d) < _NEAR)
    value = _bregman(p, q, d, near)
    value = jnp.where(_impossible(s, t), _infinite_unless_zero(p), value)
    slope = jnp.where(near, p * expm1(jnp.where(near, d, 0)), q - p)
    return Terms(value, Slopes(-p * d, slope))


def _cross_entropy(s: Array, t: Array) -> Terms:
    p = jnp.exp(s)
    finite = -p * jnp.where(t == -jnp.inf, 0, t)
    value = jnp.where(t == -jnp.inf, _infinite_unless_zero(p), finite)
    return Terms(value, Slopes(finite, -p))


def _jensen_shannon(s: Array, t: Array, w: Float[Array, ""]) -> Terms:
    p, q = jnp.exp(s), jnp.exp(t)
    m = w * p + (1 - w) * q
    d, both = _difference(s, t)
    # x = log m - s and y = log m - t, the smaller one computed first.
    below = d <= 0
    of_p = jnp.log1p((1 - w) * expm1(jnp.where(below, d, 0)))
    of_q = jnp.log1p(w * expm1(jnp.where(below, 0, -d)))
    x = jnp.where(below, of_p, of_q + d)
    y = jnp.where(below, of_p - d, of_q)
    # A class of one distribution alone: m = w p, or m = (1 - w) q.
    x = jnp.where(both, x, jnp.where(t == -jnp.inf, jnp.log(w), 0))
    y = jnp.where(both, y, jnp.where(s == -jnp.inf, jnp.log1p(-w), 0))
    near = lambda x: both & (jnp.abs(x) < _NEAR)
    of_target = _bregman(p, m, x, near(x))
    of_other = _bregman(q, m, y, near(y))
    return Terms(
        w * of_target + (1 - w) * of_other,
        Slopes(-w * p * x, -(1 - w) * q * y, of_target - of_other),
    )


def _difference(s: Array, t: Array) -> tuple[Array, Array]:
    """`t - s`, or 0 where either is -inf; and a mask that is True where neither is."""
    both = (s != -jnp.inf) & (t != -jnp.inf)
    return jnp.where(both, t, 0) - jnp.where(both, s, 0), both


def _impossible(s: Array, t: Array) -> Array:
    return (t == -jnp.inf) & (s != -jnp.inf)


def _infinite_unless_zero(p: Array) -> Array:
    """0 for 0, +inf for positive numbers, NaN for NaN."""
    return jnp.where(p == 0, 0, p * jnp.inf)


def _bregman(p: Array, q: Array, d: Array, near: Array) -> Array:
    """`p phi(d)` for q = p e^d; q where p is 0."""
    return jnp.where(near, p * _phi(jnp.where(near, d, 0)), q - p - p * d)


# For smaller |d| the difference in phi cancels: use its series.
_NEAR = 0.5


def _phi(d: Array) -> Array:
    """e^d - 1 - d for |d| < 0.5: d^2 (1/2! + d/3! + d^2/4! + ...)."""
    # The first omitted term is below half an ulp.
    count = 15 if d.dtype == jnp.float64 else 8
    total = jnp.zeros_like(d)
    for k in reversed(range(count)):
        total = total * d + 1 / math.factorial(k + 2)
    return d * d * total
