r"""Taylor softmax: a polynomial instead of the exponential.

A sum of terms of both signs loses digits. But of an even order n,

$$\sum_{k \leq n} \frac{z^k}{k!} = \frac{1}{n!} \int_0^\infty (z + t)^n e^{-t}\, dt
    = \frac{1}{n!} \sum_j \omega_j (z + t_j)^n$$

with the $n / 2 + 1$ nodes and weights of Gauss and Laguerre, which are exact for this
degree: a sum of positive terms, accurate for every z.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from softlib import _checks as checks
from softlib._array_arguments import array_arguments

from ._entries import Axis, Entries, moderating


@array_arguments
def taylor_softmax(
    x: Float[Array, "*shape"],
    axis: Axis = -1,
    *,
    order: int = 2,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*shape"]:
    r"""Softmax with the Taylor polynomial of the exponential, of an even order.

    $p_i = T_n(x_i) / \sum_j T_n(x_j)$ with $T_n(z) = \sum_{k \leq n} z^k / k!$, which
    is positive for even n: $1 + z + z^2 / 2$ for n = 2. Tails fall like a power of the
    score. Unlike softmax it is not invariant to shifts, and it does not grow with
    every score: for order 2 it is smallest at $z = -1$ and *grows* below, so that very
    negative scores get large probabilities.

    Args:
        x: Scores. -inf never counts; NaN or +inf make their row NaN.
        axis: Static; the axis or axes of a row, None for all.
        order: Static, even and positive; softmax is the limit of large orders.
        where: True for the entries that count, broadcasts; others may hold anything.

    Returns:
        Probabilities in the dtype of `x`, 0 where an entry does not count.

    Raises:
        TypeError: `x` is no floating array, `where` is not boolean, or `order` no int.
        ValueError: `axis` is no axis of `x`, `where` does not broadcast, or `order` is
            not even and positive.

    Derivatives: forward and reverse mode, any order.
    Cost: two passes over `x` with $n / 2 + 1$ powers for each entry.
    Source: "An Exploration of Softmax Alternatives Belonging to the Spherical Loss
        Family", and for orders above 2 "Exploring Alternatives to Softmax Function".
        The polynomial is evaluated by a quadrature, without cancellation.

    Example:
        >>> p = softlib.softmax.taylor_softmax(jnp.array([0.0, -1.0, 2.0]))
        >>> print(jnp.round(100 * p).astype(int))
        [15  8 77]
    """
    entries = _entries("taylor_softmax", x, axis, order, where)
    z, counts = finite_scores(entries)
    # The common scale keeps the powers in range, and cancels.
    size = jnp.abs(z).max(entries.axes, keepdims=True, initial=0)
    y = _integral(z, lax.stop_gradient(size), order)
    y = jnp.where(counts, y, 0)
    total = y.sum(entries.axes, keepdims=True)
    return entries.result(y / jnp.where(total == 0, 1, total))


@array_arguments
def log_taylor_softmax(
    x: Float[Array, "*shape"],
    axis: Axis = -1,
    *,
    order: int = 2,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*shape"]:
    r"""The logarithm of `taylor_softmax`, in nats, finite wherever an entry counts.

    $\log T_n(x_i) - \log \sum_j T_n(x_j)$, without overflow for any score or order.

    Args:
        x, axis, order, where: As in `taylor_softmax`.

    Returns:
        Log-probabilities in the dtype of `x`, -inf where an entry does not count.

    Raises:
        TypeError, ValueError: As `taylor_softmax`.

    Derivatives: forward and reverse mode, any order.
    Cost: as `taylor_softmax`, with a logarithm and an exponential for each entry.
    Source: as `taylor_softmax`.

    Example:
        >>> log_p = softlib.softmax.log_taylor_softmax(jnp.array([0.0, 0.0]))
        >>> print(log_p.round(4))
        [-0.6931 -0.6931]
    """
    entries = _entries("log_taylor_softmax", x, axis, order, where)
    z, counts = finite_scores(entries)
    size = lax.stop_gradient(jnp.abs(z))
    y = jnp.log(_integral(z, size, order)) + order * jnp.log(size + _nodes(order)[-1])
    return entries.result(log_normalized(y, counts, entries.axes))


def log_normalized(y: Array, counts: Array, axes: tuple[int, ...]) -> Array:
    """Normalised log-probabilities of log-weights `y`, -inf where not `counts`."""
    low = jnp.where(counts, y, -jnp.inf)
    top = lax.stop_gradient(low.max(axes, keepdims=True, initial=-jnp.inf))
    top = jnp.where(top == -jnp.inf, 0, top)
    total = jnp.where(counts, jnp.exp(y - top), 0).sum(axes, keepdims=True)
    log_total = jnp.log(jnp.where(total == 0, 1, total))
    return jnp.where(counts, y - top - log_total, -jnp.inf)


def _entries(
    function: str, x: Array, axis: Axis, order: int, where: Array | None
) -> Entries:
    entries = Entries.of(function, x, axis, where)
    checks.require_positive_integer(function, "order", order)
    if order % 2:
        raise ValueError(
            f"{function}: `order` must be even, got {order}. A polynomial of odd order "
            "is negative somewhere."
        )
    return entries


def finite_scores(entries: Entries) -> tuple[Array, Array]:
    """Scores, 0 if not counted and NaN for +inf; and the mask of those that count."""
    counts = entries.scores > -jnp.inf
    counts = counts | jnp.isnan(entries.scores)
    z = jnp.where(counts, entries.scores, 0)
    return jnp.where(z == jnp.inf, jnp.nan, z), counts


def _nodes(order: int) -> np.ndarray:
    return np.polynomial.laguerre.laggauss(order // 2 + 1)[0]


def _integral(z: Array, size: Array, order: int) -> Array:
    """The polynomial T_n(z) n! / (size + largest node)^n, a sum over nodes."""
    nodes, weights = np.polynomial.laguerre.laggauss(order // 2 + 1)
    factor = moderating(size)
    inverse = 1 / ((size + nodes[-1]) * factor)
    total = jnp.zeros_like(z)
    for node, weight in zip(nodes, weights, strict=True):
        total = total + float(weight) * ((z + float(node)) * factor * inverse) ** order
    return total
