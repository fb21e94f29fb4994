r"""Cross-entropy of StableMax probabilities."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import common_dtype
from softlib._sharding import in_auto_mode
from softlib._stable_weight import distance, log_stable_weight, stable_weight
from softlib.logits import Logits, _compose
from softlib.logits._engine.tile import RowStatistics
from softlib.logits._labelled_rows import (
    Rows,
    impossible_labels,
    impossible_masses,
    mark,
    massless,
    rows_that_count,
    without_classes,
)
from softlib.logits._sources import StoredLogits, array_source_of


@array_arguments
def stablemax_cross_entropy(
    logits: Logits,
    labels: Integer[Array, "*batch"] | Float[Array, "*batch V"],
    *,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""Minus the logarithm of the StableMax probability of the label, in nats per row.

    With $s$ of `softlib.softmax.stablemax`, for a class id $y$ or a distribution $q$

    $$L = \log \Bigl(1 + \frac{1}{s(z_y)} \sum_{j \neq y} s(z_j)\Bigr), \qquad
        L = -\sum_k q_k \log \frac{s(z_k)}{\sum_j s(z_j)} .$$

    The loss falls like the inverse of the label's logit, not like its exponential, so
    that a network that fits its data goes on learning. Computed as
    $\log(s(z_y) / \sum s)$ it would round to 0 in float32 for logits of about $10^5$.
    The sum above leaves the label out, so that neither loss nor gradient does.

    Args:
        logits: Scores as an array or `softlib.logits.StoredLogits`, in float32 or
            wider. Their sign matters: StableMax is not invariant to a shift. No stream
            adds up $s$, so that logits of a head raise: `materialize()` forms them.
        labels: Integers are class ids in $[0, V)$. Outside, the loss is NaN and the row
            has no gradient; the label of an excluded class costs
            +inf, without gradient. Floating numbers of the shape of `logits` are
            distributions, where a mass of 0 on a logit of -inf costs 0; they have the
            plain form, which is 0 where it rounds to it.
        where: True for the rows that count; the others cost 0, whatever they hold.

    Returns:
        The loss per row, float32 (float64 if an argument is float64): 0 without
        classes, +inf if all logits are -inf, both with gradient 0.

    Raises:
        TypeError: An argument has the wrong kind of dtype, or the logits are a head's.
        ValueError: Shapes do not fit together.

    Derivatives: forward and reverse mode, any order;
        $\partial L / \partial z_k = (p_k - [k = y]) / (1 + |z_k|)$.
    Cost: one pass over `logits` forward, without a maximum; the logits and two numbers
        per row are all that the gradient of class ids is made of.
    Source: "Grokking at the Edge of Numerical Stability". Deviations: float32 without
        cancellation, where the paper's code computes in float64; nothing is added to
        $1 - z$, which is never below 1.

    Example:
        >>> logits, labels = jnp.array([[1.0, 0.0], [1e6, 0.0]]), jnp.array([0, 0])
        >>> loss = softlib.losses.stablemax_cross_entropy(logits, labels)
        >>> print(loss.round(4), loss > 0)
        [0.4055 0.    ] [ True  True]
    """
    function = "stablemax_cross_entropy"
    source = array_source_of(function, logits)
    where = rows_that_count(source, where)
    source = source.masked(where)
    labels = jnp.asarray(labels)
    if jnp.issubdtype(labels.dtype, jnp.floating):
        rows = _of_distributions(source, labels, where)
    else:
        checks.require_integer(function, labels=labels)
        checks.require_shape(
            function, "labels", labels, source.batch_shape, "the batch shape"
        )
        rows = _of_ids(source, labels, where)
    return _compose.cross_entropy(rows, 0, 0)


def _of_ids(source: StoredLogits, labels: Array, where: Array | None) -> Rows:
    marked = mark(source, labels, where, None)
    statistics = _statistics(source)
    impossible = impossible_labels(statistics, marked.excluded)
    over_rows = lambda spec: PartitionSpec(*spec[: len(source.batch_shape)])
    cost = in_auto_mode(_cost, over_rows, source.materialize(), marked.labels)
    return Rows(
        statistics,
        where,
        marked.labels,
        outside=marked.labels < 0,
        no_classes=marked.no_classes,
        impossible=impossible,
        infinite=impossible,
        label_cost=cost,
    )


# Without this rule JAX keeps several arrays and squares the sum of s.
@jax.custom_jvp
def _cost(x: Array, labels: Array) -> Array:
    """log(1 + rest / s(x_y)); 0 in a row without entries."""
    own, rest = _sums(x, labels)
    ratio = rest / jnp.where(own == 0, 1, own)
    # Where the ratio overflows the 1 does not count.
    far = ratio == jnp.inf
    log_ratio = jnp.log(jnp.where(far, rest, 1)) - jnp.log(jnp.where(far, own, 1))
    cost = jnp.where(far, log_ratio, jnp.log1p(jnp.where(far, 0, ratio)))
    impossible = jnp.where(rest == 0, 0, rest + jnp.inf)  # NaN stays
    return jnp.where(own == 0, impossible, cost)


@_cost.defjvp
def _(primals, tangents):
    (x, labels), (dx, _) = primals, tangents
    own, rest = _sums(x, labels)
    total = own + rest
    total = jnp.where(total == 0, 1, total)[..., None]
    u = distance(x)
    # s / u is 1 or 1 / u^2. The label's is -rest / sum: p_y - 1 would round to 0 while
    # the loss is still far from 0.
    others = jnp.where(x < 0, 1 / u / u, 1)
    slope = jnp.where(_is_label(x, labels), -rest[..., None] / u, others) / total
    return _cost(x, labels), (slope * dx).sum(-1)


def _sums(x: Array, labels: Array) -> tuple[Array, Array]:
    """Values of s: the label's, and the sum of all others; NaN if they overflow."""
    is_label = _is_label(x, labels)
    of_label = jnp.where(is_label, x, 0).sum(-1)
    own = jnp.where(labels < 0, 0, stable_weight(of_label))
    rest = stable_weight(jnp.where(is_label, -jnp.inf, x)).sum(-1)
    return _no_overflow(own), _no_overflow(rest)


def _is_label(x: Array, labels: Array) -> Array:
    ids = lax.broadcasted_iota(labels.dtype, x.shape, x.ndim - 1)
    return ids == labels[..., None]


def _of_distributions(source: StoredLogits, labels: Array, where: Array | None) -> Rows:
    checks.require_shape(
        source.function, "labels", labels, source.logits.shape, "the shape of `logits`"
    )
    labels = labels.astype(common_dtype(labels.dtype, source.dtype))
    if where is not None:
        labels = jnp.where(where[..., None], labels, 0)
    outside = None
    if source.modifiers.class_where is not None:
        outside = jnp.broadcast_to(~source.modifiers.class_where, labels.shape)
    statistics = _statistics(source)
    impossible = impossible_masses(labels, massless(statistics), outside)
    x = source.materialize()
    total = _no_overflow(stable_weight(x).sum(-1, keepdims=True))
    total = jnp.where(total == 0, 1, total)
    # `labels != 0` alone would lose the derivative in a mass of 0: the cost.
    asked = (labels != 0) | (x != -jnp.inf)
    cost = jnp.log(total) - log_stable_weight(jnp.where(asked, x, 0))
    return Rows(
        statistics,
        where,
        no_classes=without_classes(source),
        impossible=impossible,
        infinite=impossible,
        label_cost=jnp.where(asked, labels * cost, 0).sum(-1),
    )


def _statistics(source: StoredLogits) -> RowStatistics:
    """Statistics that mark rows without entries by lse -inf, other rows by 0."""
    some = (source.materialize() > -jnp.inf).any(-1)
    return RowStatistics(lse=jnp.where(some, 0.0, -jnp.inf))


def _no_overflow(total: Array) -> Array:
    return jnp.where(total == jnp.inf, jnp.nan, total)
