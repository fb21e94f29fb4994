"""Measures of parsers of logs: of messages, and of groups of messages."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._ids import labels_in_range
from softlib._nan import nan_where


class LogParsingMetrics(NamedTuple):
    """Four shares in [0, 1]; 1 is a perfect parser.

    Attributes:
        ga: Grouping accuracy: the share of the messages whose group is found exactly.
        fga: F1 score of grouping: of the groups, each counting once.
        pa: Parsing accuracy: the share of the messages whose template is right. None
            if texts were not compared.
        fta: F1 score of template accuracy: of the templates. None as above.
    """

    ga: Float[Array, ""]
    fga: Float[Array, ""]
    pa: Float[Array, ""] | None
    fta: Float[Array, ""] | None


@array_arguments
def grouping_metrics(
    true_ids: Integer[Array, " N"],
    pred_ids: Integer[Array, " N"],
    *,
    num_true: int,
    num_pred: int,
    same_template: Bool[Array, " N"] | None = None,
    where: Bool[Array, "..."] | None = None,
) -> LogParsingMetrics:
    r"""Shares of a log whose groups and templates a parser finds.

    A true group is found if one predicted group holds its messages and no others. With
    $g$ groups found, $\mathrm{FGA} = 2 g / (\text{true groups} + \text{predicted
    groups})$, so that a rare template counts as much as one of a million messages;
    $\mathrm{GA}$ is the share of the messages that are in those groups. A predicted
    template is right if all its messages are of one true template, which it equals;
    $\mathrm{FTA}$ is the F1 score of these.

    Args:
        true_ids: The true template of each message, in `[0, num_true)`.
        pred_ids: The predicted one, in `[0, num_pred)`, one id for each text.
        num_true: Static, at least the number of true templates; ids without a message
            do not count.
        num_pred: Static, at least the number of predicted ones.
        same_template: Whether the text of the predicted template is that of the true
            one.
        where: True for the messages that have a true template; others are left out.

    Returns:
        The four measures, float32 (float64 if enabled), from exact counts; 0 without
        messages. NaN if an id that counts is out of range.

    Raises:
        TypeError: Ids are no integers, or a mask is not boolean.
        ValueError: Shapes do not fit together, or a number of groups is below 1.

    Derivatives: none, the result counts.
    Cost: O(N + `num_true` + `num_pred`) time and memory: no table of pairs is made.
    Source: "A Large-Scale Evaluation for Log Parsing Techniques: How Far Are We?".

    Example:
        >>> true, predicted = jnp.array([0, 0, 0, 1, 2]), jnp.array([0, 0, 0, 1, 1])
        >>> of = softlib.logs.grouping_metrics
        >>> found = of(true, predicted, num_true=3, num_pred=2)
        >>> print(found.ga.round(3), found.fga.round(3))
        0.6 0.4
    """
    function = "grouping_metrics"
    checks.require_integer(function, true_ids=true_ids, pred_ids=pred_ids)
    checks.require_positive_integer(function, "num_true", num_true)
    checks.require_positive_integer(function, "num_pred", num_pred)
    if true_ids.ndim != 1:
        raise ValueError(
            f"{function}: `true_ids` must have one axis, one id for each message, got "
            f"shape {true_ids.shape}."
        )
    shape = true_ids.shape
    why = "one entry for each message"
    checks.require_shape(function, "pred_ids", pred_ids, shape, why)
    if same_template is not None:
        checks.require_boolean(function, same_template=same_template)
        checks.require_shape(function, "same_template", same_template, shape, why)
    where = checks.checked_where(function, where, shape, why)

    true, predicted = (
        labels_in_range(true_ids, num_true),
        labels_in_range(pred_ids, num_pred),
    )
    bad = jnp.any(where & ((true < 0) | (predicted < 0)))
    # Counts are int32: float32 cannot count beyond 2**24.
    counted = where.astype(jnp.int32)
    true_sizes = _sums(counted, true, num_true)
    pred_sizes = _sums(counted, predicted, num_pred)
    least, most = _range_within(predicted, true, where, num_true)
    exact = (true_sizes > 0) & (least == most)
    exact &= true_sizes == pred_sizes[jnp.clip(least, 0, num_pred - 1)]
    num_true_seen = jnp.sum(true_sizes > 0, dtype=jnp.int32)
    num_pred_seen = jnp.sum(pred_sizes > 0, dtype=jnp.int32)
    total = counted.sum(dtype=jnp.int32)
    ga = _share(jnp.where(exact, true_sizes, 0).sum(dtype=jnp.int32), total, bad)
    fga = _f1(exact.sum(dtype=jnp.int32), num_true_seen, num_pred_seen, bad)
    if same_template is None:
        return LogParsingMetrics(ga, fga, None, None)

    right = where & same_template
    pa = _share(right.sum(dtype=jnp.int32), total, bad)
    least, most = _range_within(true, predicted, where, num_pred)
    all_right = _sums(right.astype(jnp.int32), predicted, num_pred) == pred_sizes
    correct = (pred_sizes > 0) & (least == most) & all_right
    fta = _f1(correct.sum(dtype=jnp.int32), num_true_seen, num_pred_seen, bad)
    return LogParsingMetrics(ga, fga, pa, fta)


def _sums(
    values: Int[Array, " N"], groups: Int[Array, " N"], count: int
) -> Int[Array, " G"]:
    # A negative id would wrap; `count` is out of bounds, and dropped.
    groups = jnp.where(groups < 0, count, groups)
    return jax.ops.segment_sum(values, groups, count)


def _range_within(
    values: Int[Array, " N"],
    groups: Int[Array, " N"],
    where: Bool[Array, " N"],
    count: int,
) -> tuple[Int[Array, " G"], Int[Array, " G"]]:
    """The least and the largest value in each group of what counts."""
    groups = jnp.where(where & (groups >= 0), groups, count)
    return (
        jax.ops.segment_min(values, groups, count),
        jax.ops.segment_max(values, groups, count),
    )


def _share(
    part: Int[Array, ""], whole: Int[Array, ""], bad: Bool[Array, ""]
) -> Float[Array, ""]:
    return nan_where(bad, part.astype(float) / jnp.maximum(whole, 1).astype(float))


def _f1(
    hits: Int[Array, ""],
    num_true: Int[Array, ""],
    num_pred: Int[Array, ""],
    bad: Bool[Array, ""],
) -> Float[Array, ""]:
    # 2 P R / (P + R) with P = hits / num_pred and R = hits / num_true.
    return _share(2 * hits, num_true + num_pred, bad)
