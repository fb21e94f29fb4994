r"""MCMI: training of a teacher whose predictions carry more than the label."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import promoted
from softlib.information import conditional_mutual_information
from softlib.logits._compose import log_probability_of_labels
from softlib.logits._sources import StoredLogits
from softlib.typing import Scalar


@array_arguments
def mcmi_loss(
    logits: Float[Array, "N C"],
    labels: Integer[Array, " N"],
    centroids: Float[Array, "C C"],
    *,
    weight: Scalar,
    where: Bool[Array, " N"] | None = None,
) -> Float[Array, " N"]:
    r"""Cross-entropy less conditional mutual information, in nats per row.

    $$L = -\log P_y - \lambda\, \mathrm{KL}(P \,\|\, Q^y)$$

    with $P$ the softmax of the logits and $Q^y$ the centroid of the label's class.
    Training with it keeps predictions right and makes those within one class differ, as
    the true conditional distribution does. A student learns these differences. Tune a
    teacher, trained by cross-entropy, with it for a few epochs at a smaller rate. The
    second term is at most $\lambda \max_j (-\log Q^y_j)$ and outweighs the first for a
    large $\lambda$.

    Args:
        logits: Unnormalised log-probabilities.
        labels: Class ids in $[0, C)$. Outside, the loss is NaN and the row has no
            gradient.
        centroids: Result of `softlib.information.class_centroids`, computed again after
            every epoch or updated by `centroid_update`. Constants.
        weight: $\lambda \geq 0$; a number is static, an array traced and
            differentiable.
        where: True for the rows that count. Elsewhere loss and gradient are 0.

    Returns:
        The loss per row, float32 (float64 if an argument is float64); may be negative.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together, or `weight` is out of range.

    Derivatives: reverse mode of any order and forward over reverse, with respect to
        `logits` and `weight`.
    Cost: a few passes over `logits`.
    Source: "Bayes Conditional Distribution Estimation for Knowledge Distillation Based
        on Conditional Mutual Information", whose public code takes $-\lambda$.

    Example:
        >>> logits, labels = jnp.array([[2.0, 0.0], [0.0, 0.0]]), jnp.array([0, 1])
        >>> centroids = jnp.full((2, 2), 0.5)
        >>> loss = softlib.losses.mcmi_loss(logits, labels, centroids, weight=0.2)
        >>> print(loss.round(4))
        [0.0614 0.6931]
    """
    function = "mcmi_loss"
    checks.require_scalar(function, "weight", weight, 0, math.inf)
    logits, centroids = jnp.asarray(logits), jnp.asarray(centroids)
    if logits.ndim != 2:
        raise ValueError(
            f"{function}: `logits` must have shape (N, C), got {logits.shape}."
        )
    checks.require_shape(
        function, "centroids", centroids, (logits.shape[-1],) * 2, "one per class"
    )
    source = StoredLogits.of(function, logits)
    likelihood = 0 - log_probability_of_labels(source, labels, where)
    with checks.under_name(function, "conditional_mutual_information"):
        information = conditional_mutual_information(
            logits, labels, centroids=centroids, where=where
        )
    likelihood, information, weight = promoted(likelihood, information, weight)
    return likelihood - weight * information
