"""Numbers per token: log-probability, top-1 correctness, or several in one pass."""

from collections.abc import Sequence

from jaxtyping import Array, Bool, Float, Integer

from softlib._array_arguments import array_arguments
from softlib.typing import (
    AxisName,
    GradientFilter,
    Implementations,
    PerRow,
    Precision,
    Scalar,
)

from . import _compose
from ._compose import TokenMetrics
from ._sources import GivenLogits, LinearHead, Source


@array_arguments
def linear_token_log_probs(
    hidden: Float[Array, "*batch D"],
    weight: Float[Array, "V D"] | Float[Array, "D V"],
    labels: Integer[Array, "*batch"],
    *,
    vocab_axis: int = 0,
    bias: Float[Array, " V"] | None = None,
    logit_scale: PerRow | None = None,
    logit_softcap: float | None = None,
    temperature: PerRow | None = None,
    class_where: Bool[Array, " V"] | None = None,
    where: Bool[Array, "..."] | None = None,
    vocab_chunk: int | None = None,
    token_chunk: int | None = None,
    gradient_filter_eps: GradientFilter = None,
    axis_name: AxisName | None = None,
    precision: Precision = None,
    implementation: Implementations = None,
) -> Float[Array, "*batch"]:
    r"""Log-probability of each label under a linear head, in nats, without its logits.

    $$\log p_y = z_y - \mathrm{lse}$$

    What preference losses, importance ratios and perplexities are made of: sum it over
    the tokens of a sequence.

    Args:
        hidden: Inputs of the head.
        weight: One row per class, as in an embedding table; with `vocab_axis=1` one
            column per class, as in a dense kernel. Sliced in place, never copied.
        labels: Class ids in $[0, V)$; outside, the result is NaN and the row has no
            gradient.
        vocab_axis: Static; the axis of `weight` that is the vocabulary, 0 or 1.
        bias: Added to the scaled products, one number per class; -inf is legal.
        logit_scale: Multiplies the products; a number, or an array that is a scalar or
            one value per row, differentiable.
        logit_softcap: Static positive number $c$: logits become $c\tanh(u / c)$.
        temperature: Divides the capped logits; positive, as `logit_scale` otherwise.
        class_where: True for the classes that exist; a label on another one has
            log-probability -inf, without gradient.
        where: True for the rows that count; broadcasts to the batch shape. Elsewhere
            the result is 0 with gradient 0, whatever `hidden` and `labels` hold.
        vocab_chunk: Static number of classes per step; None chooses from the shapes.
        token_chunk: Static number of rows per step; None chooses from the shapes.
        gradient_filter_eps: Static positive threshold, or "auto"; None is exact. Drops
            negligible blocks of the backward products, see `linear_row_statistics`.
            Saves time only in kernels; not with `axis_name`.
        axis_name: Static; the `jax.shard_map` axis over which `weight` (and `bias` and
            `class_where`) are divided by classes. Labels are global ids, and results
            are those of the whole vocabulary, the same on every device of the axis.
        precision: Static precision of the products, as in `jax.lax.dot_general`.
        implementation: Static; see `softlib.explain`.

    Returns:
        The log-probability per row, float32 (float64 if an argument is float64), never
        above 0; 0 for a row without classes, -inf without gradient for one whose logits
        are all -inf.

    Raises:
        TypeError: An argument has the wrong kind of dtype, or a static option is not a
            Python number.
        ValueError: Shapes do not fit together, or an option is out of range.
        NotImplementedError: No implementation that was named can run.

    Derivatives: as `linear_row_statistics`.
    Cost: as `linear_row_statistics`; with `where`, one masked copy of `hidden`.
    Source: "Cut Your Losses in Large-Vocabulary Language Models".

    Example:
        >>> hidden, weight = jnp.zeros((2, 3)), jnp.ones((8, 3))
        >>> labels = jnp.array([5, 1])
        >>> log_probs = softlib.losses.linear_token_log_probs(hidden, weight, labels)
        >>> print(log_probs.round(4))
        [-2.0794 -2.0794]
    """
    source = LinearHead.of(
        "linear_token_log_probs",
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
    return _log_probs(source, labels, where)


@array_arguments
def softmax_token_log_probs(
    logits: Float[Array, "*batch V"],
    labels: Integer[Array, "*batch"],
    *,
    bias: Float[Array, " V"] | None = None,
    logit_scale: PerRow | None = None,
    logit_softcap: float | None = None,
    temperature: PerRow | None = None,
    class_where: Bool[Array, "..."] | None = None,
    where: Bool[Array, "..."] | None = None,
    implementation: Implementations = None,
) -> Float[Array, "*batch"]:
    r"""Log-probability of each label under logits, in nats.

    The log-probability of `linear_token_log_probs` from logits that exist.

    Args:
        logits: Unnormalised log-probabilities.
        labels: Class ids in $[0, V)$; outside, the result is NaN and the row has no
            gradient.
        bias: Added to the scaled logits, one number per class; -inf is legal.
        logit_scale: Multiplies the logits; a number, or an array that is a scalar or
            one value per row, differentiable.
        logit_softcap: Static positive number $c$: logits become $c\tanh(u / c)$.
        temperature: Divides the capped logits; positive, as `logit_scale` otherwise.
        class_where: True for the classes that exist; broadcasts to `logits`. A label on
            another one has log-probability -inf, without gradient.
        where: True for the rows that count; broadcasts to the batch shape. Elsewhere
            the result is 0 with gradient 0, whatever `logits` and `labels` hold.
        implementation: Static; see `softlib.explain`.

    Returns:
        The log-probability per row, float32 (float64 if an argument is float64); 0 for
        a row without classes, -inf without gradient for one whose logits are all -inf.

    Raises:
        TypeError: An argument has the wrong kind of dtype, or a static option is not a
            Python number.
        ValueError: Shapes do not fit together, or an option is out of range.
        NotImplementedError: No implementation that was named can run.

    Derivatives: as `linear_row_statistics`.
    Cost: one pass over `logits` forward, one backward that writes their gradient.
    Source: a composition of `row_statistics`.

    Example:
        >>> logits, labels = jnp.array([[2.0, 0.0]]), jnp.array([1])
        >>> print(softlib.losses.softmax_token_log_probs(logits, labels).round(4))
        [-2.1269]
    """
    source = GivenLogits.of(
        "softmax_token_log_probs",
        logits,
        bias=bias,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        temperature=temperature,
        class_where=class_where,
        implementation=implementation,
    )
    return _log_probs(source, labels, where)


@array_arguments
def linear_top1_correct(
    hidden: Float[Array, "*batch D"],
    weight: Float[Array, "V D"] | Float[Array, "D V"],
    labels: Integer[Array, "*batch"],
    *,
    vocab_axis: int = 0,
    bias: Float[Array, " V"] | None = None,
    logit_scale: PerRow | None = None,
    logit_softcap: float | None = None,
    temperature: PerRow | None = None,
    class_where: Bool[Array, " V"] | None = None,
    where: Bool[Array, "..."] | None = None,
    vocab_chunk: int | None = None,
    token_chunk: int | None = None,
    axis_name: AxisName | None = None,
    precision: Precision = None,
    implementation: Implementations = None,
) -> Bool[Array, "*batch"]:
    r"""Whether each label is the likeliest class of a linear head, without its logits.

    `softlib.masked_mean` of it is the top-1 accuracy. For the loss and this from one
    pass over the vocabulary see `linear_token_metrics`.

    Args:
        hidden: Inputs of the head.
        weight: One row per class, as in an embedding table; with `vocab_axis=1` one
            column per class, as in a dense kernel. Sliced in place, never copied.
        labels: Class ids in $[0, V)$; outside, the result is False.
        vocab_axis: Static; the axis of `weight` that is the vocabulary, 0 or 1.
        bias: Added to the scaled products, one number per class; -inf is legal.
        logit_scale: Multiplies the products; a number, or an array that is a scalar or
            one value per row, differentiable.
        logit_softcap: Static positive number $c$: logits become $c\tanh(u / c)$.
        temperature: Divides the capped logits; positive, as `logit_scale` otherwise.
        class_where: True for the classes that exist.
        where: True for the rows that count; broadcasts to the batch shape. Elsewhere
            the result is False, whatever `hidden` and `labels` hold.
        vocab_chunk: Static number of classes per step; None chooses from the shapes.
        token_chunk: Static number of rows per step; None chooses from the shapes.
        axis_name: Static; the `jax.shard_map` axis over which `weight` (and `bias` and
            `class_where`) are divided by classes. Labels are global ids, and results
            are those of the whole vocabulary, the same on every device of the axis.
        precision: Static precision of the products, as in `jax.lax.dot_general`.
        implementation: Static; see `softlib.explain`.

    Returns:
        Booleans; on ties only the lowest of the most likely classes is correct. False
        for a row without classes.

    Raises:
        TypeError: An argument has the wrong kind of dtype, or a static option is not a
            Python number.
        ValueError: Shapes do not fit together, or an option is out of range.
        NotImplementedError: No implementation that was named can run.

    Derivatives: none, the result is boolean.
    Cost: as the forward pass of `linear_row_statistics`.
    Source: a composition of `linear_row_statistics`.

    Example:
        >>> hidden, weight = jnp.eye(2), jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> labels = jnp.array([0, 2])
        >>> print(softlib.losses.linear_top1_correct(hidden, weight, labels))
        [ True False]
    """
    source = LinearHead.of(
        "linear_top1_correct",
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
        axis_name=axis_name,
        precision=precision,
        implementation=implementation,
    )
    return _correct(source, labels, where)


@array_arguments
def softmax_top1_correct(
    logits: Float[Array, "*batch V"],
    labels: Integer[Array, "*batch"],
    *,
    bias: Float[Array, " V"] | None = None,
    logit_scale: PerRow | None = None,
    logit_softcap: float | None = None,
    temperature: PerRow | None = None,
    class_where: Bool[Array, "..."] | None = None,
    where: Bool[Array, "..."] | None = None,
    implementation: Implementations = None,
) -> Bool[Array, "*batch"]:
    r"""Whether each label is the likeliest class of logits.

    The correctness of `linear_top1_correct` from logits that exist.

    Args:
        logits: Unnormalised log-probabilities.
        labels: Class ids in $[0, V)$; outside, the result is False.
        bias: Added to the scaled logits, one number per class; -inf is legal.
        logit_scale: Multiplies the logits; a number, or an array that is a scalar or
            one value per row, differentiable.
        logit_softcap: Static positive number $c$: logits become $c\tanh(u / c)$.
        temperature: Divides the capped logits; positive, as `logit_scale` otherwise.
        class_where: True for the classes that exist; broadcasts to `logits`.
        where: True for the rows that count; broadcasts to the batch shape. Elsewhere
            the result is False, whatever `logits` and `labels` hold.
        implementation: Static; see `softlib.explain`.

    Returns:
        Booleans; on ties only the lowest of the most likely classes is correct. False
        for a row without classes.

    Raises:
        TypeError: An argument has the wrong kind of dtype, or a static option is not a
            Python number.
        ValueError: Shapes do not fit together, or an option is out of range.
        NotImplementedError: No implementation that was named can run.

    Derivatives: none, the result is boolean.
    Cost: one pass over `logits`.
    Source: a composition of `row_statistics`.

    Example:
        >>> logits, labels = jnp.array([[2.0, 0.0], [1.0, 1.0]]), jnp.array([0, 1])
        >>> print(softlib.losses.softmax_top1_correct(logits, labels))
        [ True False]
    """
    source = GivenLogits.of(
        "softmax_top1_correct",
        logits,
        bias=bias,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        temperature=temperature,
        class_where=class_where,
        implementation=implementation,
    )
    return _correct(source, labels, where)


@array_arguments
def linear_token_metrics(
    hidden: Float[Array, "*batch D"],
    weight: Float[Array, "V D"] | Float[Array, "D V"],
    labels: Integer[Array, "*batch"],
    *,
    metrics: Sequence[str] = ("loss", "correct"),
    vocab_axis: int = 0,
    bias: Float[Array, " V"] | None = None,
    logit_scale: PerRow | None = None,
    logit_softcap: float | None = None,
    temperature: PerRow | None = None,
    label_smoothing: Scalar = 0.0,
    logsumexp_penalty: Scalar = 0.0,
    class_where: Bool[Array, " V"] | None = None,
    where: Bool[Array, "..."] | None = None,
    vocab_chunk: int | None = None,
    token_chunk: int | None = None,
    gradient_filter_eps: GradientFilter = None,
    axis_name: AxisName | None = None,
    precision: Precision = None,
    implementation: Implementations = None,
) -> TokenMetrics:
    r"""Loss, accuracy and other numbers per token from one pass over the vocabulary.

    What a training loop differentiates and what it logs, for the price of the loss:
    every field is a composition of the same row statistics.

    Args:
        hidden: Inputs of the head.
        weight: One row per class, as in an embedding table; with `vocab_axis=1` one
            column per class, as in a dense kernel. Sliced in place, never copied.
        labels: Class ids in $[0, V)$. Outside, loss and log-probability are NaN and
            without gradient, and `correct` is False.
        metrics: Static names out of the fields of `TokenMetrics`; only these are
            computed.
        vocab_axis: Static; the axis of `weight` that is the vocabulary, 0 or 1.
        bias: Added to the scaled products, one number per class; -inf is legal.
        logit_scale: Multiplies the products; a number, or an array that is a scalar or
            one value per row, differentiable.
        logit_softcap: Static positive number $c$: logits become $c\tanh(u / c)$.
        temperature: Divides the capped logits; positive, as `logit_scale` otherwise.
        label_smoothing: $\epsilon \in [0, 1]$, spread evenly over all selected classes,
            the label's included. A number is static, an array traced.
        logsumexp_penalty: Coefficient $\lambda \geq 0$ of $\mathrm{lse}^2$, which keeps
            logits from drifting; often called z-loss, a name this library keeps for
            the spherical loss. A number is static, an array traced.
        class_where: True for the classes that exist; a label on another one has loss
            +inf and log-probability -inf, without gradient.
        where: True for the rows that count; broadcasts to the batch shape. Elsewhere
            results and all gradients are exactly 0, whatever `hidden` and `labels`
            hold (NaN, -100, ...). For labels of -100: `where=labels >= 0`.
        vocab_chunk: Static number of classes per step; None chooses from the shapes.
        token_chunk: Static number of rows per step; None chooses from the shapes.
        gradient_filter_eps: Static positive threshold, or "auto"; None is exact. Drops
            negligible blocks of the backward products, see `linear_row_statistics`. Not
            with `label_smoothing`, the entropy or `axis_name`. Saves time only in
            kernels.
        axis_name: Static; the `jax.shard_map` axis over which `weight` (and `bias` and
            `class_where`) are divided by classes. Labels are global ids, and results
            are those of the whole vocabulary, the same on every device of the axis.
        precision: Static precision of the products, as in `jax.lax.dot_general`.
        implementation: Static; see `softlib.explain`.

    Returns:
        `TokenMetrics`; each field as the function of that name returns it, None if it
        was not asked for.

    Raises:
        TypeError: An argument has the wrong kind of dtype, or a static option is not a
            Python number.
        ValueError: Shapes do not fit together, or an option is out of range.
        NotImplementedError: No implementation that was named can run.

    Derivatives: as `linear_row_statistics`.
    Cost: as `linear_row_statistics`; with `where`, one masked copy of `hidden`.
    Source: "Cut Your Losses in Large-Vocabulary Language Models" for the loss.

    Example:
        >>> hidden, weight = jnp.eye(2), jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> labels = jnp.array([0, 2])
        >>> metrics = softlib.losses.linear_token_metrics(hidden, weight, labels)
        >>> print(metrics.loss.round(4), softlib.masked_mean(metrics.correct))
        [0.5514 2.2395] 0.5
    """
    source = LinearHead.of(
        "linear_token_metrics",
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
    return _compose.token_metrics(
        source,
        labels,
        metrics=metrics,
        label_smoothing=label_smoothing,
        logsumexp_penalty=logsumexp_penalty,
        where=where,
    )


@array_arguments
def softmax_token_metrics(
    logits: Float[Array, "*batch V"],
    labels: Integer[Array, "*batch"],
    *,
    metrics: Sequence[str] = ("loss", "correct"),
    bias: Float[Array, " V"] | None = None,
    logit_scale: PerRow | None = None,
    logit_softcap: float | None = None,
    temperature: PerRow | None = None,
    label_smoothing: Scalar = 0.0,
    logsumexp_penalty: Scalar = 0.0,
    class_where: Bool[Array, "..."] | None = None,
    where: Bool[Array, "..."] | None = None,
    implementation: Implementations = None,
) -> TokenMetrics:
    r"""Loss, accuracy and other numbers per token from logits that exist.

    The numbers of `linear_token_metrics`, from an array of logits.

    Args:
        logits: Unnormalised log-probabilities.
        labels: Class ids in $[0, V)$. Outside, loss and log-probability are NaN and
            without gradient, and `correct` is False.
        metrics: Static names out of the fields of `TokenMetrics`; only these are
            computed.
        bias: Added to the scaled logits, one number per class; -inf is legal.
        logit_scale: Multiplies the logits; a number, or an array that is a scalar or
            one value per row, differentiable.
        logit_softcap: Static positive number $c$: logits become $c\tanh(u / c)$.
        temperature: Divides the capped logits; positive, as `logit_scale` otherwise.
        label_smoothing: $\epsilon \in [0, 1]$, spread evenly over all selected classes,
            the label's included. A number is static, an array traced.
        logsumexp_penalty: Coefficient $\lambda \geq 0$ of $\mathrm{lse}^2$, which keeps
            logits from drifting; often called z-loss, a name this library keeps for
            the spherical loss. A number is static, an array traced.
        class_where: True for the classes that exist; broadcasts to `logits`. A label on
            another one has loss +inf and log-probability -inf, without gradient.
        where: True for the rows that count; broadcasts to the batch shape. Elsewhere
            results and all gradients are exactly 0, whatever `logits` and `labels`
            hold (NaN, -100, ...). For labels of -100: `where=labels >= 0`.
        implementation: Static; see `softlib.explain`.

    Returns:
        `TokenMetrics`; each field as the function of that name returns it, None if it
        was not asked for.

    Raises:
        TypeError: An argument has the wrong kind of dtype, or a static option is not a
            Python number.
        ValueError: Shapes do not fit together, or an option is out of range.
        NotImplementedError: No implementation that was named can run.

    Derivatives: as `linear_row_statistics`.
    Cost: one pass over `logits` forward, one backward that writes their gradient.
    Source: compositions of `row_statistics`.

    Example:
        >>> logits, labels = jnp.array([[2.0, 0.0]]), jnp.array([0])
        >>> metrics = softlib.losses.softmax_token_metrics(
        ...     logits, labels, metrics=("log_prob", "entropy")
        ... )
        >>> print(metrics.log_prob.round(4), metrics.entropy.round(4))
        [-0.1269] [0.3653]
    """
    source = GivenLogits.of(
        "softmax_token_metrics",
        logits,
        bias=bias,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        temperature=temperature,
        class_where=class_where,
        implementation=implementation,
    )
    return _compose.token_metrics(
        source,
        labels,
        metrics=metrics,
        label_smoothing=label_smoothing,
        logsumexp_penalty=logsumexp_penalty,
        where=where,
    )


def _log_probs(source: Source, labels: Array, where: Array | None) -> Array:
    rows = _compose.prepare(source, ("lse", "label_logits"), labels, where)
    return _compose.log_probability(rows)


def _correct(source: Source, labels: Array, where: Array | None) -> Array:
    return _compose.correct(_compose.prepare(source, ("lse", "argmax"), labels, where))
