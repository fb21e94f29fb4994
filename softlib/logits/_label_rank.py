"""The place of a label among all classes, for recall at k and mean reciprocal rank."""

from typing import Unpack

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Integer

from softlib._array_arguments import array_arguments

from . import _labelled_rows
from ._options import LinearHeadOptions, LogitsOptions
from ._row_statistics import checked_labels
from ._sources import GivenLogits, LinearHead, Source


@array_arguments
def linear_label_rank(
    hidden: Array,
    weight: Array,
    labels: Integer[Array, "*batch"] | Integer[Array, "*batch L"],
    *,
    where: Bool[Array, "..."] | None = None,
    **options: Unpack[LinearHeadOptions],
) -> Int[Array, "*batch"] | Int[Array, "*batch L"]:
    """How many classes a linear head puts before the label: 0 for the most likely one.

    Classes are ordered by descending logit, the lower class first on ties, so that rank
    0 is the class of `linear_top1_correct`. The label is among the first k if its rank
    is below k; its reciprocal rank is 1 / (1 + rank).

    Args:
        hidden: Inputs of the head.
        weight: One row per class; with `vocab_axis=1` one column per class.
        labels: Class ids, one or several per row.
        where: True for the rows that count; broadcasts to the batch shape.
        **options: See `linear_softmax_cross_entropy`.

    Returns:
        int32 of the shape of `labels`: the rank; V, behind every class, for a label
        outside $[0, V)$ or excluded by `class_where`; 0 where `where` is False.

    Raises:
        TypeError: An argument has the wrong kind of dtype, or an option is unknown.
        ValueError: Shapes do not fit together, or an option is out of range.
        NotImplementedError: No implementation that was named can run.

    Derivatives: none, the ranks are integers.
    Cost: two streams over the vocabulary (the logit of the label, then the count), with
        the scratch of `linear_row_statistics`.
    Source: the rank of information retrieval, ties in the order of a stable sort.

    Example:
        >>> hidden, table = jnp.eye(2), jnp.array([[1.0, 0.0], [0.0, 2.0], [0.5, 0.5]])
        >>> print(softlib.losses.linear_label_rank(hidden, table, jnp.array([2, 1])))
        [1 0]
    """
    source = LinearHead.of("linear_label_rank", hidden, weight, **options)
    return _rank(source, labels, where)


@array_arguments
def label_rank(
    logits: Array,
    labels: Integer[Array, "*batch"] | Integer[Array, "*batch L"],
    *,
    where: Bool[Array, "..."] | None = None,
    **options: Unpack[LogitsOptions],
) -> Int[Array, "*batch"] | Int[Array, "*batch L"]:
    """How many classes have a greater logit than the label: 0 for the most likely one.

    The rank of `linear_label_rank`, from logits that exist.

    Args:
        logits: Unnormalised log-probabilities.
        labels: Class ids, one or several per row.
        where: True for the rows that count; broadcasts to the batch shape.
        **options: See `softmax_cross_entropy`.

    Returns:
        int32 of the shape of `labels`: the rank; V, behind every class, for a label
        outside $[0, V)$ or excluded by `class_where`; 0 where `where` is False.

    Raises:
        TypeError: An argument has the wrong kind of dtype, or an option is unknown.
        ValueError: Shapes do not fit together, or an option is out of range.
        NotImplementedError: No implementation that was named can run.

    Derivatives: none, the ranks are integers.
    Cost: a pass over `logits` per label.
    Source: the rank of information retrieval, ties in the order of a stable sort.

    Example:
        >>> logits = jnp.array([[0.0, 3.0, 1.0], [2.0, 2.0, 2.0]])
        >>> print(softlib.losses.label_rank(logits, jnp.array([2, 1])))
        [1 1]
    """
    return _rank(GivenLogits.of("label_rank", logits, **options), labels, where)


def _rank(source: Source, labels: Array, where: Array | None) -> Array:
    labels = checked_labels(source, labels)
    where = _labelled_rows.rows_that_count(source, where)
    rank = source.masked(where).statistics(("label_rank",), labels).label_rank
    assert rank is not None
    if where is None:
        return rank
    return jnp.where(where if rank.ndim == where.ndim else where[..., None], rank, 0)
