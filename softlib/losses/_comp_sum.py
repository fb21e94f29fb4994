r"""Comp-sum losses, $(p^{\tau - 1} - 1) / (1 - \tau)$: one family from 1/p to 1 - p."""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import promoted
from softlib._expm1 import expm1
from softlib.logits import Logits
from softlib.logits._compose import (
    log_probability_of_labels,
    of_log_prob,
    wide_log_prob,
)
from softlib.logits._sources import source_of
from softlib.typing import Scalar


@array_arguments
def comp_sum_loss(
    logits: Logits,
    labels: Integer[Array, "*batch"],
    *,
    tau: Scalar = 1.0,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""Comp-sum loss, per row.

    A concave function of $\sum_{j \neq y} e^{z_j - z_y}$, which is $1 / p_y - 1$:

    $$L_\tau = \frac{p_y^{\tau - 1} - 1}{1 - \tau}, \qquad L_1 = -\log p_y .$$

    $\tau = 0$ is the sum-exponential loss $1 / p_y - 1$, 1 cross-entropy (in nats),
    $1 + q$ generalized cross-entropy and 2 the mean absolute error $1 - p_y$. The
    gradient is that of cross-entropy times $p_y^{\tau - 1}$: small $\tau$ looks at hard
    rows, large $\tau$ ignores them, which helps when labels are wrong. The guarantee
    behind the loss weakens with the number of classes for $\tau > 1$.

    Args:
        logits: An array of logits, or a value such as `softlib.LinearLogits`.
        labels: Class ids in $[0, V)$. Outside, the loss is NaN and the row has no
            gradient. The label of an excluded class costs the limit for $p_y = 0$:
            +inf, or $1 / (\tau - 1)$ for $\tau > 1$; without gradient of the logits.
        tau: $\tau \geq 0$; a number is static, an array traced and differentiable, also
            at 1.
        where: True for the rows that count; the others cost 0, whatever they hold.

    Returns:
        The loss per row, float32 (float64 if an argument is float64). A row without
        classes has loss 0 and gradient 0; one whose logits are all -inf has the
        loss of a probability of 0, +inf or $1 / (\tau - 1)$, and gradient 0.

    Raises:
        TypeError, ValueError, NotImplementedError: As `softmax_cross_entropy`.

    Derivatives: as `row_statistics`, and with respect to `tau`. Where the slope
        $p_y^{\tau - 1}$ is larger than any number of the dtype, it is 0.
    Cost: as `softmax_cross_entropy`.
    Source: "Cross-Entropy Loss Functions: Theoretical Analysis and Applications".

    Example:
        >>> hidden, weight = jnp.eye(2), jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> labels = jnp.array([0, 1])
        >>> logits = softlib.LinearLogits(hidden, weight)
        >>> loss = softlib.losses.comp_sum_loss(logits, labels, tau=0.5)
        >>> print(loss.round(4))
        [0.635  0.2545]
    """
    source = source_of("comp_sum_loss", logits)
    checks.require_scalar(source.function, "tau", tau, 0, math.inf)
    return _power_loss(log_probability_of_labels(source, labels, where), tau - 1)


@array_arguments
def generalized_cross_entropy_loss(
    logits: Logits,
    labels: Integer[Array, "*batch"],
    *,
    q: Scalar = 0.7,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""Generalized cross-entropy, per row.

    $$L = \frac{1 - p_y^q}{q}$$

    The comp-sum loss of $\tau = 1 + q$: cross-entropy for $q \to 0$, mean absolute
    error for $q = 1$. In between it learns faster than the latter and tolerates wrong
    labels better than the former.

    Args:
        logits, where: As in `comp_sum_loss`.
        labels: Class ids in $[0, V)$. Outside, the loss is NaN and the row has no
            gradient. The label of an excluded class costs $1 / q$, without gradient of
            the logits.
        q: $q \geq 0$, where 0 is the limit; a number is static, an array traced and
            differentiable.

    Returns:
        The loss per row, float32 (float64 if an argument is float64). A row without
        classes has loss 0 and gradient 0; one whose logits are all -inf has loss $1 /
        q$ and gradient 0.

    Raises:
        TypeError, ValueError, NotImplementedError: As `comp_sum_loss`.

    Derivatives: as `comp_sum_loss`, with `q` for `tau`.
    Cost: as `softmax_cross_entropy`.
    Source: "Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy
        Labels", without its truncation.

    Example:
        >>> hidden, weight = jnp.eye(2), jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> gce = softlib.losses.generalized_cross_entropy_loss
        >>> logits = softlib.LinearLogits(hidden, weight)
        >>> print(gce(logits, jnp.array([1, 1])).round(2))
        [0.95 0.22]
    """
    source = source_of("generalized_cross_entropy_loss", logits)
    checks.require_scalar(source.function, "q", q, 0, math.inf)
    return _power_loss(log_probability_of_labels(source, labels, where), q)


@array_arguments
def mean_absolute_error_loss(
    logits: Logits,
    labels: Integer[Array, "*batch"],
    *,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""Mean absolute error of the predicted probabilities, per row.

    $$L = 1 - p_y$$

    The probability of being wrong when a class is drawn from the prediction, and half
    the $\ell_1$ distance between the prediction and the label. Its gradient is that of
    cross-entropy times $p_y$: it tolerates wrong labels, and is slow to start among
    many classes.

    Args:
        logits, where: As in `comp_sum_loss`.
        labels: Class ids in $[0, V)$. Outside, the loss is NaN and the row has no
            gradient. The label of an excluded class costs 1, without gradient.

    Returns:
        The loss per row, float32 (float64 if an argument is float64). A row without
        classes has loss 0 and gradient 0; one whose logits are all -inf has loss 1 and
        gradient 0.

    Raises:
        TypeError, ValueError, NotImplementedError: As `comp_sum_loss`.

    Derivatives: as `row_statistics`.
    Cost: as `softmax_cross_entropy`.
    Source: "Robust Loss Functions under Label Noise for Deep Neural Networks", whose
        value is twice this one.

    Example:
        >>> hidden, weight = jnp.eye(2), jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> mae = softlib.losses.mean_absolute_error_loss
        >>> logits = softlib.LinearLogits(hidden, weight)
        >>> print(mae(logits, jnp.array([1, 0])).round(4))
        [0.7881 0.8935]
    """
    source = source_of("mean_absolute_error_loss", logits)
    return _power_loss(log_probability_of_labels(source, labels, where), 1)


@array_arguments
def comp_sum_from_log_prob(
    log_prob: Float[Array, "*shape"], *, tau: Scalar = 1.0
) -> Float[Array, "*shape"]:
    r"""Comp-sum loss of log-probabilities.

    $(p^{\tau - 1} - 1) / (1 - \tau)$, and $-\log p$ for $\tau = 1$, for
    `token_log_probs` or any log-probabilities.

    Args:
        log_prob: $\log p \leq 0$. NaN gives NaN; -inf gives +inf, or $1 / (\tau - 1)$
            for $\tau > 1$; both with gradient 0.
        tau: $\tau \geq 0$; a number is static, an array traced and differentiable, also
            at 1.

    Returns:
        A loss for each, float32 or float64; accurate for every $\tau$, however near 1.

    Raises:
        TypeError: `log_prob` is not floating.  ValueError: `tau` is no scalar or
            negative.

    Derivatives: any order, forward and reverse. Where the slope $p^{\tau - 1}$ is
        larger than any number of the dtype, it is 0.
    Cost: a few dozen operations for each element.
    Source: "Cross-Entropy Loss Functions: Theoretical Analysis and Applications".

    Example:
        >>> log_prob = jnp.log(jnp.array([0.5, 0.75]))
        >>> print(softlib.losses.comp_sum_from_log_prob(log_prob, tau=2.0).round(4))
        [0.5  0.25]
    """
    function = "comp_sum_from_log_prob"
    checks.require_scalar(function, "tau", tau, 0, math.inf)
    return _power_loss(wide_log_prob(function, log_prob), tau - 1)


def _power_loss(log_prob: Array, exponent: Scalar) -> Array:
    """(1 - p**a) / a for the exponent a, and its limit -log p for a = 0."""
    log_prob, exponent = promoted(log_prob, exponent)
    bounded = exponent > 0
    limit = jnp.where(bounded, 1 / jnp.where(bounded, exponent, 1), jnp.inf)
    return of_log_prob(log_prob, lambda nll: _box_cox(nll, exponent), limit)


def _box_cox(nll: Array, exponent: Scalar) -> Array:
    """-expm1(-a x) / a; as (1 - exp(-a x)) / a it would lose x for a small a."""
    # The derivative of the quotient with respect to a cancels where a x is small, and
    # at a = 0 there is no quotient: use x (1 - e^-u) / u with u = a x, by a series.
    u = exponent * nll
    near = jnp.abs(u) < 0.5
    by_series = nll * _mean_of_exponential(jnp.where(near, u, 0))

    a = jnp.where(near, 1, exponent)
    quotient = lambda x: -expm1(-a * x) / a
    # For a < 0 the slopes e^-u and, in a, x e^-u / a may overflow, and an infinite
    # cotangent times a probability of 0 is NaN.
    slope = jnp.exp(-u) * jnp.maximum(nll, 1) / a
    steep = ~jnp.isfinite(lax.stop_gradient(slope)) & ~near
    exact = quotient(jnp.where(near | steep, 0, nll))
    exact = jnp.where(steep, lax.stop_gradient(quotient(nll)), exact)
    return jnp.where(near, by_series, exact)


def _mean_of_exponential(u: Array) -> Array:
    """(1 - e^-u) / u for abs(u) < 0.5, the mean of e^-t for t from 0 to u."""
    total = jnp.zeros_like(u)
    for n in reversed(range(16)):  # the next term is below 1e-19
        total = 1 / math.factorial(n + 1) - u * total
    return total
