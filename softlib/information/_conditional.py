r"""Conditional mutual information of inputs and predictions, given the class."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype, common_dtype, promoted
from softlib._ids import labels_in_range
from softlib.typing import Scalar


class CentroidSums(NamedTuple):
    """Sums of predictions per class, which add up over batches and devices.

    Attributes:
        sums: The sum of the predictions of every class.
        counts: How many there were.

    Derivatives: see `class_centroid_sums`.
    Cost: K (C + 1) numbers.

    Example:
        >>> probs, labels = jnp.array([[1.0, 0.0], [0.5, 0.5]]), jnp.array([0, 0])
        >>> sums = softlib.information.class_centroid_sums
        >>> print(sums(probs, labels, num_classes=2).centroids())
        [[0.75 0.25]
         [0.5  0.5 ]]
    """

    sums: Float[Array, "K C"]
    counts: Float[Array, " K"]

    def centroids(self) -> Float[Array, "K C"]:
        """The means; the uniform distribution for a class without predictions."""
        counts = self.counts[:, None]
        mean = self.sums / jnp.where(counts == 0, 1, counts)
        return jnp.where(counts == 0, 1 / self.sums.shape[1], mean)


@array_arguments
def class_centroid_sums(
    probs: Float[Array, "N C"],
    labels: Integer[Array, " N"],
    *,
    num_classes: int,
    where: Bool[Array, " N"] | None = None,
) -> CentroidSums:
    """Sums and numbers of the predictions of every class.

    For centroids over several batches or devices: add them, or `jax.lax.psum` them, and
    take `CentroidSums.centroids` at the end.

    Args:
        probs: Predicted distributions, one per row.
        labels: Class ids; a row whose label is outside $[0, K)$ belongs to no class.
        num_classes: Static; K.
        where: True for the rows that count, whatever the others hold.

    Returns:
        `CentroidSums`, float32 (float64 for float64 predictions).

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together, or `num_classes` is not positive.

    Derivatives: forward and reverse mode, any order, with respect to `probs`.
    Cost: one pass over `probs`.
    Source: "Bayes Conditional Distribution Estimation for Knowledge Distillation Based
        on Conditional Mutual Information".

    Example:
        >>> probs, labels = jnp.array([[1.0, 0.0], [0.5, 0.5]]), jnp.array([0, 1])
        >>> sums = softlib.information.class_centroid_sums
        >>> print(sums(probs, labels, num_classes=2).counts)
        [1. 1.]
    """
    function = "class_centroid_sums"
    return _sums(function, probs, labels, num_classes, where)


@array_arguments
def class_centroids(
    probs: Float[Array, "N C"],
    labels: Integer[Array, " N"],
    *,
    num_classes: int,
    where: Bool[Array, " N"] | None = None,
) -> Float[Array, "K C"]:
    r"""The mean prediction of every class, $Q^y$.

    Among all distributions it is the one from which the class' predictions diverge
    least: $\sum_{i: y_i = y} \mathrm{KL}(P_i \,\|\, Q)$ is smallest at $Q = Q^y$.

    Args:
        probs: Predicted distributions, one per row.
        labels: Class ids; a row whose label is outside $[0, K)$ belongs to no class.
        num_classes: Static; K.
        where: True for the rows that count, whatever the others hold.

    Returns:
        A distribution per class, float32 (float64 for float64 predictions); the uniform
        one for a class without rows.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together, or `num_classes` is not positive.

    Derivatives: forward and reverse mode, any order, with respect to `probs`.
    Cost: one pass over `probs`.
    Source: "Bayes Conditional Distribution Estimation for Knowledge Distillation Based
        on Conditional Mutual Information". Its public code divides by 0 for an absent
        class.

    Example:
        >>> probs, labels = jnp.array([[1.0, 0.0], [0.5, 0.5]]), jnp.array([0, 0])
        >>> print(softlib.information.class_centroids(probs, labels, num_classes=1))
        [[0.75 0.25]]
    """
    return _sums("class_centroids", probs, labels, num_classes, where).centroids()


@array_arguments
def centroid_update(
    centroids: Float[Array, "K C"],
    probs: Float[Array, "N C"],
    labels: Integer[Array, " N"],
    *,
    decay: Scalar,
    where: Bool[Array, " N"] | None = None,
) -> Float[Array, "K C"]:
    r"""Centroids that follow the predictions batch by batch.

    $Q^y \leftarrow d\, Q^y + (1 - d)\, \bar P^y$ with the batch's mean of the class,
    divided by its sum; a class that the batch does not hold keeps its centroid.

    Args:
        centroids: A distribution per class.
        probs: Predicted distributions, one per row.
        labels: Class ids; a row whose label is outside $[0, K)$ belongs to no class.
        decay: $d \in [0, 1]$; a number is static, an array traced and differentiable.
        where: True for the rows that count, whatever the others hold.

    Returns:
        The new centroids, in the dtype of the old.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together, or `decay` is out of range.

    Derivatives: forward and reverse mode, any order.
    Cost: one pass over `probs`.
    Source: "Bayes Conditional Distribution Estimation for Knowledge Distillation Based
        on Conditional Mutual Information", whose public code has it but does not call
        it.

    Example:
        >>> old, probs = jnp.array([[0.5, 0.5], [0.5, 0.5]]), jnp.array([[1.0, 0.0]])
        >>> update = softlib.information.centroid_update
        >>> print(update(old, probs, jnp.array([0]), decay=0.5))
        [[0.75 0.25]
         [0.5  0.5 ]]
    """
    function = "centroid_update"
    centroids = jnp.asarray(centroids)
    checks.require_floating(function, centroids=centroids)
    checks.require_scalar(function, "decay", decay, 0, 1)
    sums = _sums(function, probs, labels, _classes(function, centroids), where)
    why = "as many outcomes as `probs`"
    checks.require_shape(function, "centroids", centroids, sums.sums.shape, why)
    old, new = promoted(centroids, sums.centroids())
    decay = jnp.asarray(decay, old.dtype)
    moved = decay * old + (1 - decay) * new
    moved = moved / moved.sum(1, keepdims=True)
    present = (sums.counts > 0)[:, None]
    return jnp.where(present, moved, old).astype(centroids.dtype)


@array_arguments
def conditional_mutual_information(
    logits: Float[Array, "N C"],
    labels: Integer[Array, " N"],
    *,
    centroids: Float[Array, "K C"] | None = None,
    where: Bool[Array, " N"] | None = None,
) -> Float[Array, " N"]:
    r"""Divergence of each prediction from its class' centroid, in nats.

    With $P_i$ the softmax of the logits and $Q^y$ the centroids, the mean over the rows
    of $\mathrm{KL}(P_i \,\|\, Q^{y_i})$ is the empirical $I(X; \hat Y | Y)$: what a
    prediction says about its input beyond the class. It is the entropy of the
    centroids less that of the predictions, lies between 0 and that entropy, and is 0 if
    all rows of a class have the same prediction.

    Args:
        logits: Unnormalised log-probabilities.
        labels: Class ids; outside of the classes that have a centroid, the row is NaN,
            without gradient.
        centroids: One per class, constants. None takes those of these rows, for C
            classes: the mean of n rows of a class is biased low, by about
            $1 - 1 / n$, and 0 for n = 1.
        where: True for the rows that count; elsewhere the result and its gradient are
            0, and centroids leave the row out.

    Returns:
        A number per row, float32 (float64 if an argument is float64); 0, without
        gradient and without a part in its centroid, for a row of -inf only.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together.

    Derivatives: forward and reverse mode, any order, with respect to `logits`;
        centroids are constants. For a sum over all rows that gradient is the whole one,
        because the centroid minimises it.
    Cost: a few passes over `logits`.
    Source: "Bayes Conditional Distribution Estimation for Knowledge Distillation Based
        on Conditional Mutual Information".

    Example:
        >>> logits, labels = jnp.array([[2.0, 0.0], [0.0, 2.0]]), jnp.array([0, 0])
        >>> cmi = softlib.information.conditional_mutual_information
        >>> print(cmi(logits, labels).round(4))
        [0.3278 0.3278]
    """
    function = "conditional_mutual_information"
    checks.require_floating(function, logits=logits)
    classes = _outcomes(function, "logits", logits)
    kept = _kept(function, labels, where, logits.shape[0])
    dtype = accumulator_dtype(logits)
    some = kept & (logits != -jnp.inf).any(1)
    log_p = jax.nn.log_softmax(jnp.where(some[:, None], logits.astype(dtype), 0))
    if centroids is None:
        sums = _sums(function, jnp.exp(log_p), labels, classes, some)
        centroids = sums.centroids()
    checks.require_floating(function, centroids=centroids)
    count = _classes(function, centroids)
    why = "as many outcomes as `logits`"
    checks.require_shape(function, "centroids", centroids, (count, classes), why)
    q = lax.stop_gradient(centroids).astype(common_dtype(dtype, centroids.dtype))
    labels = labels_in_range(labels, count)
    inside = labels >= 0
    counts = kept & inside
    q = q[jnp.where(counts, labels, 0)]
    found = jnp.where(counts & some, _divergence(log_p, q), 0)
    return jnp.where(kept & ~inside, jnp.nan, found)


def _divergence(
    log_p: Float[Array, "N C"], q: Float[Array, "N C"]
) -> Float[Array, " N"]:
    """KL(p || q) as the sum of p log(p / q) - p + q, of which no term is negative."""
    p = jnp.exp(log_p)
    # An outcome with p = 0 adds q, whatever its ratio.
    none = p == 0
    ratio = jnp.where(none, 0, log_p) - jnp.log(jnp.where(none, 1, q))
    return (p * jnp.where(none, 0, ratio) - p + q).sum(1)


def _sums(
    function: str,
    probs: Array,
    labels: Array,
    num_classes: int,
    where: Array | None,
) -> CentroidSums:
    probs, labels = jnp.asarray(probs), jnp.asarray(labels)
    checks.require_floating(function, probs=probs)
    checks.require_positive_integer(function, "num_classes", num_classes)
    outcomes = _outcomes(function, "probs", probs)
    kept = _kept(function, labels, where, probs.shape[0])
    labels = labels_in_range(labels, num_classes)
    kept = kept & (labels >= 0)
    dtype = accumulator_dtype(probs)
    probs = jnp.where(kept[:, None], probs.astype(dtype), 0)
    labels = jnp.where(kept, labels, 0)
    sums = jnp.zeros((num_classes, outcomes), dtype).at[labels].add(probs)
    counts = jnp.zeros(num_classes, dtype).at[labels].add(kept.astype(dtype))
    return CentroidSums(sums, counts)


def _kept(
    function: str, labels: Array, where: Array | None, rows: int
) -> Bool[Array, " N"]:
    checks.require_integer(function, labels=labels)
    checks.require_shape(function, "labels", labels, (rows,), "one per row")
    if where is None:
        return jnp.ones(rows, bool)
    where = jnp.asarray(where)
    checks.require_boolean(function, where=where)
    checks.require_shape(function, "where", where, (rows,), "one per row")
    return where


def _outcomes(function: str, name: str, array: Array) -> int:
    if array.ndim != 2:
        raise ValueError(
            f"{function}: `{name}` must have shape (N, C), got {array.shape}."
        )
    return array.shape[1]


def _classes(function: str, centroids: Array) -> int:
    if centroids.ndim != 2:
        raise ValueError(
            f"{function}: `centroids` must have shape (K, C), got {centroids.shape}."
        )
    return centroids.shape[0]
