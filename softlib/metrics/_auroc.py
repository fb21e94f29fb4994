"""The area under the curve of true against false positives."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype


@array_arguments
def auroc(
    scores: Float[Array, " n"],
    labels: Bool[Array, " n"] | Integer[Array, " n"],
    *,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, ""]:
    """The probability that a positive has a higher score than a negative.

    It is the area under the receiver operating characteristic (AUROC); ties count half.

    Args:
        scores: The larger, the more likely positive; infinities are ordinary values.
        labels: True, or not 0, for positives.
        where: True for the entries that count.

    Returns:
        A number in [0, 1], float32 (float64 if `scores` are); 0.5 without a positive or
        without a negative, and NaN if a score that counts is.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together.

    Derivatives: none, the result counts.
    Cost: a sort: O(n log n).
    Source: "The Meaning and Use of the Area under a Receiver Operating Characteristic
        (ROC) Curve".

    Example:
        >>> scores, labels = jnp.array([0.1, 0.4, 0.4, 0.9]), jnp.array([0, 0, 1, 1])
        >>> print(softlib.metrics.auroc(scores, labels))
        0.875
    """
    function = "auroc"
    checks.require_floating(function, scores=scores)
    if scores.ndim != 1:
        raise ValueError(f"{function}: `scores` must be (n,), got {scores.shape}.")
    why = "one for each score"
    checks.require_shape(function, "labels", labels, scores.shape, why)
    counts = checks.checked_where(function, where, scores.shape, why)
    positive = counts & (labels != 0)
    negative = counts & ~positive
    dtype = accumulator_dtype(scores)
    if not scores.size:
        return jnp.asarray(0.5, dtype)

    positives, negatives = positive.sum(), negative.sum()
    # Negatives in front of what ends the sorted list, which is not counted.
    ranked = jnp.sort(jnp.where(negative, scores, jnp.inf))
    below = jnp.searchsorted(ranked, scores, side="left")
    upto = jnp.minimum(jnp.searchsorted(ranked, scores, side="right"), negatives)
    below = jnp.minimum(below, negatives).astype(dtype)
    # Shares before the sum: counts of pairs would be too large for the dtype.
    share = (below + upto.astype(dtype)) / (2 * _at_least_one(negatives, dtype))
    mean = jnp.where(positive, share, 0).sum() / _at_least_one(positives, dtype)
    known = (positives > 0) & (negatives > 0)
    broken = (jnp.isnan(scores) & counts).any()
    return jnp.where(broken, jnp.nan, jnp.where(known, mean, 0.5)).astype(dtype)


def _at_least_one(count: Array, dtype: jnp.dtype) -> Float[Array, ""]:
    return jnp.maximum(count, 1).astype(dtype)
