r"""The spherical family: losses of the label's logit, and of sums over all logits.

Each loss is written once, as a function of these numbers. They come from the
row-statistics engine or from a factored head. Deviations from the mean are separate
numbers, because differences of large sums have no accurate digits.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import promoted
from softlib.logits._centred import centred, without_infinite
from softlib.logits._labelled_rows import mark, rows_that_count, without_classes
from softlib.logits._sources import Source
from softlib.typing import Scalar

STATISTICS = ("label_logits", "sum_logits", "sum_squared_logits")


class SphericalStatistics(NamedTuple):
    r"""Statistics of a row of logits $o_1, \dots, o_n$ that spherical losses take.

    With the mean $\mu = \frac{1}{n} \sum_j o_j$:

    Attributes:
        label_deviation: $o_y - \mu$.
        mean_logit: $\mu$.
        sum_squared_deviations: $\sum_j (o_j - \mu)^2$.
        classes: $n$, a floating scalar so that cotangents of all have one dtype.

    The methods are the losses of the family, per row and in the dtype of the
    statistics. These come from `FactoredSphericalState.statistics` or elsewhere.

    Derivatives: any order, with respect to the statistics and the parameters.
    Cost: four numbers per row; a few operations for a loss.

    Example:
        >>> one, two = jnp.asarray(1.0), jnp.asarray(2.0)
        >>> statistics = softlib.losses.SphericalStatistics(one, two, two, two)
        >>> print(statistics.z_loss(a=1.0, b=1.0).round(4))
        0.6931
    """

    label_deviation: Float[Array, "*batch"]
    mean_logit: Float[Array, "*batch"]
    sum_squared_deviations: Float[Array, "*batch"]
    classes: Float[Array, ""]

    @array_arguments
    def z_loss(
        self, *, a: Scalar, b: Scalar, epsilon: Scalar = 1e-12
    ) -> Float[Array, "*batch"]:
        r"""Computes the loss of `softlib.losses.z_loss`.

        Args:
            a: Sharpness, positive; static or traced.
            b: The score that the label is to reach; static or traced.
            epsilon: Added to the variance, $\geq 0$; static or traced.
        """
        require_z_parameters("SphericalStatistics.z_loss", a, b, epsilon)
        deviation, _, squares, classes = promoted(*self)
        return z_loss_of(deviation, squares, classes, a, b, epsilon)

    @array_arguments
    def log_spherical_softmax_loss(
        self, *, epsilon: Scalar = 1e-6
    ) -> Float[Array, "*batch"]:
        r"""Computes the loss of `softlib.losses.log_spherical_softmax_loss`, in nats.

        Args:
            epsilon: $\epsilon > 0$; static or traced.
        """
        function = "SphericalStatistics.log_spherical_softmax_loss"
        checks.require_positive_scalars(function, epsilon=epsilon)
        label, _, squares = self._sums()
        return log_spherical_of(label, squares, self.classes, epsilon)

    def log_taylor_softmax_loss(self) -> Float[Array, "*batch"]:
        """Computes the loss of `softlib.losses.log_taylor_softmax_loss`, in nats."""
        label, total, squares = self._sums()
        return log_taylor_of(label, total, squares, self.classes)

    def squared_error(self) -> Float[Array, "*batch"]:
        """Computes the loss of `softlib.losses.spherical_squared_error`."""
        label, _, squares = self._sums()
        return squared_error_of(label, squares)

    def _sums(self) -> tuple[Array, Array, Array]:
        """Returns the label's logit, the sum of all and the sum of their squares."""
        deviation, mean, squares, classes = promoted(*self)
        return deviation + mean, classes * mean, squares + classes * mean**2


# ------------------------------------------------------------------------- the formulas
def z_loss_of(
    deviation: Array,
    squares: Array,
    classes: ArrayLike,
    a: Scalar,
    b: Scalar,
    epsilon: Scalar,
) -> Array:
    """Z-loss of the label's deviation and the sum of squared deviations."""
    deviation, squares, classes, a, b, epsilon = promoted(
        deviation, squares, classes, a, b, epsilon
    )
    variance = squares / classes + epsilon
    flat = variance == 0  # the slope of the root is infinite there
    sigma = jnp.sqrt(jnp.where(flat, 1, variance))
    score = jnp.where(flat, 0, deviation) / sigma
    return jax.nn.softplus(a * (b - score)) / a


def log_spherical_of(
    label: Array, squares: Array, classes: ArrayLike, epsilon: Scalar
) -> Array:
    label, squares, classes, epsilon = promoted(label, squares, classes, epsilon)
    cost = jnp.log(squares + classes * epsilon) - jnp.log(label * label + epsilon)
    return _at_least_zero(cost)


def log_taylor_of(
    label: Array, total: Array, squares: Array, classes: ArrayLike
) -> Array:
    # 1 + z + z^2 / 2 = ((1 + z)^2 + 1) / 2, which does not cancel.
    own = ((1 + label) ** 2 + 1) / 2
    return _at_least_zero(jnp.log(classes + total + squares / 2) - jnp.log(own))


def squared_error_of(label: Array, squares: Array) -> Array:
    return _at_least_zero(squares - label * label) + (label - 1) ** 2


def _at_least_zero(values: Array) -> Array:
    """The values clipped at 0, below which only rounding takes them; same slope."""
    return values + lax.stop_gradient(jnp.maximum(values, 0) - values)


# ------------------------------------------------------------------------------ sources
class Sums(NamedTuple):
    """Sums over a row of logits, to which the formulas above are applied."""

    label: Array
    total: Array
    squares: Array
    classes: Array


def loss_of_sums(
    source: Source,
    labels: ArrayLike,
    where: ArrayLike | None,
    formula: Callable[[Sums], Array],
    *,
    deviations: bool = False,
) -> Float[Array, "*batch"]:
    """The loss per row, with the special values of all losses.

    With `deviations` the mean of each row is subtracted from its logits.
    """
    function = source.function
    where = rows_that_count(source, where)
    source = source.masked(where)
    no_classes = without_classes(source)
    source = without_infinite(source)
    labels = jnp.asarray(labels)
    checks.require_integer(function, labels=labels)
    checks.require_shape(
        function, "labels", labels, source.batch_shape, "the batch shape"
    )
    if deviations:
        source = centred(source)
    marked = mark(source, labels, where, None)
    found = source.statistics(STATISTICS, marked.labels)
    assert found.label_logits is not None
    assert found.sum_logits is not None
    assert found.sum_squared_logits is not None
    classes = jnp.broadcast_to(jnp.asarray(source.count_classes()), source.batch_shape)
    outside, impossible = marked.labels < 0, classes == 0
    if marked.excluded is not None:
        impossible = impossible | marked.excluded
    usual = ~(outside | impossible)
    classes = jnp.maximum(classes, 1).astype(source.dtype)
    label = jnp.where(usual, found.label_logits, 0)
    # Selected before the formula: its slope may be infinite where there is no loss.
    total = jnp.where(usual, found.sum_logits, 0)
    squares = jnp.where(usual, found.sum_squared_logits, 1)
    if deviations:
        mean = total / classes  # rounding errors that centring left
        label, total = label - mean, jnp.zeros_like(total)
        squares = _at_least_zero(squares - classes * mean * mean)
    # Sums that overflow, or hold +inf, are NaN.
    squares = jnp.where(squares == jnp.inf, jnp.nan, squares)
    loss = formula(Sums(label, total, squares, classes))
    loss = jnp.where(impossible, jnp.inf, jnp.where(usual, loss, 0))
    if no_classes is not None:
        loss = jnp.where(no_classes, 0, loss)
    loss = jnp.where(outside, jnp.nan, loss)
    return loss if where is None else jnp.where(where, loss, 0)


def require_z_parameters(function: str, a: Scalar, b: Scalar, epsilon: Scalar) -> None:
    checks.require_positive_scalars(function, a=a)
    checks.require_scalar(function, "b", b, -math.inf, math.inf)
    checks.require_scalar(function, "epsilon", epsilon, 0, math.inf)
