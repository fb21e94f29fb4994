"""Spherical softmax: squares instead of exponentials."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib.typing import Scalar

from ._entries import Axis, Entries, moderating
from ._taylor import finite_scores, log_normalized


@array_arguments
def spherical_softmax(
    x: Float[Array, "*shape"],
    axis: Axis = -1,
    *,
    epsilon: Scalar = 1e-6,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*shape"]:
    r"""Squares of the scores, normalised: blind to their signs.

    $p_i = (x_i^2 + \epsilon) / \sum_j (x_j^2 + \epsilon)$. Invariant to the scale of
    the scores (up to $\epsilon$), not to shifts. The sum of squares follows from the
    norm of the features, so that a loss of this family needs no pass over the classes.

    Args:
        x: Scores. -inf never counts; NaN or +inf make their row NaN.
        axis: Static; the axis or axes of a row, None for all.
        epsilon: $\epsilon > 0$, what makes a row of zeros uniform; a number is static,
            a scalar array traced and differentiable.
        where: True for the entries that count, broadcasts; others may hold anything.

    Returns:
        Probabilities in the dtype of `x`, 0 where an entry does not count.

    Raises:
        TypeError: `x` is no floating array, or `where` is not boolean.
        ValueError: `axis` is no axis of `x`, `where` does not broadcast, or `epsilon`
            is no scalar or a number that is not positive.

    Derivatives: forward and reverse mode, any order.
    Cost: three passes over `x`.
    Source: "An Exploration of Softmax Alternatives Belonging to the Spherical Loss
        Family".

    Example:
        >>> x = jnp.array([1.0, -1.0, 0.0])
        >>> print(softlib.softmax.spherical_softmax(x, epsilon=2.0))
        [0.375 0.375 0.25 ]
    """
    entries, epsilon = _checked("spherical_softmax", x, axis, epsilon, where)
    z, counts = finite_scores(entries)
    # The common scale keeps the squares in range, and cancels.
    size = jnp.abs(z).max(entries.axes, keepdims=True, initial=1)
    y = jnp.where(counts, _square(z, lax.stop_gradient(size), epsilon), 0)
    total = y.sum(entries.axes, keepdims=True)
    return entries.result(y / jnp.where(total == 0, 1, total))


@array_arguments
def log_spherical_softmax(
    x: Float[Array, "*shape"],
    axis: Axis = -1,
    *,
    epsilon: Scalar = 1e-6,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*shape"]:
    r"""The logarithm of `spherical_softmax`, in nats, finite wherever an entry counts.

    $\log(x_i^2 + \epsilon) - \log \sum_j (x_j^2 + \epsilon)$, without overflow.

    Args:
        x, axis, epsilon, where: As in `spherical_softmax`.

    Returns:
        Log-probabilities in the dtype of `x`, -inf where an entry does not count.

    Raises:
        TypeError, ValueError: As `spherical_softmax`.

    Derivatives: forward and reverse mode, any order.
    Cost: as `spherical_softmax`, with a logarithm and an exponential for each entry.
    Source: as `spherical_softmax`.

    Example:
        >>> log_p = softlib.softmax.log_spherical_softmax(jnp.array([3.0, -3.0]))
        >>> print(log_p.round(4))
        [-0.6931 -0.6931]
    """
    entries, epsilon = _checked("log_spherical_softmax", x, axis, epsilon, where)
    z, counts = finite_scores(entries)
    size = lax.stop_gradient(jnp.maximum(jnp.abs(z), 1))
    y = jnp.log(_square(z, size, epsilon)) + 2 * jnp.log(size)
    return entries.result(log_normalized(y, counts, entries.axes))


def _checked(
    function: str, x: Array, axis: Axis, epsilon: Scalar, where: Array | None
) -> tuple[Entries, Array]:
    entries = Entries.of(function, x, axis, where)
    if isinstance(epsilon, int | float):
        checks.require_positive_number(function, "epsilon", epsilon)
    else:
        checks.require_scalar(function, "epsilon", epsilon, 0, jnp.inf)
    return entries, jnp.asarray(epsilon, entries.x.dtype)


def _square(z: Array, size: Array, epsilon: Array) -> Array:
    """The weights (z^2 + epsilon) / size^2."""
    factor = moderating(size)
    return (z * factor / (size * factor)) ** 2 + epsilon / size / size
