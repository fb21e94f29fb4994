"""Triplet margin loss against the hardest negatives of a batch."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype, cast, promoted
from softlib.typing import Scalar


@array_arguments
def in_batch_triplet_loss(
    similarity: Float[Array, "B M"],
    positives: Bool[Array, "B M"],
    *,
    margin: Scalar = 0.3,
    num_negatives: int = 10,
    weight_temperature: Scalar | None = None,
    where: Bool[Array, " B"] | None = None,
) -> Float[Array, " B"]:
    r"""Triplet margin loss of each point against the hardest negatives of its batch.

    Row $i$ has its own label in column $i$. With $s^+ = s_{ii}$, the $k$ greatest
    scores $s_1, \dots, s_k$ among the columns that are no positives of the row, and
    $l_j = \max(0, s_j - s^+ + m)$,

    $$L = \frac{1}{k} \sum_j l_j \quad\text{or}\quad
    L = \sum_j w_j l_j, \qquad
    w = \operatorname{softmax}(s_j / \tau) \text{ over the } j \text{ with } l_j > 0 .$$

    Args:
        similarity: Scores of the points (rows) and of the labels drawn for them, in the
            same order; further columns are further labels.
        positives: True where the column's label is a positive of the row's point: the
            diagonal, and other labels of the batch that happen to be positives
            (`softlib.mining.in_batch_positives`) and must not be pushed away.
        margin: $m$; a number is static, an array traced.
        num_negatives: $k$, static, at least 1. A row with fewer negatives uses all.
        weight_temperature: $\tau > 0$, static or traced: harder negatives count more.
            None: the mean.
        where: True for the rows that count. Elsewhere the loss and the gradients of the
            row are 0, whatever it holds; its column stays a negative of other rows.

    Returns:
        The loss per row, float32 (float64 for float64). 0 with gradient 0 for a row
        without negatives, or all of whose negatives are below $s^+ - m$.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together, or an option is out of range.

    Derivatives: forward and reverse mode; the weights have a derivative too.
    Cost: a sort of each row for its greatest `num_negatives` entries.
    Source: "NGAME: Negative Mining-aware Mini-batching for Extreme Classification". Its
        public code gives negatives with $l_j = 0$ the exponent 0 in the softmax, hence
        some weight, and divides by $k$; here their weight is 0, and $L$ is the weighted
        mean.

    Example:
        >>> similarity = jnp.array([[0.9, 0.8], [0.1, 0.5]])
        >>> loss = softlib.losses.in_batch_triplet_loss
        >>> print(loss(similarity, jnp.eye(2, dtype=bool), margin=0.35).round(4))
        [0.25 0.  ]
    """
    function = "in_batch_triplet_loss"
    checks.require_floating(function, similarity=similarity)
    checks.require_boolean(function, positives=positives, where=where)
    if similarity.ndim != 2 or similarity.shape[0] > similarity.shape[1]:
        raise ValueError(
            f"{function}: `similarity` must have shape (B, M) with M >= B, "
            f"got {similarity.shape}."
        )
    shape, why = similarity.shape, "the shape of `similarity`"
    checks.require_shape(function, "positives", positives, shape, why)
    checks.require_shape(function, "where", where, shape[:1], "one per row")
    checks.require_positive_integer(function, "num_negatives", num_negatives)
    checks.require_scalar(function, "margin", margin, 0, float("inf"))
    if weight_temperature is not None and jnp.ndim(weight_temperature) != 0:
        raise ValueError(
            f"{function}: `weight_temperature` must be a number or a scalar array, "
            f"got shape {jnp.shape(weight_temperature)}."
        )
    if isinstance(weight_temperature, int | float):
        checks.require_positive_number(
            function, "weight_temperature", weight_temperature
        )

    s = similarity.astype(accumulator_dtype(similarity))
    if where is not None:
        s = jnp.where(where[:, None], s, 0)
    s, margin = promoted(s, margin)
    own = jnp.diagonal(s)[:, None]
    others = jnp.where(positives, -jnp.inf, s)
    hardest, _ = jax.lax.top_k(others, min(num_negatives, shape[1]))
    exists = hardest != -jnp.inf
    violation = jnp.where(exists, jnp.where(exists, hardest, 0) - own + margin, 0)
    cost = jnp.maximum(violation, 0)
    if weight_temperature is None:
        loss = cost.sum(1) / jnp.maximum(exists.sum(1, dtype=s.dtype), 1)
    else:
        active = exists & ~(violation <= 0)  # NaN is active
        some = active.any(1, keepdims=True)
        (tau,) = cast(s.dtype, weight_temperature)
        exponents = jnp.where(active, hardest / tau, -jnp.inf)
        w = jax.nn.softmax(jnp.where(some, exponents, 0), axis=1)
        loss = (jnp.where(active, w, 0) * cost).sum(1)
    return loss if where is None else jnp.where(where, loss, 0)
