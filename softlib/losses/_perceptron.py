r"""Losses of margins whose gradient steps are those of the perceptron, or near them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype
from softlib.softmax import softmax


@array_arguments
def perceptron_loss(
    margins: Float[Array, "*batch n"],
    *,
    normalized: bool = False,
    where: Bool[Array, "*batch n"] | None = None,
) -> Float[Array, "*batch n"]:
    r"""Loss of the batch perceptron, per example: $\max(0, -m)$ for a margin $m$.

    The margin of an example with sign $y = \pm 1$ is $m = y f(x)$. A gradient step of
    size 1 on the mean is one of the batch perceptron, which adds $y x / n$ for every
    example with $m \leq 0$. It is the limit of logistic regression with large steps.

    Args:
        margins: One problem along the last axis.
        normalized: Static; divide the gradient by the share of the examples that are
            misclassified, so that a step on the mean over all $n$ is the mean over
            the misclassified ones. Steps to separation no longer grow with $n$. The
            value stays.
        where: True for the examples that count; the others cost 0, whatever they hold.

    Returns:
        The loss, float32 (float64 if `margins` is).

    Raises:
        TypeError: `margins` is not floating, or `where` is not boolean.
        ValueError: `margins` has no axis, or `where` has another shape.

    Derivatives: forward and reverse mode, once; -1 where $m \leq 0$: an example on the
        boundary is misclassified. With `normalized` the derivative of the mean is a
        direction that is no gradient of a function. Second derivatives are 0.
    Cost: a few passes over the margins.
    Source: "From Logistic Regression to the Perceptron Algorithm: Exploring Gradient
        Descent with Large Step Sizes".

    Example:
        >>> loss = lambda m: softlib.losses.perceptron_loss(m, normalized=True).mean()
        >>> print(jax.grad(loss)(jnp.array([3.0, 0.0, -1.0, 2.0])))
        [ 0.  -0.5 -0.5  0. ]
    """
    m, where = _checked("perceptron_loss", margins, where)
    wrong = where & (m <= 0)
    slope = jnp.where(wrong, -1, 0).astype(m.dtype)
    if normalized:
        counted, mistakes = (
            each.sum(-1, keepdims=True, dtype=m.dtype) for each in (where, wrong)
        )
        slope = slope * (counted / jnp.maximum(mistakes, 1))
    return _with_slope(m, jnp.maximum(0 - m, 0), slope)


@array_arguments
def normalized_logistic_loss(
    margins: Float[Array, "*batch n"],
    *,
    where: Bool[Array, "*batch n"] | None = None,
) -> Float[Array, "*batch n"]:
    r"""Logistic loss, per example, with a gradient that does not fade.

    The value is $\log(1 + e^{-m})$, for margins $m = y f(x)$ with signs $y = \pm 1$.
    The gradient of its mean is divided by the mean of $\sigma(-m)$, so that it becomes
    a weighted mean over the examples with weights that are a softmax:

    $$w = \operatorname{softmax}(\log \sigma(-m)), \qquad
      \nabla = -\sum_i w_i \nabla m_i .$$

    A step has the same length however few examples are still wrong, and the steps
    until linear features are separated do not grow with their number
    (`softlib.estimation.separation_step_bound`). On the way the loss may rise: watch
    the accuracy.

    Args:
        margins: One problem along the last axis.
        where: True for the examples that count; the others cost 0, whatever they hold.
            The mean is that over those, as of `softlib.masked_mean`.

    Returns:
        The loss in nats, float32 (float64 if `margins` is).

    Raises:
        TypeError: `margins` is not floating, or `where` is not boolean.
        ValueError: `margins` has no axis, or `where` has another shape.

    Derivatives: forward and reverse mode; $-n w_i$, of the margin itself alone. It is
        a direction, no gradient of a function; second derivatives are those of
        $w$. Weights are exact where every $\sigma(-m)$ underflows.
    Cost: a few passes over the margins.
    Source: "From Logistic Regression to the Perceptron Algorithm: Exploring Gradient
        Descent with Large Step Sizes", its normalized logistic regression.

    Example:
        >>> loss = lambda m: softlib.losses.normalized_logistic_loss(m).mean()
        >>> print(jax.grad(loss)(jnp.array([300.0, 300.0, 302.0])).round(2))
        [-0.47 -0.47 -0.06]
    """
    m, where = _checked("normalized_logistic_loss", margins, where)
    # The logarithm first: sigmoid(-m) is 0 in float32 for m > 104, and 0 / 0 its share.
    share = softmax(jax.nn.log_sigmoid(0 - m), where=where)
    slope = -share * where.sum(-1, keepdims=True, dtype=m.dtype)
    return _with_slope(m, jnp.where(where, jax.nn.softplus(0 - m), 0), slope)


def _checked(function: str, margins: Array, where: Array | None) -> tuple[Array, Array]:
    checks.require_floating(function, margins=margins)
    checks.require_rank(function, "margins", margins, 1, "(*batch, n)")
    if where is not None:
        checks.require_boolean(function, where=where)
        checks.require_shape(function, "where", where, margins.shape, "that of margins")
    else:
        where = jnp.ones(margins.shape, bool)
    m = margins.astype(accumulator_dtype(margins))
    return jnp.where(where, m, 0), where


@jax.custom_jvp
def _with_slope(margins: Array, value: Array, slope: Array) -> Array:
    """Returns the value, whose derivative by the margins is the slope."""
    return value


@_with_slope.defjvp
def _with_slope_jvp(primals, tangents):
    _, value, slope = primals
    return value, slope * tangents[0]
