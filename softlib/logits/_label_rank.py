"""The rank of a label among all classes, for recall at k and mean reciprocal rank."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Integer

from softlib._array_arguments import array_arguments

from . import _labelled_rows
from ._row_statistics import checked_labels, statistics_and_ranks
from ._sources import Logits, source_of


@array_arguments
def label_rank(
    logits: Logits,
    labels: Integer[Array, "*batch"] | Integer[Array, "*batch L"],
    *,
    where: Bool[Array, "..."] | None = None,
) -> Int[Array, "*batch"] | Int[Array, "*batch L"]:
    """Number of classes that come before the label: 0 for the most likely one.

    Classes are ordered by descending logit, the lower class first on ties, so that rank
    0 is the class of `top1_correct`. The label is among the first k if its rank is
    below k; its reciprocal rank is 1 / (1 + rank).

    Args:
        logits: An array of logits, or a value such as `softlib.LinearLogits`.
        labels: Class ids, one or several per row.
        where: True for the rows that count; broadcasts to the batch shape.

    Returns:
        The rank, int32 of the shape of `labels`; V for a label outside $[0, V)$ or
        excluded by `class_where`; 0 where `where` is False.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together.
        NotImplementedError: No implementation that was named can run.

    Derivatives: none, the ranks are integers.
    Cost: two streams over the vocabulary (the logit of the label, then the count), with
        the scratch of `row_statistics`; of an array, a pass per label.
    Source: the rank of information retrieval, ties in the order of a stable sort.

    Example:
        >>> table = jnp.array([[1.0, 0.0], [0.0, 2.0], [0.5, 0.5]])
        >>> logits = softlib.LinearLogits(jnp.eye(2), table)
        >>> print(softlib.logits.label_rank(logits, jnp.array([2, 1])))
        [1 0]
    """
    source = source_of("label_rank", logits)
    labels = checked_labels(source, labels)
    where = _labelled_rows.rows_that_count(source, where)
    masked = source.masked(where)
    rank = statistics_and_ranks(masked, ("label_rank",), labels).label_rank
    assert rank is not None
    if where is None:
        return rank
    return jnp.where(where if rank.ndim == where.ndim else where[..., None], rank, 0)
