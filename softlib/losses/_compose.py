"""Losses as compositions of row statistics, from either source.

Each public loss builds a source, asks `prepare` for its rows, and composes numbers per
row here. The order of the selections is the order of precedence: a row that `where`
drops is 0, then a label outside the vocabulary is NaN, then a row without classes is
0, then a label on an excluded class is infinitely unlikely.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from softlib import _checks as checks
from softlib.typing import Scalar

from ._sources import GivenLogits, Source, labels_in_range
from ._tile import RowStatistics

METRICS = ("loss", "log_prob", "entropy", "correct", "lse")


class TokenMetrics(NamedTuple):
    """Numbers per token from one pass over the vocabulary; None if not asked for.

    Attributes:
        loss: Cross-entropy in nats, with smoothing and penalty if these are set.
        log_prob: Log-probability of the label in nats, without either.
        entropy: Entropy of the predicted distribution in nats.
        correct: Whether the label is the most likely class (the lowest one on ties).
        lse: Logsumexp of the logits.

    Derivatives: see `linear_token_metrics`; `correct` has none.
    Cost: a number per token and field.

    Example:
        >>> logits, labels = jnp.array([[2.0, 0.0], [0.0, 1.0]]), jnp.array([0, 0])
        >>> metrics = softlib.losses.softmax_token_metrics(logits, labels)
        >>> print(metrics.loss.round(4), metrics.correct)
        [0.1269 1.3133] [ True False]
    """

    loss: Float[Array, "*batch"] | None = None
    log_prob: Float[Array, "*batch"] | None = None
    entropy: Float[Array, "*batch"] | None = None
    correct: Bool[Array, "*batch"] | None = None
    lse: Float[Array, "*batch"] | None = None


@dataclasses.dataclass(frozen=True)
class Rows:
    """Statistics of the rows, with all that decides about exceptions."""

    statistics: RowStatistics
    where: Bool[Array, "*batch"] | None
    labels: Int[Array, "*batch"] | None = None  # -1: outside the vocabulary
    excluded: Bool[Array, "*batch"] | None = None  # label on an excluded class
    label_weight: Float[Array, "*batch"] | None = None  # sum of a soft label
    classes: ArrayLike = 0  # how many are selected, per row or for all

    @property
    def empty(self) -> Bool[Array, "*batch"]:
        assert self.statistics.lse is not None
        return self.statistics.lse == -jnp.inf

    @property
    def lse(self) -> Float[Array, "*batch"]:
        """The logsumexp to compute with: 0 in an empty row."""
        assert self.statistics.lse is not None
        return jnp.where(self.empty, 0, self.statistics.lse)

    def counted(self, values: Array, bad: ArrayLike = 0) -> Array:
        """0 where `where` is False."""
        return values if self.where is None else jnp.where(self.where, values, bad)


def prepare(
    source: Source,
    names: Sequence[str],
    labels: ArrayLike | None,
    where: ArrayLike | None,
) -> Rows:
    """Checks labels and `where`, masks the rows and takes the statistics of the rest.

    `names` must hold lse, and what the compositions below read beside it.
    """
    function, batch = source.function, source.batch
    if where is not None:
        where = jnp.asarray(where)
        checks.require_boolean(function, where=where)
        checks.require_broadcastable(function, "where", where, batch, "the batch shape")
        where = jnp.broadcast_to(where, batch)
    source = source.masked(where)
    classes = source.count_classes()
    if labels is None:
        return Rows(source.statistics(names), where, classes=classes)

    labels = jnp.asarray(labels)
    if jnp.issubdtype(labels.dtype, jnp.floating) and isinstance(source, GivenLogits):
        return _with_soft_labels(source, names, labels, where, classes)
    checks.require_integer(function, labels=labels)
    checks.require_shape(function, "labels", labels, batch, "the batch shape")
    labels = labels_in_range(labels, source.vocabulary)
    if where is not None:
        labels = jnp.where(where, labels, 0)
    excluded = None
    if source.modifiers.class_where is not None:
        excluded = source.at_labels(source.modifiers.class_where, labels) == 0
    return Rows(
        source.statistics(names, labels), where, labels, excluded, None, classes
    )


def cross_entropy(
    rows: Rows, label_smoothing: Scalar, logsumexp_penalty: Scalar
) -> Float[Array, "*batch"]:
    s, lse = rows.statistics, rows.lse
    assert s.label_logits is not None
    # For a distribution q as label: sum_j q_j (lse - z_j).
    weight = 1 if rows.label_weight is None else rows.label_weight
    loss = weight * lse - s.label_logits
    if s.sum_logits is not None:
        mean = s.sum_logits / jnp.maximum(rows.classes, 1)
        loss = (1 - label_smoothing) * loss + label_smoothing * weight * (lse - mean)
    if not _is_zero(logsumexp_penalty):
        loss = loss + logsumexp_penalty * lse**2
    return _exceptions(rows, loss, jnp.inf)


def log_probability(rows: Rows) -> Float[Array, "*batch"]:
    assert rows.statistics.label_logits is not None
    return _exceptions(rows, rows.statistics.label_logits - rows.lse, -jnp.inf)


def entropy(rows: Rows) -> Float[Array, "*batch"]:
    assert rows.statistics.mean_logit is not None
    return rows.counted(rows.lse - rows.statistics.mean_logit)


def correct(rows: Rows) -> Bool[Array, "*batch"]:
    hit = (rows.statistics.argmax == rows.labels) & ~rows.empty
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
) -> TokenMetrics:
    """The one composition behind every public loss of this package."""
    function = source.function
    checks.require_names(function, "metrics", metrics, METRICS)
    checks.require_scalar(function, "label_smoothing", label_smoothing, 0, 1)
    checks.require_scalar(function, "logsumexp_penalty", logsumexp_penalty, 0, math.inf)
    names = {"lse"}
    if "loss" in metrics or "log_prob" in metrics:
        names.add("label_logits")
    if "loss" in metrics and not _is_zero(label_smoothing):
        names.add("sum_logits")
    if "entropy" in metrics:
        names.add("mean_logit")
    if "correct" in metrics:
        names.add("argmax")
    rows = prepare(source, sorted(names), labels, where)
    compute = {
        "loss": lambda: cross_entropy(rows, label_smoothing, logsumexp_penalty),
        "log_prob": lambda: log_probability(rows),
        "entropy": lambda: entropy(rows),
        "correct": lambda: correct(rows),
        "lse": lambda: logsumexp(rows),
    }
    return TokenMetrics(**{name: compute[name]() for name in metrics})


def _exceptions(rows: Rows, values: Array, impossible: float) -> Array:
    if rows.excluded is not None:
        values = jnp.where(rows.excluded, impossible, values)
    values = jnp.where(rows.empty, 0, values)
    if rows.labels is not None:
        values = jnp.where(rows.labels < 0, jnp.nan, values)
    return rows.counted(values)


def _with_soft_labels(
    source: GivenLogits,
    names: Sequence[str],
    labels: Float[Array, "*batch V"],
    where: Array | None,
    classes: ArrayLike,
) -> Rows:
    function, shape = source.function, source.logits.shape
    if "argmax" in names:
        raise TypeError(
            f"{function}: `labels` must be class ids (an integer dtype) to be correct "
            f"or not, got {labels.dtype}."
        )
    checks.require_shape(function, "labels", labels, shape, "the shape of `logits`")
    labels = labels.astype(jnp.promote_types(labels.dtype, jnp.float32))
    if where is not None:
        labels = jnp.where(where[..., None], labels, 0)
    z = source.final_logits()
    # A class without mass adds 0 even if its logit is -inf, and so does an excluded
    # class: a row with mass on one is decided below.
    ignored = (labels == 0) & (z == -jnp.inf)
    excluded = None
    if source.modifiers.class_where is not None:
        outside = jnp.broadcast_to(~source.modifiers.class_where, shape)
        excluded = ((labels != 0) & outside).any(-1)
        ignored = ignored | outside
    mass = jnp.where(ignored, 0, labels * jnp.where(ignored, 0, z)).sum(-1)
    statistics = source.statistics([n for n in names if n != "label_logits"])
    statistics = statistics._replace(label_logits=mass)
    return Rows(statistics, where, None, excluded, labels.sum(-1), classes)


def _is_zero(value: Scalar) -> bool:
    """Whether an option is statically off; a traced one is never off."""
    return isinstance(value, int | float) and value == 0
