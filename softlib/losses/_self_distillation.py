r"""Distillation without a teacher: soft labels from the student's own outputs."""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype, promoted
from softlib._ids import labels_in_range
from softlib._masked_mean import masked_mean
from softlib.logits._labelled_rows import weigh
from softlib.typing import Scalar


class USKDTerms(NamedTuple):
    """The terms of `universal_self_distillation_loss`, weighted, one number per row.

    Attributes:
        target: Term of the label's class (of both for mixed labels), in nats.
        non_target: Term of the other classes, in nats.
        weak: Term of the weak classifier, in nats.

    Derivatives: see `universal_self_distillation_loss`.
    Cost: three numbers per row.

    Example:
        >>> logits, labels = jnp.zeros((2, 3)), jnp.array([0, 2])
        >>> loss = softlib.losses.universal_self_distillation_loss
        >>> print(loss(logits, logits, labels, alpha=0.0, mu=0.0).target)
        [0. 0.]
    """

    target: Float[Array, " N"]
    non_target: Float[Array, " N"]
    weak: Float[Array, " N"]


@array_arguments
def universal_self_distillation_loss(
    logits: Float[Array, "N C"],
    weak_logits: Float[Array, "N C"],
    labels: Integer[Array, " N"] | Float[Array, "N C"],
    *,
    alpha: Scalar = 1.0,
    beta: Scalar = 0.1,
    mu: Scalar = 0.005,
    label_smoothing: Scalar = 0.1,
    mean_square_target: Float[Array, "..."] | None = None,
    where: Bool[Array, " N"] | None = None,
) -> USKDTerms:
    r"""Universal self-distillation (USKD): soft labels from a network's own outputs.

    With $S$ and $W$ the softmax of the logits and of those of a weak classifier, which
    reads an earlier layer, $y$ the label of value $V_y$ and $\hat S$ the softmax among
    the other classes, the terms are

    $$\alpha\, (S_y^2 + V_y - \overline{S_y^2})\, (-\log S_y), \qquad
        -\beta \sum_{j \neq y} Z_j \log \hat S_j, \qquad
        -\mu \sum_j ((1 - \epsilon) [j = y] + \epsilon / C) \log W_j ,$$

    where the bar is the mean over the batch and $Z$ is Zipf's law over the other
    classes in the order of $W_j / (1 - W_y) + S_j / (1 - S_y)$: `zipf_soft_labels`. The
    soft labels are constants. The sum of the terms is added to cross-entropy.

    Args:
        logits: Unnormalised log-probabilities.
        weak_logits: Those of the weak classifier; only the third term trains it.
        labels: Class ids in $[0, C)$; outside, the row's terms are NaN, without
            gradient, and it does not enter the mean. Floating labels are distributions
            mixed of two classes: both largest values are targets (0 is none).
        alpha: Factor of the first term, $\geq 0$; an array is traced, differentiable.
        beta: Factor of the second term, $\geq 0$; an array is traced, differentiable.
        mu: Factor of the third term, $\geq 0$; an array is traced, differentiable.
        label_smoothing: $\epsilon \in [0, 1]$ of the third term.
        mean_square_target: $\overline{S_y^2}$, such as a mean over devices or a running
            mean. A scalar; for floating labels one for each of the two targets. None
            takes the mean of this batch, which couples its rows.
        where: True for the rows that count. Elsewhere the terms and all gradients are
            exactly 0, and the mean leaves the row out.

    Returns:
        `USKDTerms`, float32 (float64 if an argument is float64).

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together, or an option is out of range.

    Derivatives: forward and reverse mode, any order, with respect to both logits and
        the factors; the soft labels have none.
    Cost: a sort of C numbers per row, and a few passes over both logits.
    Source: "From Knowledge Distillation to Self-Knowledge Distillation: A Unified
        Approach with Normalized Loss and Customized Soft Labels". Its public code ranks
        by the logarithm of $S$ instead of $S$, unlike its formula, which is followed
        here. There the second largest label is always a target, here only if not 0.

    Example:
        >>> logits, labels = jnp.array([[2.0, 1.0, 0.0]]), jnp.array([0])
        >>> loss = softlib.losses.universal_self_distillation_loss
        >>> print(loss(logits, logits, labels).non_target.round(4))
        [0.0713]
    """
    function = "universal_self_distillation_loss"
    logits, weak_logits = jnp.asarray(logits), jnp.asarray(weak_logits)
    checks.require_floating(function, logits=logits, weak_logits=weak_logits)
    _require_matrix(function, "logits", logits)
    why = "the shape of `logits`"
    checks.require_shape(function, "weak_logits", weak_logits, logits.shape, why)
    for name, factor in (("alpha", alpha), ("beta", beta), ("mu", mu)):
        checks.require_scalar(function, name, factor, 0, math.inf)
    checks.require_scalar(function, "label_smoothing", label_smoothing, 0, 1)
    rows, classes = logits.shape
    kept = jnp.ones(rows, bool)
    if where is not None:
        where = kept = jnp.asarray(where)
        checks.require_boolean(function, where=where)
        checks.require_shape(function, "where", where, (rows,), "one per row")
    dtype = accumulator_dtype(logits, weak_logits)
    targets = _targets(function, labels, logits.shape, kept, dtype)
    kept = kept & ~targets.outside
    select = lambda array: jnp.where(kept[:, None], array.astype(dtype), 0)
    z, weak = select(logits), select(weak_logits)

    log_s, log_w = _log_softmax(z), _log_softmax(weak)
    log_at = jnp.take_along_axis(log_s, targets.ids, axis=1)
    square = lax.stop_gradient(jnp.exp(2 * log_at))
    if mean_square_target is None:
        mean = masked_mean(square, kept[:, None], axis=0)
    else:
        mean = jnp.asarray(mean_square_target)
        checks.require_floating(function, mean_square_target=mean)
        shapes = ((), targets.ids.shape[1:])
        why = "a scalar, or one per target"
        checks.require_shape_in(function, "mean_square_target", mean, shapes, why)
        mean = jnp.broadcast_to(mean, targets.ids.shape[1:])
    soft = square + targets.values - lax.stop_gradient(mean)[None, :]
    soft = jnp.where(targets.values > 0, soft, 0)
    target = weigh(soft, 0 - log_at).sum(1)

    own = targets.mask
    of_others = lambda log_p: jnp.exp(_log_softmax(log_p, ~own, everywhere=True))
    order = lax.stop_gradient(of_others(z) + of_others(weak))
    zipf = _zipf(order, own)
    non_target = weigh(zipf, 0 - _log_softmax(z, ~own)).sum(1)

    values, label_smoothing = promoted(targets.distribution, label_smoothing)
    smooth = (1 - label_smoothing) * values + label_smoothing / classes
    of_weak = weigh(smooth, 0 - log_w).sum(1)

    def finished(factor: Scalar, term: Array) -> Array:
        term, factor = promoted(term, factor)
        term = jnp.where(kept, factor * term, 0)
        return jnp.where(targets.outside, jnp.nan, term)

    return USKDTerms(
        finished(alpha, target), finished(beta, non_target), finished(mu, of_weak)
    )


@array_arguments
def zipf_soft_labels(
    scores: Float[Array, "N C"], labels: Integer[Array, " N"] | Float[Array, "N C"]
) -> Float[Array, "N C"]:
    r"""Zipf's law over the classes other than the label, in the order of their scores.

    The class of rank $r$, the highest score first, gets $1 / r$. Then the label is set
    to 0, and the row is divided by its sum.

    It is no loss, but the target of the weak term of
    `universal_self_distillation_loss`, for those who mix it with labels of their own.

    Args:
        scores: One per class; the lower class comes first on ties.
        labels: Class ids in $[0, C)$; outside, the row is NaN. Floating labels are
            distributions mixed of two classes: both largest values are taken out
            (unless 0).

    Returns:
        Distributions, float32 (float64 for float64); 0 at the labels. A row without
        other classes is 0.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together.

    Derivatives: none: constants.
    Cost: a sort of C numbers per row.
    Source: "From Knowledge Distillation to Self-Knowledge Distillation: A Unified
        Approach with Normalized Loss and Customized Soft Labels", whose public code
        ranks the label too before it takes it out, as here.

    Example:
        >>> scores, labels = jnp.array([[0.1, 0.6, 0.3]]), jnp.array([1])
        >>> zipf = softlib.losses.zipf_soft_labels(scores, labels)
        >>> print(zipf.round(1))
        [[0.4 0.  0.6]]
    """
    function = "zipf_soft_labels"
    scores = lax.stop_gradient(jnp.asarray(scores))
    checks.require_floating(function, scores=scores)
    _require_matrix(function, "scores", scores)
    dtype = accumulator_dtype(scores)
    everyone = jnp.ones(scores.shape[0], bool)
    targets = _targets(function, labels, scores.shape, everyone, dtype)
    found = _zipf(scores, targets.mask).astype(dtype)
    return jnp.where(targets.outside[:, None], jnp.nan, found)


class _Targets(NamedTuple):
    ids: Array  # (N, 1), or (N, 2) of mixed labels
    values: Array  # of the same shape
    mask: Array  # (N, C): the classes that are targets
    distribution: Array  # (N, C)
    outside: Array  # (N,)


def _targets(
    function: str, labels: Array, shape: tuple[int, ...], kept: Array, dtype
) -> _Targets:
    labels = jnp.asarray(labels)
    rows, classes = shape
    every = jnp.arange(classes)
    if jnp.issubdtype(labels.dtype, jnp.floating):
        checks.require_shape(function, "labels", labels, shape, "one row per example")
        distribution = jnp.where(kept[:, None], labels.astype(dtype), 0)
        distribution = lax.stop_gradient(distribution)
        values, ids = lax.top_k(distribution, min(2, classes))
        outside = jnp.zeros(rows, bool)
    else:
        checks.require_integer(function, labels=labels)
        checks.require_shape(function, "labels", labels, (rows,), "one per row")
        labels = labels_in_range(labels, classes)
        outside = kept & (labels < 0)
        ids = jnp.where(kept & ~outside, labels, 0)[:, None]
        values = jnp.ones((rows, 1), dtype)
        distribution = (every[None, :] == ids).astype(dtype)
    mask = ((every[None, None, :] == ids[..., None]) & (values > 0)[..., None]).any(1)
    return _Targets(ids, values, mask, distribution, outside)


def _zipf(scores: Float[Array, "N C"], own: Bool[Array, "N C"]) -> Float[Array, "N C"]:
    order = jnp.argsort(-scores, axis=1, stable=True)
    rank = jnp.argsort(order, axis=1)  # the inverse permutation
    mass = jnp.where(own, 0, 1 / (rank + 1).astype(accumulator_dtype(scores)))
    total = mass.sum(1, keepdims=True)
    return mass / jnp.where(total == 0, 1, total)


def _log_softmax(
    z: Float[Array, "N C"],
    where: Bool[Array, "N C"] | None = None,
    *,
    everywhere: bool = False,
) -> Float[Array, "N C"]:
    """Log-softmax over the classes of `where`; -inf elsewhere, unless `everywhere`."""
    among = z if where is None else jnp.where(where, z, -jnp.inf)
    top = lax.stop_gradient(among.max(1, keepdims=True))
    empty = top == -jnp.inf
    shifted = jnp.where(empty, -jnp.inf, among - jnp.where(empty, 0, top))
    total = jnp.where(empty, 1, jnp.exp(shifted).sum(1, keepdims=True))
    lse = jnp.where(empty, 0, top) + jnp.log(total)
    return (z if everywhere else among) - lse


def _require_matrix(function: str, name: str, array: Array) -> None:
    if array.ndim != 2:
        raise ValueError(
            f"{function}: `{name}` must have shape (N, C), got {array.shape}."
        )
