"""Engine one, as its users see it: rows of logits reduced to a few numbers."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib.typing import (
    AxisName,
    GradientFilter,
    Implementations,
    PerRow,
    Precision,
)

from ._engine.tile import STATISTICS, RowStatistics
from ._sources import GivenLogits, LinearHead, Source


@array_arguments
def linear_row_statistics(
    hidden: Float[Array, "*batch D"],
    weight: Float[Array, "V D"] | Float[Array, "D V"],
    labels: Integer[Array, "*batch"] | Integer[Array, "*batch L"] | None = None,
    *,
    vocab_axis: int = 0,
    bias: Float[Array, " V"] | None = None,
    logit_scale: PerRow | None = None,
    logit_softcap: float | None = None,
    temperature: PerRow | None = None,
    class_where: Bool[Array, " V"] | None = None,
    statistics: Sequence[str] | None = None,
    vocab_chunk: int | None = None,
    token_chunk: int | None = None,
    gradient_filter_eps: GradientFilter = None,
    axis_name: AxisName | None = None,
    precision: Precision = None,
    implementation: Implementations = None,
) -> RowStatistics:
    r"""A few numbers per row of logits, without the logits.

    For every row $h$ of `hidden` the logits over the vocabulary are

    $$u = s\,(h W^\top) + b, \qquad z = \frac{c \tanh(u / c)}{T}$$

    with scale $s$, bias $b$, softcap $c$ and temperature $T$, each left out when it is
    None. They are visited in slices of the vocabulary and reduced to the `statistics`
    asked for; memory does not grow with rows x vocabulary, forward or backward. Any
    loss that sees a row of logits only through these numbers is plain JAX on small
    arrays, and inherits memory and gradients.

    Args:
        hidden: Inputs of the head.
        weight: One row per class, as in an embedding table; with `vocab_axis=1` one
            column per class, as in a dense kernel. Sliced in place, never copied.
        labels: Class ids, one per row or `L` per row, for the statistics of labels
            (`label_logits`, `label_rank`). In the former an id outside
            $[0, V)$ gives the label logit 0 and no gradient, so lists may be padded.
        vocab_axis: Static; the axis of `weight` that is the vocabulary, 0 or 1.
        bias: Added to the scaled products. May hold -inf: such a class has
            probability 0 (after a softcap it is the smallest logit instead: exclude
            classes by `class_where`).
        logit_scale: Scalar or one per row; a number or a traced array, differentiable.
        logit_softcap: Static positive number.
        temperature: Scalar or one per row, positive; divides after the softcap.
        class_where: True for the classes that exist; the others leave every sum and
            maximum. A label on such a class still has its own finite logit.
        statistics: Static names out of the fields of `RowStatistics`. None asks for
            `lse`, and for `label_logits` if labels are given.
        vocab_chunk: Static number of classes per step; None chooses from the shapes.
        token_chunk: Static number of rows per step; None chooses from the shapes.
        gradient_filter_eps: Static positive threshold, or "auto" for 1/32 of the
            spacing of the operands' dtype at 1 (2⁻¹² in bfloat16). In the backward
            products, blocks of 128 rows x 128 classes in which |p - onehot| stays below
            it are dropped, over rows that have a cotangent; see Derivatives. None is
            exact. It saves time only in kernels, and excludes `axis_name`.
        axis_name: Static; the `jax.shard_map` axis over which `weight` (and `bias` and
            `class_where`) are divided by classes. Labels are global ids, and results
            are those of the whole vocabulary, the same on every device of the axis.
        precision: Static precision of the products, as in `jax.lax.dot_general`. On a
            TPU the default multiplies float32 in bfloat16.
        implementation: Static; see `softlib.explain`. `reference` materialises the
            logits and supports forward mode.

    Returns:
        `RowStatistics` of shape `*batch` (`label_logits`, `label_rank`: the shape of
        `labels`), float32, or float64 if an argument is float64; `argmax` and
        `label_rank` are int32. A row without a selected class has `lse` and
        `max_logit` -inf, `label_rank` V, and 0 elsewhere.

    Raises:
        TypeError: An argument has the wrong kind of dtype, or a static option is not a
            Python number.
        ValueError: Shapes do not fit together, an option is out of range, or a gradient
            filter meets a statistic in which all classes have a part (mean, sums).
        NotImplementedError: No implementation that was named can run.

    Derivatives: reverse mode of any order and forward over reverse (Hessian-vector
        products), with respect to `hidden`, `weight`, `bias`, `logit_scale` and
        `temperature`; plain forward mode with `implementation="reference"`. `max_logit`
        and `argmax` have derivative 0. An empty row has gradient 0. The gradient of
        the weight is summed in float32 and returned in the weight's dtype. With a
        gradient filter $\epsilon$ and no softcap the gradient of a row of `hidden` is
        off by at most $\sum_j |s / T|\, e_j \lVert W_j \rVert$ over dropped classes,
        $e_j = \epsilon |g_\mathrm{lse}|$, for the label's own class
        $\epsilon |g_\mathrm{lse}| + |g_\mathrm{lse} + g_\mathrm{label}|$; those of
        bias, scale and temperature stay exact. It makes training push rare classes down
        less: for fine-tuning, not for pretraining.
    Cost: with N rows 2 N V D flop forward and 6 N V D backward; scratch of a few tiles
        of at most 8 MiB and, where `hidden` is narrower than float32, its gradient in
        float32. The gradient of `logit_scale` adds two tiles, as does that of
        `temperature` for narrow operands, a bias, a softcap or a gradient filter;
        elsewhere it follows from that of `hidden`. Kept for the backward pass: the
        arguments and O(N) numbers; for up to 2048 rows of 256 features or more also
        products of the first classes, at most three quarters of them and 96 MiB. Of
        logits of 8 MiB at most (and for a weight narrower than float32 at most 2^21
        numbers) all are stored instead, and the backward pass takes 4 N V D flop.
        `label_rank` costs a second stream. A reverse-over-reverse derivative stores the
        tiles, O(N V).
    Source: "Cut Your Losses in Large-Vocabulary Language Models". Here any statistic
        has a cotangent of its own, label logits come from the tile that enters the
        logsumexp, and no gradient is filtered unless asked for.

    Example:
        >>> hidden, weight = jnp.eye(2), jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> s = softlib.losses.linear_row_statistics(hidden, weight, jnp.array([0, 1]))
        >>> print((s.lse - s.label_logits).round(4))
        [0.5514 0.2395]
    """
    source = LinearHead.of(
        "linear_row_statistics",
        hidden,
        weight,
        vocab_axis=vocab_axis,
        bias=bias,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        temperature=temperature,
        class_where=class_where,
        vocab_chunk=vocab_chunk,
        token_chunk=token_chunk,
        gradient_filter_eps=gradient_filter_eps,
        axis_name=axis_name,
        precision=precision,
        implementation=implementation,
    )
    return _asked_for(source, labels, statistics)


@array_arguments
def row_statistics(
    logits: Float[Array, "*batch V"],
    labels: Integer[Array, "*batch"] | Integer[Array, "*batch L"] | None = None,
    *,
    bias: Float[Array, " V"] | None = None,
    logit_scale: PerRow | None = None,
    logit_softcap: float | None = None,
    temperature: PerRow | None = None,
    class_where: Bool[Array, "..."] | None = None,
    statistics: Sequence[str] | None = None,
    implementation: Implementations = None,
) -> RowStatistics:
    r"""The statistics of `linear_row_statistics`, of logits that exist already.

    Losses written on `RowStatistics` work on either source. The final logits are those
    of `linear_row_statistics` with `logits` in the place of $h W^\top$; scale, bias,
    softcap and temperature are applied in float32 whatever the dtype of `logits`.

    Args:
        logits: Unnormalised log-probabilities; -inf is a legal value.
        labels: Class ids, one per row or `L` per row. An id outside $[0, V)$ gives the
            label logit 0 and no gradient.
        bias: Added to the scaled logits.
        logit_scale: Scalar or one per row; a number or a traced array, differentiable.
        logit_softcap: Static positive number.
        temperature: Scalar or one per row, positive; divides after the softcap.
        class_where: True for the classes that count; broadcasts to `logits`.
        statistics: Static names out of the fields of `RowStatistics`. None asks for
            `lse`, and for `label_logits` if labels are given.
        implementation: Static; see `softlib.explain`.

    Returns:
        `RowStatistics`, float32 (float64 for float64), as `linear_row_statistics`.

    Raises:
        TypeError: An argument has the wrong kind of dtype, or a static option is not a
            Python number.
        ValueError: Shapes do not fit together, or an option is out of range.
        NotImplementedError: No implementation that was named can run.

    Derivatives: as `linear_row_statistics`.
    Cost: one pass over `logits` forward, one backward that writes their gradient; kept
        for the backward pass are the arguments and a few numbers per row.
    Source: the definitions are those of `linear_row_statistics`.

    Example:
        >>> logits = jnp.array([[1.0, 3.0, 2.0]])
        >>> s = softlib.losses.row_statistics(logits, statistics=("lse", "argmax"))
        >>> print(s.lse.round(4), s.argmax)
        [3.4076] [1]
    """
    source = GivenLogits.of(
        "row_statistics",
        logits,
        bias=bias,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        temperature=temperature,
        class_where=class_where,
        implementation=implementation,
    )
    return _asked_for(source, labels, statistics)


def _asked_for(
    source: Source,
    labels: Array | None,
    statistics: Sequence[str] | None,
) -> RowStatistics:
    function = source.function
    if labels is not None:
        labels = checked_labels(source, labels)
    if statistics is None:
        statistics = ("lse",) if labels is None else ("lse", "label_logits")
    checks.require_names(function, "statistics", statistics, STATISTICS)
    for name in ("label_logits", "label_rank"):
        if labels is None and name in statistics:
            raise ValueError(
                f"{function}: `labels` must be given for the statistic {name}, "
                "got None."
            )
    return source.statistics(statistics, labels)


def checked_labels(source: Source, labels: ArrayLike) -> Integer[Array, "..."]:
    """Class ids, one or several per row."""
    function, batch = source.function, source.batch
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
    return labels
