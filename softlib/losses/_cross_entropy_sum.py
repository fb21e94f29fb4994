"""Cross-entropy summed over rows: three products of a linear head instead of four."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib.logits import LinearLogits, Logits, _compose, _labelled_rows
from softlib.logits._engine.sum_with_gradients import RowTerms
from softlib.logits._engine.tile import RowStatistics
from softlib.logits._sources import source_of
from softlib.typing import PerRow, Scalar


@array_arguments
def softmax_cross_entropy_sum(
    logits: Logits,
    labels: Integer[Array, "*batch"],
    *,
    row_weights: PerRow = 1.0,
    label_smoothing: Scalar = 0.0,
    logsumexp_penalty: Scalar = 0.0,
    class_weights: Float[Array, " V"] | None = None,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, ""]:
    r"""Weighted sum of `softmax_cross_entropy`, with one product of a head less.

    $\sum_n w_n L_n$, in nats. The cotangents of a loss per row are unknown in the
    forward pass, so its backward pass computes the logits of a linear head again. A sum
    has one cotangent, a factor of all gradients: they are computed in the forward pass,
    from the logits of one block of rows at a time, in three matrix products instead of
    four. That saves time with many rows of many features, where products are nearly all
    of the work. With fewer than 256 features it would be slower: unless `token_chunk`
    is given, the loss per row is computed and summed. For the mean over the rows that
    count let `row_weights` be 1 / their number. For a function of the loss of each row
    use `softmax_cross_entropy`. Stored logits get the plain sum.

    Args:
        logits: An array of logits, or a value such as `softlib.LinearLogits`, whose
            `token_chunk` is here the number of rows whose logits exist at once, and
            whose `axis_name` must be None.
        labels: Class ids in $[0, V)$; one outside makes the sum NaN, unless `where`
            drops its row. Exceptions are those of `softmax_cross_entropy`.
        row_weights: $w_n$, a number or one per row, differentiable; ignored for rows
            that `where` drops.
        label_smoothing, logsumexp_penalty: As in `softmax_cross_entropy`.
        class_weights: As in `softmax_cross_entropy`.
        where: True for the rows that count; broadcasts to the batch shape.

    Returns:
        A scalar, float32 (float64 if an argument is float64); 0 if no row counts.

    Raises:
        TypeError: An argument has the wrong kind of dtype, or a static option is not a
            Python number.
        ValueError: Shapes do not fit together, an option is out of range, the logits
            have an `axis_name`, or options of the loss exclude each other.
        NotImplementedError: No implementation that was named can run.

    Derivatives: reverse mode, with respect to every floating array in the
        logits, `row_weights`, `class_weights` and traced options;
        forward over reverse; plain forward mode with `implementation="reference"`.
    Cost: for N rows 6 N V D flop with gradients, 2 N V D without; scratch of a block
        of logits, at most 128 MiB or that of 128 rows; for several blocks and a weight
        narrower than float32 also its gradient in float32. Only the gradients are kept
        for the backward pass. With fewer than 256 features and more than 8 MiB of
        logits: as `row_statistics`.
    Source: the gradient in the forward pass of "Liger Kernel: Efficient Triton Kernels
        for LLM Training". Deviations: a scalar by construction (there a loss per row
        is accepted and its gradients are wrong), sums in float32, blocks by memory.

    Example:
        >>> table = jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> logits, labels = softlib.LinearLogits(jnp.eye(2), table), jnp.array([0, 1])
        >>> total = softlib.losses.softmax_cross_entropy_sum
        >>> print(total(logits, labels, row_weights=1 / 2).round(4))
        0.3955
    """
    function = "softmax_cross_entropy_sum"
    source = source_of(function, logits)
    weights = jnp.asarray(row_weights, source.dtype)
    why = "a scalar, or one per row"
    checks.require_shape_in(
        function, "row_weights", weights, ((), source.batch_shape), why
    )
    weights = jnp.broadcast_to(weights, source.batch_shape)
    where = _labelled_rows.rows_that_count(source, where)
    if where is not None:
        weights = jnp.where(where, weights, 0)
    if not isinstance(source, LinearLogits):
        loss = _compose.token_metrics(
            source,
            labels,
            metrics=("loss",),
            label_smoothing=label_smoothing,
            logsumexp_penalty=logsumexp_penalty,
            class_weights=class_weights,
            where=where,
        ).loss
        assert loss is not None
        return _labelled_rows.weigh(weights, loss).sum()
    if source.axis_name is not None:
        raise ValueError(
            f"{function}: `axis_name` of the logits must be None, got "
            f"{source.axis_name!r}. Over a divided vocabulary sum the loss per row."
        )
    statistics = _compose.cross_entropy_statistics(
        source, label_smoothing, logsumexp_penalty, class_weights
    )
    labels = jnp.asarray(labels)
    checks.require_integer(function, labels=labels)
    checks.require_shape(
        function, "labels", labels, source.batch_shape, "the batch shape"
    )
    source = source.masked(where)
    marked = _labelled_rows.mark(
        source, labels, where, _labelled_rows.per_class(source, class_weights)
    )

    numbers = {"smoothing": label_smoothing, "penalty": logsumexp_penalty}
    fixed = {n: x for n, x in numbers.items() if isinstance(x, int | float)}
    traced = {n: jnp.asarray(x) for n, x in numbers.items() if n not in fixed}
    terms = RowTerms(
        factors=(weights, marked.class_weight),
        scalars=traced,
        marks=(marked._replace(class_weight=None), source.count_classes()),
    )
    loss = _LossOfRows(tuple(fixed.items()))
    return source.total(sorted(statistics), marked.labels, loss, terms)


@dataclasses.dataclass(frozen=True)
class _LossOfRows:
    """The weighted loss of each row, hashable: equal ones share a compiled program.

    Attributes:
        fixed: The options of the loss that are Python numbers, with their names.
    """

    fixed: tuple[tuple[str, float], ...]

    def __call__(
        self, statistics: RowStatistics, terms: RowTerms
    ) -> Float[Array, " rows"]:
        numbers = {**dict(self.fixed), **terms.scalars}
        weights, class_weight = terms.factors
        marked, classes = terms.marks
        assert statistics.label_logits is not None
        statistics = statistics._replace(label_logits=statistics.label_logits[:, 0])
        rows = _labelled_rows.with_statistics(
            marked._replace(class_weight=class_weight),
            statistics,
            _labelled_rows.mean_cost(statistics, classes),
        )
        loss = _compose.cross_entropy(rows, numbers["smoothing"], numbers["penalty"])
        return _labelled_rows.weigh(weights, loss)
