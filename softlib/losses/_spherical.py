"""Log-spherical softmax, log-Taylor softmax and squared error: spherical losses."""

from jaxtyping import Array, Bool, Float, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib.logits import Logits
from softlib.logits._sources import source_of
from softlib.typing import Scalar

from ._spherical_family import (
    Sums,
    log_spherical_of,
    log_taylor_of,
    loss_of_sums,
    squared_error_of,
)


@array_arguments
def log_spherical_softmax_loss(
    logits: Logits,
    labels: Integer[Array, "*batch"],
    *,
    epsilon: Scalar = 1e-6,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""Log-spherical softmax loss, in nats per row.

    Of the logits $o$ of a row, over its selected classes,

    $$L = -\log \frac{o_y^2 + \epsilon}{\sum_j (o_j^2 + \epsilon)}$$

    It is cross-entropy with `softlib.softmax.spherical_softmax` instead of softmax. It
    depends neither on the signs of logits nor (up to $\epsilon$) on their common scale,
    but on a shift of them.

    Args:
        logits: An array of logits, or a value such as `softlib.LinearLogits`.
        labels: Class ids in $[0, V)$; NaN outside, +inf for that of an excluded class.
        epsilon: $\epsilon > 0$, which makes a row of zeros uniform; a number is static,
            an array traced and differentiable.
        where: True for the rows that count; the others cost 0, whatever they hold.

    Returns:
        The loss per row, float32 (float64 if an argument is float64). A row without
        classes has loss 0 and gradient 0; one whose logits are all -inf costs +inf,
        with gradient 0; one whose sum of squares overflows is NaN.

    Raises:
        TypeError, ValueError, NotImplementedError: As `softmax_cross_entropy`.

    Derivatives: as `row_statistics`, and with respect to `epsilon`.
    Cost: as `softmax_cross_entropy`, without exponentials. For a head whose step
        does not grow with the vocabulary see `FactoredSphericalState`.
    Source: "An Exploration of Softmax Alternatives Belonging to the Spherical Loss
        Family".

    Example:
        >>> hidden, weight = jnp.eye(2), jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> loss = softlib.losses.log_spherical_softmax_loss
        >>> logits = softlib.LinearLogits(hidden, weight)
        >>> print(loss(logits, jnp.array([0, 1])).round(4))
        [0. 0.]
    """
    source = source_of("log_spherical_softmax_loss", logits)
    checks.require_positive_scalars(source.function, epsilon=epsilon)

    def formula(sums: Sums) -> Array:
        return log_spherical_of(sums.label, sums.squares, sums.classes, epsilon)

    return loss_of_sums(source, labels, where, formula)


@array_arguments
def log_taylor_softmax_loss(
    logits: Logits,
    labels: Integer[Array, "*batch"],
    *,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""Log-Taylor softmax loss, in nats per row.

    Of the logits $o$ of a row, over its selected classes,

    $$L = -\log \frac{1 + o_y + o_y^2 / 2}{\sum_j (1 + o_j + o_j^2 / 2)}$$

    It is cross-entropy with `softlib.softmax.taylor_softmax` of order 2, the largest
    spherical order, instead of softmax. It is finite for all logits, and grows again if
    logits of other classes fall below -1.

    Args:
        logits, labels, where: As in `log_spherical_softmax_loss`.

    Returns:
        As `log_spherical_softmax_loss`.

    Raises:
        TypeError, ValueError, NotImplementedError: As `softmax_cross_entropy`.

    Derivatives: as `row_statistics`.
    Cost: as `log_spherical_softmax_loss`.
    Source: "An Exploration of Softmax Alternatives Belonging to the Spherical Loss
        Family".

    Example:
        >>> hidden, weight = jnp.eye(2), jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> loss = softlib.losses.log_taylor_softmax_loss
        >>> logits = softlib.LinearLogits(hidden, weight)
        >>> print((100 * loss(logits, jnp.array([0, 1]))).round())
        [59. 34.]
    """
    source = source_of("log_taylor_softmax_loss", logits)

    def formula(sums: Sums) -> Array:
        return log_taylor_of(sums.label, sums.total, sums.squares, sums.classes)

    return loss_of_sums(source, labels, where, formula)


@array_arguments
def spherical_squared_error(
    logits: Logits,
    labels: Integer[Array, "*batch"],
    *,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""Squared error to the one-hot label, per row.

    Of the logits $o$ of a row, over its selected classes,

    $$L = \sum_j (o_j - [j = y])^2 = \sum_j o_j^2 - 2 o_y + 1$$

    It is the sum over classes, not the mean. It is convex, and the simplest loss of the
    spherical family.

    Args:
        logits, labels, where: As in `log_spherical_softmax_loss`.

    Returns:
        As `log_spherical_softmax_loss`.

    Raises:
        TypeError, ValueError, NotImplementedError: As `softmax_cross_entropy`.

    Derivatives: as `row_statistics`.
    Cost: as `log_spherical_softmax_loss`.
    Source: "Efficient Exact Gradient Update for training Deep Networks with Very Large
        Sparse Targets".

    Example:
        >>> hidden, weight = jnp.eye(2), jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> loss = softlib.losses.spherical_squared_error
        >>> logits = softlib.LinearLogits(hidden, weight)
        >>> print(loss(logits, jnp.array([0, 1])).round(4))
        [0. 1.]
    """
    source = source_of("spherical_squared_error", logits)

    def formula(sums: Sums) -> Array:
        return squared_error_of(sums.label, sums.squares)

    return loss_of_sums(source, labels, where, formula)
