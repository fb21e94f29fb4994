"""Losses as compositions of row statistics, for all sources of logits.

A public loss builds a source, gets its rows from `prepare`, and composes their numbers
here. Special values take precedence in this order: 0 for a row that `where` drops, NaN
for a label outside the vocabulary, 0 for a row without classes, and probability 0 for a
label on an excluded class or in a row whose logits are all -inf.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from softlib import _checks as checks
from softlib._dtypes import accumulator_dtype, promoted
from softlib.typing import Scalar

from ._labelled_rows import Rows, prepare, prepare_chained
from ._sources import Source, StoredLogits

METRICS = ("loss", "log_prob", "entropy", "correct", "lse")


class TokenMetrics(NamedTuple):
    """Numbers per token from one pass over the vocabulary; None if not requested.

    Attributes:
        loss: Cross-entropy in nats, with smoothing and penalty if these are set.
        log_prob: Log-probability of the label in nats, without either.
        entropy: Entropy of the predicted distribution in nats.
        correct: Whether the label is the most likely class (the lowest one on ties).
        lse: Logsumexp of the logits.

    Derivatives: see `token_metrics`; `correct` has none.
    Cost: a number per token and field.

    Example:
        >>> logits, labels = jnp.array([[2.0, 0.0], [0.0, 1.0]]), jnp.array([0, 0])
        >>> metrics = softlib.logits.token_metrics(logits, labels)
        >>> print(metrics.loss.round(4), metrics.correct)
        [0.1269 1.3133] [ True False]
    """

    loss: Float[Array, "*batch"] | None = None
    log_prob: Float[Array, "*batch"] | None = None
    entropy: Float[Array, "*batch"] | None = None
    correct: Bool[Array, "*batch"] | None = None
    lse: Float[Array, "*batch"] | None = None


def cross_entropy(
    rows: Rows, label_smoothing: Scalar, logsumexp_penalty: Scalar
) -> Float[Array, "*batch"]:
    loss = rows.label_cost
    assert loss is not None
    loss, label_smoothing, logsumexp_penalty = promoted(
        loss, label_smoothing, logsumexp_penalty
    )
    if rows.uniform_cost is not None:
        loss = (1 - label_smoothing) * loss + label_smoothing * rows.uniform_cost
    if not is_zero(logsumexp_penalty):
        loss = loss + logsumexp_penalty * rows.lse**2
    return with_exceptions(rows, rows.infinite, loss, jnp.inf)


def cross_entropy_statistics(
    source: Source,
    label_smoothing: Scalar,
    logsumexp_penalty: Scalar,
    class_weights: ArrayLike | None,
) -> set[str]:
    """Checks the options of `cross_entropy` and returns the statistics it needs."""
    function = source.function
    checks.require_scalar(function, "label_smoothing", label_smoothing, 0, 1)
    checks.require_scalar(function, "logsumexp_penalty", logsumexp_penalty, 0, math.inf)
    names = {"lse", "label_logits"}
    if is_zero(label_smoothing):
        return names
    if class_weights is not None and not isinstance(source, StoredLogits):
        static = isinstance(label_smoothing, int | float)
        raise ValueError(
            f"{function}: `label_smoothing` must be 0 with `class_weights` on a linear "
            f"head, got {label_smoothing if static else 'a traced number'}. Only the "
            "same loss of given logits weighs the classes over which it is spread."
        )
    return names | {"sum_logits"}


def log_probability(rows: Rows) -> Float[Array, "*batch"]:
    assert rows.log_prob is not None
    return with_exceptions(rows, rows.impossible, rows.log_prob, -jnp.inf)


def log_probability_of_labels(
    source: Source, labels: ArrayLike, where: ArrayLike | None
) -> Float[Array, "*batch"]:
    """Log-probabilities of class ids, with the special values of all losses."""
    names = ("lse", "label_logits")
    return log_probability(prepare(source, names, labels, where, distributions=False))


def surprisal_of_labels(
    source: Source, labels: ArrayLike | None, where: ArrayLike | None
) -> Float[Array, "*batch"]:
    """-log p of class ids, or of the likeliest classes, without cancellation."""
    if labels is None:
        best = prepare(source, ("lse", "argmax"), None, where).statistics.argmax
        assert best is not None
        labels = best
    names = ("lse", "label_logits")
    rows = prepare(source, names, labels, where, distributions=False, apart=True)
    assert rows.log_prob is not None
    return with_exceptions(rows, rows.impossible, 0 - rows.log_prob, jnp.inf)


def chained_log_probability(
    source: Source, labels: Array, where: Array | None
) -> tuple[Float[Array, "*batch"], Source]:
    """`log_probability_of_labels`, and the source for the loss' next term."""
    rows, then = prepare_chained(source, labels, where)
    return log_probability(rows), then


def of_log_prob(
    log_prob: Float[Array, "*shape"],
    loss: Callable[[Array], Array],
    impossible: ArrayLike,
) -> Float[Array, "*shape"]:
    """`loss` of -log p; `impossible` for p = 0, NaN for NaN, neither with a gradient.

    If `loss` is 0 at 0, the special values of `log_probability` become those of losses.
    """
    possible = log_prob > -jnp.inf  # False for NaN
    # 0 - x instead of -x: the loss of a certain label is 0, not -0.
    values = loss(0 - jnp.where(possible, log_prob, 0))
    limit = jnp.where(jnp.isnan(log_prob), jnp.nan, impossible)
    return jnp.where(possible, values, limit)


def wide_log_prob(function: str, log_prob: ArrayLike) -> Float[Array, "*shape"]:
    """A checked argument `log_prob`, as float32 at least."""
    log_prob = jnp.asarray(log_prob)
    checks.require_floating(function, log_prob=log_prob)
    return log_prob.astype(accumulator_dtype(log_prob))


def entropy(rows: Rows) -> Float[Array, "*batch"]:
    assert rows.statistics.mean_logit is not None
    return rows.counted(rows.lse - rows.statistics.mean_logit)


def correct(rows: Rows) -> Bool[Array, "*batch"]:
    hit = (rows.statistics.argmax == rows.labels) & ~rows.massless
    return rows.counted(hit, False)


def logsumexp(rows: Rows) -> Float[Array, "*batch"]:
    assert rows.statistics.lse is not None
    return rows.counted(rows.statistics.lse)


def token_metrics(
    source: Source,
    labels: ArrayLike,
    *,
    metrics: Sequence[str],
    label_smoothing: Scalar,
    logsumexp_penalty: Scalar,
    where: ArrayLike | None,
    class_weights: ArrayLike | None = None,
) -> TokenMetrics:
    """Several compositions of the same statistics; `class_weights` are of the loss."""
    checks.require_names(source.function, "metrics", metrics, METRICS)
    smoothing = (label_smoothing, logsumexp_penalty, class_weights)
    of_loss = cross_entropy_statistics(source, *smoothing)
    names = {"lse"}
    if "loss" in metrics:
        names |= of_loss
    if "log_prob" in metrics:
        names.add("label_logits")
    if "entropy" in metrics:
        names.add("mean_logit")
    if "correct" in metrics:
        names.add("argmax")
    rows = prepare(source, sorted(names), labels, where, class_weights=class_weights)
    compute = {
        "loss": lambda: cross_entropy(rows, label_smoothing, logsumexp_penalty),
        "log_prob": lambda: log_probability(rows),
        "entropy": lambda: entropy(rows),
        "correct": lambda: correct(rows),
        "lse": lambda: logsumexp(rows),
    }
    return TokenMetrics(**{name: compute[name]() for name in metrics})


def with_exceptions(
    rows: Rows, impossible: Array | None, values: Array, limit: float
) -> Array:
    """The values, replaced in rows with special values, in order of precedence."""
    if impossible is not None:
        values = jnp.where(impossible, limit, values)
    if rows.no_classes is not None:
        values = jnp.where(rows.no_classes, 0, values)
    if rows.outside is not None:
        values = jnp.where(rows.outside, jnp.nan, values)
    return rows.counted(values)


def is_zero(value: Scalar) -> bool:
    """Whether an option is the Python number 0; a traced one is not."""
    return isinstance(value, int | float) and value == 0
