"""Losses that are linear in -log p and p: poly-1 and symmetric cross-entropy."""

import math

import jax.numpy as jnp
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
def poly1_cross_entropy(
    logits: Logits,
    labels: Integer[Array, "*batch"],
    *,
    epsilon: Scalar = 2.0,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""Poly-1 cross-entropy, in nats per row.

    $$L = -\log p_y + \epsilon (1 - p_y)$$

    Cross-entropy is $\sum_n (1 - p)^n / n$; poly-1 raises the coefficient of its first
    term by $\epsilon$. The gradient is that of cross-entropy times $1 + \epsilon p_y$:
    more, for $\epsilon > 0$, on rows that are nearly right. $\epsilon = 0$ is
    cross-entropy.

    Args:
        logits: An array of logits, or a value such as `softlib.LinearLogits`.
        labels: Class ids in $[0, V)$; NaN outside, +inf for that of an excluded class.
        epsilon: $\epsilon \geq -1$, below which the loss would be negative near
            $p_y = 1$; a number is static, an array traced and differentiable.
        where: True for the rows that count; the others cost 0, whatever they hold.

    Returns:
        The loss per row, float32 (float64 if an argument is float64): 0 without
        classes, +inf if all logits are -inf, both with gradient 0.

    Raises:
        TypeError, ValueError, NotImplementedError: As `softmax_cross_entropy`.

    Derivatives: as `row_statistics`, and with respect to `epsilon`.
    Cost: as `softmax_cross_entropy`.
    Source: "PolyLoss: A Polynomial Expansion Perspective of Classification Loss
        Functions".

    Example:
        >>> hidden, weight = jnp.eye(2), jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> labels = jnp.array([0, 1])
        >>> logits = softlib.LinearLogits(hidden, weight)
        >>> loss = softlib.losses.poly1_cross_entropy(logits, labels)
        >>> print(loss.round(4))
        [1.3992 0.6656]
    """
    source = source_of("poly1_cross_entropy", logits)
    _require_epsilon(source.function, epsilon)
    return _poly1(log_probability_of_labels(source, labels, where), epsilon)


@array_arguments
def symmetric_cross_entropy(
    logits: Logits,
    labels: Integer[Array, "*batch"],
    *,
    alpha: Scalar = 1.0,
    beta: Scalar = 1.0,
    log_zero: Scalar = math.log(1e-4),
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""Symmetric cross-entropy, in nats per row.

    Cross-entropy of the prediction under the label, and of the label under the
    prediction, where $A$ stands for the logarithm of the label's zeros:

    $$L = \alpha (-\log p_y) - \beta A (1 - p_y)$$

    The first term learns fast; the second is bounded and so tolerates wrong labels.

    Args:
        logits: An array of logits, or a value such as `softlib.LinearLogits`.
        labels: Class ids in $[0, V)$. Outside, the loss is NaN and the row has no
            gradient. The label of an excluded class costs +inf ($-\beta A$ if $\alpha$
            is 0), without gradient of the logits.
        alpha: $\alpha \geq 0$; a number is static, an array traced and differentiable.
        beta: $\beta \geq 0$; static or traced, as `alpha`.
        log_zero: $A \leq 0$, finite; static or traced, as `alpha`.
        where: True for the rows that count; the others cost 0, whatever they hold.

    Returns:
        The loss per row, float32 (float64 if an argument is float64): 0 without
        classes, +inf if all logits are -inf, both with gradient 0.

    Raises:
        TypeError, ValueError, NotImplementedError: As `softmax_cross_entropy`.

    Derivatives: as `row_statistics`, and with respect to `alpha`, `beta` and
        `log_zero`.
    Cost: as `softmax_cross_entropy`.
    Source: "Symmetric Cross Entropy for Robust Learning with Noisy Labels". Here $A$
        replaces the logarithm of 0 only, so the second term is exactly linear in $p$.

    Example:
        >>> hidden, weight = jnp.eye(2), jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> labels = jnp.array([0, 1])
        >>> logits = softlib.LinearLogits(hidden, weight)
        >>> loss = softlib.losses.symmetric_cross_entropy(logits, labels)
        >>> print(loss.round(4))
        [4.4556 2.2015]
    """
    source = source_of("symmetric_cross_entropy", logits)
    _require_mixture(source.function, alpha, beta, log_zero)
    log_prob = log_probability_of_labels(source, labels, where)
    return _symmetric(log_prob, alpha, beta, log_zero)


@array_arguments
def poly1_from_log_prob(
    log_prob: Float[Array, "*shape"], *, epsilon: Scalar = 2.0
) -> Float[Array, "*shape"]:
    r"""Poly-1 cross-entropy of log-probabilities, in nats each.

    $-\log p + \epsilon (1 - p)$, for `token_log_probs` or any log-probabilities.

    Args:
        log_prob: $\log p \leq 0$; NaN gives NaN, -inf gives +inf, both with gradient 0.
        epsilon: $\epsilon \geq -1$; a number is static, an array traced and
            differentiable.

    Returns:
        A loss for each, float32 or float64.

    Raises:
        TypeError: `log_prob` is not floating.  ValueError: `epsilon` is no scalar or
            out of range.

    Derivatives: any order, forward and reverse.
    Cost: a few operations for each element.
    Source: "PolyLoss: A Polynomial Expansion Perspective of Classification Loss
        Functions".

    Example:
        >>> log_prob = jnp.log(jnp.array([0.5, 0.75]))
        >>> print(softlib.losses.poly1_from_log_prob(log_prob, epsilon=1.0).round(4))
        [1.1931 0.5377]
    """
    _require_epsilon("poly1_from_log_prob", epsilon)
    return _poly1(wide_log_prob("poly1_from_log_prob", log_prob), epsilon)


@array_arguments
def symmetric_from_log_prob(
    log_prob: Float[Array, "*shape"],
    *,
    alpha: Scalar = 1.0,
    beta: Scalar = 1.0,
    log_zero: Scalar = math.log(1e-4),
) -> Float[Array, "*shape"]:
    r"""Symmetric cross-entropy of log-probabilities, in nats each.

    $-\alpha \log p - \beta A (1 - p)$, for `token_log_probs` or any
    log-probabilities.

    Args:
        log_prob: $\log p \leq 0$; NaN gives NaN, -inf gives +inf ($-\beta A$ if
            $\alpha$ is 0), both with gradient 0.
        alpha: $\alpha \geq 0$; a number is static, an array traced and differentiable.
        beta: $\beta \geq 0$; static or traced, as `alpha`.
        log_zero: $A \leq 0$, finite; static or traced, as `alpha`.

    Returns:
        A loss for each, float32 or float64.

    Raises:
        TypeError: `log_prob` is not floating.  ValueError: An option is no scalar or
            out of range.

    Derivatives: any order, forward and reverse.
    Cost: a few operations for each element.
    Source: "Symmetric Cross Entropy for Robust Learning with Noisy Labels".

    Example:
        >>> log_prob = jnp.log(jnp.array([0.5, 0.9]))
        >>> loss = softlib.losses.symmetric_from_log_prob(log_prob, log_zero=-4.0)
        >>> print(loss.round(4))
        [2.6931 0.5054]
    """
    function = "symmetric_from_log_prob"
    _require_mixture(function, alpha, beta, log_zero)
    return _symmetric(wide_log_prob(function, log_prob), alpha, beta, log_zero)


def _require_epsilon(function: str, epsilon: Scalar) -> None:
    checks.require_scalar(function, "epsilon", epsilon, -1, math.inf)


def _require_mixture(
    function: str, alpha: Scalar, beta: Scalar, log_zero: Scalar
) -> None:
    checks.require_scalar(function, "alpha", alpha, 0, math.inf)
    checks.require_scalar(function, "beta", beta, 0, math.inf)
    checks.require_scalar(function, "log_zero", log_zero, -math.inf, 0)


def _poly1(log_prob: Array, epsilon: Scalar) -> Array:
    return _mixture(log_prob, 1.0, epsilon)


def _symmetric(log_prob: Array, alpha: Scalar, beta: Scalar, log_zero: Scalar) -> Array:
    log_prob, alpha, beta, log_zero = promoted(log_prob, alpha, beta, log_zero)
    return _mixture(log_prob, alpha, -beta * log_zero)


def _mixture(log_prob: Array, of_entropy: Scalar, of_error: Scalar) -> Array:
    """Sum of -log p and 1 - p with these coefficients."""
    log_prob, of_entropy, of_error = promoted(log_prob, of_entropy, of_error)
    loss = lambda nll: of_entropy * nll + of_error * -expm1(-nll)
    # Without its first term the loss is bounded.
    return of_log_prob(log_prob, loss, jnp.where(of_entropy == 0, of_error, jnp.inf))
