"""Losses of support vector machines."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype
from softlib._ids import labels_in_range
from softlib._nan import nan_where


@array_arguments
def squared_hinge_loss(
    scores: Float[Array, "*batch K"],
    labels: Integer[Array, "*batch"],
    *,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""Squared violations of the margins of K one-versus-rest classifiers (L2-SVM).

    $$\sum_k \max(0, 1 - t_k s_k)^2, \qquad t_k = 1 \text{ for the label, else } -1 .$$

    The gradient is continuous, so that any optimiser serves. The classifier is
    $\arg\max_k s_k$; scores are margins, not log-odds. A support vector machine adds
    $\frac{1}{2 C} \lVert W \rVert^2$ of the output layer's kernel to the *sum* of
    losses (with their mean, divide it by the number of examples too), and no bias.

    Args:
        scores: One per class.
        labels: Class ids in $[0, K)$.
        where: True for the examples that count; the others have loss 0, whatever they
            hold. Broadcasts to the batch.

    Returns:
        The loss per example, float32 (float64 for float64 scores); NaN for a label
        outside $[0, K)$.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together.

    Derivatives: forward and reverse; $-2 t_k \max(0, 1 - t_k s_k)$, of which the next
        order is a step.
    Cost: a few passes over the scores, and no exponential.
    Source: "A Neural Network Architecture Combining Gated Recurrent Unit (GRU) and
        Support Vector Machine (SVM) for Intrusion Detection in Network Traffic Data".
        Its public code predicts by the sign of scores, where ties go to class 0.

    Example:
        >>> scores = jnp.array([[2.0, -0.5], [0.0, 0.0]])
        >>> print(softlib.losses.squared_hinge_loss(scores, jnp.array([0, 1])))
        [0.25 2.  ]
    """
    function = "squared_hinge_loss"
    scores, labels = jnp.asarray(scores), jnp.asarray(labels)
    checks.require_floating(function, scores=scores)
    checks.require_integer(function, labels=labels)
    checks.require_rank(function, "scores", scores, 1, "(..., K)")
    batch = scores.shape[:-1]
    checks.require_shape(function, "labels", labels, batch, "one per row of `scores`")
    counts = checks.checked_where(function, where, batch, "the batch")
    scores = scores.astype(accumulator_dtype(scores))
    scores = jnp.where(counts[..., None], scores, 0)
    known = labels_in_range(labels, scores.shape[-1])
    places = lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
    is_label = places == known[..., None]
    violation = jnp.maximum(jnp.where(is_label, 1 - scores, 1 + scores), 0)
    loss = (violation**2).sum(-1)
    return jnp.where(counts, nan_where(known < 0, loss), 0)
