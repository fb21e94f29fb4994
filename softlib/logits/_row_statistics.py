"""Statistics of rows of logits, of which losses and metrics are composed."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._ids import labels_in_range

from . import _compose
from ._engine.tile import STATISTICS, RowStatistics, only
from ._labelled_rows import without_classes
from ._sources import Logits, Source, source_of


@array_arguments
def row_statistics(
    logits: Logits,
    labels: Integer[Array, "*batch"] | Integer[Array, "*batch L"] | None = None,
    *,
    statistics: Sequence[str] | None = None,
) -> RowStatistics:
    r"""A few numbers per row of logits, formed or not.

    Logits of a linear head are visited in slices of the vocabulary and reduced to the
    named `statistics`; memory does not grow with rows x vocabulary, forward or
    backward. A loss that depends on a row only by these numbers is plain JAX on small
    arrays; its gradient streams too.

    Args:
        logits: An array of logits, or a value such as `softlib.LinearLogits`.
        labels: Class ids, one per row or `L` per row, for the statistics of labels
            (`label_logits`, `label_rank`). An id outside $[0, V)$ has the label logit 0
            and no gradient, so lists may be padded. A label on a class that
            `class_where` excludes still has its own finite logit.
        statistics: Static names out of the fields of `RowStatistics`. None: `lse`, and
            `label_logits` if labels are given.

    Returns:
        `RowStatistics` of the batch shape (`label_logits`, `label_rank`: the shape of
        `labels`), float32, or float64 if an argument is float64; `argmax` and
        `label_rank` are int32. A row without a selected class has `lse` and
        `max_logit` -inf, `label_rank` V, and 0 elsewhere.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together, a name is unknown, or a gradient filter
            meets a statistic to which all classes contribute (mean, sums).
        NotImplementedError: No implementation that was named can run.

    Derivatives: reverse mode of any order and forward over reverse (Hessian-vector
        products), with respect to every floating array in the logits; plain forward
        mode with `implementation="reference"`, which materialises them. `max_logit`
        and `argmax` have derivative 0. An empty row has gradient 0. The gradient of
        a weight is summed in float32 and returned in the weight's dtype. With a
        gradient filter $\epsilon$ (`gradient_filter_eps`; "auto" is 1/32 of the spacing
        of the operands' dtype at 1, 2⁻¹² in bfloat16) blocks of 128 rows x 128 classes
        in which |p - onehot| stays below it are dropped from the backward products,
        over rows that have a cotangent. Without a softcap the gradient of a row of
        `hidden` is then off by at most $\sum_j |s / T|\, e_j \lVert W_j \rVert$ over
        dropped classes, $e_j = \epsilon |g_\mathrm{lse}|$, for the label's own class
        $\epsilon |g_\mathrm{lse}| + |g_\mathrm{lse} + g_\mathrm{label}|$; those of
        bias, scale and temperature stay exact. Training then pushes rare classes down
        less: use it for fine-tuning, not for pretraining.
    Cost: for an array, one pass forward and one backward that writes its gradient. For
        a linear head with N rows, 2 N V D flop forward and 6 N V D backward; scratch of
        a few tiles of at most 8 MiB and, if `hidden` is narrower than float32, its
        gradient in float32. The gradient of `scale` adds two tiles, as does that of
        `temperature` for narrow operands, a bias, a softcap or a gradient filter;
        otherwise it follows from that of `hidden`. Kept for the backward pass: the
        arguments and O(N) numbers; for up to 2048 rows of 256 features or more also
        products of the first classes, at most three quarters of them and 96 MiB. Logits
        of at most 8 MiB (for a weight narrower than float32 at most 2^21 numbers) are
        all stored instead, and the backward pass takes 4 N V D flop. On a GPU, where no
        kernel runs, steps are larger and exponentials are kept, at most 384 MiB.
        `label_rank` costs a second stream. A reverse-over-reverse derivative stores the
        tiles, O(N V).
    Source: "Cut Your Losses in Large-Vocabulary Language Models". Deviations: every
        statistic has a cotangent, label logits come from the tile that enters the
        logsumexp, and no gradient is filtered by default.

    Example:
        >>> table = jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> logits = softlib.LinearLogits(jnp.eye(2), table)
        >>> s = softlib.logits.row_statistics(logits, jnp.array([0, 1]))
        >>> print((s.lse - s.label_logits).round(4))
        [0.5514 0.2395]
    """
    source = source_of("row_statistics", logits)
    if labels is not None:
        labels = checked_labels(source, labels)
    if statistics is None:
        statistics = ("lse",) if labels is None else ("lse", "label_logits")
    checks.require_names(source.function, "statistics", statistics, STATISTICS)
    for name in ("label_logits", "label_rank"):
        if labels is None and name in statistics:
            raise ValueError(
                f"{source.function}: `labels` must be given for the statistic {name}, "
                "got None."
            )
    if labels is not None and "label_rank" in statistics:
        return statistics_and_ranks(source, statistics, labels)
    return source.statistics(statistics, labels)


@array_arguments
def logsumexp(
    logits: Logits, *, where: Bool[Array, "..."] | None = None
) -> Float[Array, "*batch"]:
    r"""Logarithm of the sum of exponentials of each row of logits.

    Args:
        logits: An array of logits, or a value such as `softlib.LinearLogits`.
        where: True for the rows that count; broadcasts to the batch shape. Elsewhere
            the result and all gradients are exactly 0, whatever `logits` hold.

    Returns:
        One number per row, float32 (float64 if an argument is float64); -inf for a row
        without classes.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together.
        NotImplementedError: No implementation that was named can run.

    Derivatives: as `row_statistics`.
    Cost: as `row_statistics`; with `where`, one masked copy of the rows.
    Source: a composition of `row_statistics`.

    Example:
        >>> logits = softlib.LinearLogits(jnp.zeros((1, 3)), jnp.ones((8, 3)))
        >>> print(softlib.logits.logsumexp(logits).round(4))
        [2.0794]
    """
    source = source_of("logsumexp", logits)
    return _compose.logsumexp(_compose.prepare(source, ("lse",), None, where))


@array_arguments
def entropy(
    logits: Logits, *, where: Bool[Array, "..."] | None = None
) -> Float[Array, "*batch"]:
    r"""Entropy of the softmax of each row of logits, in nats.

    $$H = -\sum_j p_j \log p_j = \mathrm{lse} - \sum_j p_j z_j$$

    An entropy bonus or a confidence penalty is a multiple of it. A logit of -inf adds
    0.

    Args:
        logits: An array of logits, or a value such as `softlib.LinearLogits`.
        where: True for the rows that count; broadcasts to the batch shape. Elsewhere
            the result and all gradients are exactly 0, whatever `logits` hold.

    Returns:
        The entropy per row, float32 (float64 if an argument is float64); 0 for a row
        without classes. It carries the rounding error of the logsumexp.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together, or a gradient filter is set.
        NotImplementedError: No implementation that was named can run.

    Derivatives: as `row_statistics`.
    Cost: as `row_statistics`; with `where`, one masked copy of the rows.
    Source: a composition of `row_statistics`.

    Example:
        >>> logits = jnp.array([[0.0, 0.0, -jnp.inf]])
        >>> print(softlib.logits.entropy(logits).round(4))
        [0.6931]
    """
    source = source_of("entropy", logits)
    return _compose.entropy(
        _compose.prepare(source, ("lse", "mean_logit"), None, where)
    )


def statistics_and_ranks(
    source: Source, names: Sequence[str], labels: Int[Array, "..."]
) -> RowStatistics:
    """Statistics with label_rank, in two streams.

    The second stream counts classes before a label, whose logit the first one finds.
    """
    others = [name for name in names if name != "label_rank"]
    found = source.statistics([*others, "label_logits"], labels)
    assert found.label_logits is not None
    logits = lax.stop_gradient(found.label_logits)
    rank = source.statistics(("label_rank",), labels, logits).label_rank
    assert rank is not None
    selected = labels >= 0
    if source.class_where is not None:
        selected = selected & (source.at_labels(source.class_where, labels) != 0)
    found = found._replace(label_rank=jnp.where(selected, rank, source.num_classes))
    return only(found, source.options.including(*names))


def checked_labels(source: Source, labels: ArrayLike) -> Int[Array, "..."]:
    """Checked class ids; -1 if out of range, or in a row without classes."""
    function, batch = source.function, source.batch_shape
    labels = jnp.asarray(labels)
    checks.require_integer(function, labels=labels)
    if labels.shape[: len(batch)] != batch:
        raise ValueError(
            f"{function}: `labels` must have the batch shape {batch}, or one more axis "
            f"of several labels per row, got {labels.shape}."
        )
    if labels.ndim > len(batch) + 1:
        raise ValueError(
            f"{function}: `labels` must have at most one axis more than the batch "
            f"shape {batch}, got {labels.shape}."
        )
    labels = labels_in_range(labels, source.num_classes)
    empty = without_classes(source)
    if empty is None:
        return labels
    if empty.ndim and labels.ndim > len(batch):
        empty = empty[..., None]
    return jnp.where(empty, -1, labels)
