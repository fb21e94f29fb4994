"""Focal loss: cross-entropy with less weight on rows that are already right."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import promoted
from softlib._expm1 import expm1
from softlib.logits import Logits
from softlib.logits._compose import log_probability, of_log_prob, wide_log_prob
from softlib.logits._labelled_rows import prepare, weigh
from softlib.logits._sources import source_of
from softlib.typing import Scalar


@array_arguments
def softmax_focal_loss(
    logits: Logits,
    labels: Integer[Array, "*batch"],
    *,
    gamma: Scalar = 2.0,
    class_weights: Float[Array, " V"] | None = None,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""Focal loss, in nats per row.

    With $p_y$ the probability of the label $y$ and $a_y$ the weight of its class,

    $$L = -a_y (1 - p_y)^\gamma \log p_y .$$

    A row with $p_y$ near 1 adds almost nothing, so that a few hard rows outweigh many
    easy ones. $\gamma = 0$ is cross-entropy; otherwise its gradient is multiplied by
    $(1 - p)^\gamma - \gamma\, p \log p\, (1 - p)^{\gamma - 1}$. (The sigmoid form, a
    binary decision per class, is `optax.sigmoid_focal_loss`.)

    Args:
        logits: An array of logits, or a value such as `softlib.LinearLogits`.
        labels: Class ids in $[0, V)$; NaN outside, +inf for that of an excluded class.
        gamma: $\gamma \geq 0$; a number is static, an array traced and differentiable.
        class_weights: $a_j$, one number per class, differentiable; a label of weight 0
            costs 0. Nothing is divided by their sum.
        where: True for the rows that count; the others cost 0, whatever they hold.

    Returns:
        The loss per row, float32 (float64 if an argument is float64): 0 without
        classes, +inf if all logits are -inf, both with gradient 0.

    Raises:
        TypeError, ValueError, NotImplementedError: As `softmax_cross_entropy`.

    Derivatives: as `row_statistics`, and with respect to `gamma` and
        `class_weights`. Loss and gradient are finite for every margin and every
        $\gamma$: where $1 - p_y$ is below the resolution of the logsumexp (a margin of
        16 nats in float32) they are 0 instead of some $10^{-7 (1 + \gamma)}$.
    Cost: as `softmax_cross_entropy`.
    Source: "Focal Loss for Dense Object Detection", its softmax form.

    Example:
        >>> hidden, weight = jnp.eye(2), jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> labels = jnp.array([0, 1])
        >>> logits = softlib.LinearLogits(hidden, weight)
        >>> loss = softlib.losses.softmax_focal_loss(logits, labels)
        >>> print(loss.round(4))
        [0.0991 0.0109]
    """
    source = source_of("softmax_focal_loss", logits)
    checks.require_scalar(source.function, "gamma", gamma, 0, jnp.inf)
    rows = prepare(
        source,
        ("lse", "label_logits"),
        labels,
        where,
        class_weights=class_weights,
        distributions=False,
    )
    loss = _focal(log_probability(rows), gamma)
    return loss if rows.class_weight is None else weigh(rows.class_weight, loss)


@array_arguments
def focal_from_log_prob(
    log_prob: Float[Array, "*shape"], *, gamma: Scalar = 2.0
) -> Float[Array, "*shape"]:
    r"""Focal loss of log-probabilities, in nats each.

    $-(1 - p)^\gamma \log p$, for `token_log_probs` or any log-probabilities.

    Args:
        log_prob: $\log p \leq 0$; NaN gives NaN, -inf gives +inf, both with gradient 0.
        gamma: $\gamma \geq 0$; a number is static, an array traced and differentiable.

    Returns:
        A loss for each, float32 or float64.

    Raises:
        TypeError: `log_prob` is not floating.  ValueError: `gamma` is no scalar or
            negative.

    Derivatives: any order, forward and reverse, finite up to $p = 1$.
    Cost: a few operations for each element.
    Source: "Focal Loss for Dense Object Detection".

    Example:
        >>> log_prob = jnp.log(jnp.array([0.5, 0.9]))
        >>> print(softlib.losses.focal_from_log_prob(log_prob, gamma=1.0).round(4))
        [0.3466 0.0105]
    """
    function = "focal_from_log_prob"
    checks.require_scalar(function, "gamma", gamma, 0, jnp.inf)
    return _focal(wide_log_prob(function, log_prob), gamma)


def _focal(log_prob: Array, gamma: Scalar) -> Array:
    log_prob, gamma = promoted(log_prob, gamma)

    def loss(nll):
        others = -expm1(-nll)  # 1 - p
        certain = others < jnp.finfo(others.dtype).tiny
        # Not others**gamma: for gamma < 1 its slope at 0 is infinite, and 0 * inf is
        # NaN. At p = 1 the slope of the loss is 0, but that of -log p for gamma = 0.
        factor = jnp.exp(gamma * jnp.log(jnp.where(certain, 1, others)))
        return nll * jnp.where(certain & (gamma != 0), 0, factor)

    return of_log_prob(log_prob, loss, jnp.inf)
