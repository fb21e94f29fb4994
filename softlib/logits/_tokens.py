"""Numbers per token: log-probability, surprisal, correctness, several in one pass."""

from collections.abc import Sequence

from jaxtyping import Array, Bool, Float, Integer

from softlib._array_arguments import array_arguments
from softlib.typing import Scalar

from . import _compose
from ._compose import TokenMetrics
from ._sources import Logits, source_of


@array_arguments
def token_log_probs(
    logits: Logits,
    labels: Integer[Array, "*batch"],
    *,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""Log-probability of each label under logits, in nats.

    $$\log p_y = z_y - \mathrm{lse}$$

    Preference losses, importance ratios and perplexities are made of it.
    `sequence_log_probs` is its sum over the tokens of a sequence.

    Args:
        logits: An array of logits, or a value such as `softlib.LinearLogits`.
        labels: Class ids in $[0, V)$; outside, the result is NaN and the row has no
            gradient. A label on an excluded class has log-probability -inf, without
            gradient.
        where: True for the rows that count; broadcasts to the batch shape. Elsewhere
            the result is 0 with gradient 0, whatever `logits` and `labels` hold.

    Returns:
        The log-probability per row, float32 (float64 if an argument is float64), never
        above 0; 0 for a row without classes, -inf without gradient for one whose logits
        are all -inf.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together.
        NotImplementedError: No implementation that was named can run.

    Derivatives: as `row_statistics`.
    Cost: as `row_statistics`; with `where`, one masked copy of the rows.
    Source: "Cut Your Losses in Large-Vocabulary Language Models".

    Example:
        >>> logits = softlib.LinearLogits(jnp.zeros((2, 3)), jnp.ones((8, 3)))
        >>> labels = jnp.array([5, 1])
        >>> print(softlib.logits.token_log_probs(logits, labels).round(4))
        [-2.0794 -2.0794]
    """
    source = source_of("token_log_probs", logits)
    rows = _compose.prepare(source, ("lse", "label_logits"), labels, where)
    return _compose.log_probability(rows)


@array_arguments
def token_surprisals(
    logits: Logits,
    labels: Integer[Array, "*batch"] | None = None,
    *,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""Negative log-probability of each label in nats, accurate near 0 too.

    $$-\log p_y = \log\Bigl(1 + \sum_{j \neq y} e^{z_j - z_y}\Bigr)$$

    The sum is taken over the other classes. In float32 the difference of logsumexp and
    logit is 0 for a label with a probability above $1 - 10^{-7}$, and has an error of
    $10^{-7} |z|$ otherwise: over hundreds of tokens of which a model is certain, sums
    of it are noise. `token_log_probs` rounds in this way for a head; for stored logits
    it is as accurate.

    Args:
        logits: An array of logits, or a value such as `softlib.LinearLogits`.
        labels: Class ids in $[0, V)$; outside, the result is NaN and the row has no
            gradient. A label on an excluded class has +inf, without gradient. None for
            the likeliest class of each row, the lowest on ties: the surprisal of greedy
            decoding, the min-entropy of the row.
        where: True for the rows that count; broadcasts to the batch shape. Elsewhere
            the result is 0 with gradient 0, whatever `logits` and `labels` hold.

    Returns:
        One number per row, float32 (float64 if an argument is float64), at least 0; 0
        for a row without classes, +inf without gradient for one whose logits are all
        -inf.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together.
        NotImplementedError: No implementation that was named can run.

    Derivatives: as `row_statistics`; the choice of the likeliest class has none.
    Cost: as `row_statistics`, in plain JAX on all platforms; without labels a forward
        stream more.
    Source: a composition of `row_statistics`.

    Example:
        >>> table = jnp.array([[1.0], [0.0]])
        >>> logits = softlib.LinearLogits(jnp.array([[20.0]]), table)
        >>> print((1e9 * softlib.logits.token_surprisals(logits)).round(2))
        [2.06]
        >>> print(softlib.logits.token_log_probs(logits, jnp.array([0])))
        [0.]
    """
    source = source_of("token_surprisals", logits)
    return _compose.surprisal_of_labels(source, labels, where)


@array_arguments
def top1_correct(
    logits: Logits,
    labels: Integer[Array, "*batch"],
    *,
    where: Bool[Array, "..."] | None = None,
) -> Bool[Array, "*batch"]:
    r"""Whether each label is the likeliest class of its row.

    Its `softlib.masked_mean` is the top-1 accuracy. `token_metrics` computes it and the
    loss in one pass over the vocabulary.

    Args:
        logits: An array of logits, or a value such as `softlib.LinearLogits`.
        labels: Class ids in $[0, V)$; outside, the result is False.
        where: True for the rows that count; broadcasts to the batch shape. Elsewhere
            the result is False, whatever `logits` and `labels` hold.

    Returns:
        Booleans; on ties only the lowest of the most likely classes is correct. False
        for a row without classes.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together.
        NotImplementedError: No implementation that was named can run.

    Derivatives: none, the result is boolean.
    Cost: as the forward pass of `row_statistics`.
    Source: a composition of `row_statistics`.

    Example:
        >>> table = jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> logits = softlib.LinearLogits(jnp.eye(2), table)
        >>> print(softlib.logits.top1_correct(logits, jnp.array([0, 2])))
        [ True False]
    """
    source = source_of("top1_correct", logits)
    return _compose.correct(_compose.prepare(source, ("lse", "argmax"), labels, where))


@array_arguments
def token_metrics(
    logits: Logits,
    labels: Integer[Array, "*batch"],
    *,
    metrics: Sequence[str] = ("loss", "correct"),
    label_smoothing: Scalar = 0.0,
    logsumexp_penalty: Scalar = 0.0,
    where: Bool[Array, "..."] | None = None,
) -> TokenMetrics:
    r"""Loss, accuracy and other numbers per token from one pass over the vocabulary.

    A training loop gets the loss it differentiates and the numbers it logs at the cost
    of the loss: every field is a composition of the same row statistics.

    Args:
        logits: An array of logits, or a value such as `softlib.LinearLogits`.
        labels: Class ids in $[0, V)$. Outside, loss and log-probability are NaN and
            without gradient, and `correct` is False. A label on an excluded class has
            loss +inf and log-probability -inf, without gradient.
        metrics: Static names out of the fields of `TokenMetrics`; only these are
            computed.
        label_smoothing: $\epsilon \in [0, 1]$, spread evenly over all selected classes,
            the label's included. A number is static, an array traced.
        logsumexp_penalty: Coefficient $\lambda \geq 0$ of $\mathrm{lse}^2$, which keeps
            logits from drifting; often called z-loss, a name this library keeps for
            the spherical loss. A number is static, an array traced.
        where: True for the rows that count; broadcasts to the batch shape. Elsewhere
            results and all gradients are exactly 0, whatever `logits` and `labels`
            hold (NaN, -100, ...). For labels of -100: `where=labels >= 0`.

    Returns:
        `TokenMetrics`; each field as the function of that name returns it, None if not
        in `metrics`.

    Raises:
        TypeError: An argument has the wrong kind of dtype, or a static option is not a
            Python number.
        ValueError: Shapes do not fit together, an option is out of range, or a gradient
            filter meets smoothing or the entropy.
        NotImplementedError: No implementation that was named can run.

    Derivatives: as `row_statistics`; `correct` has none.
    Cost: as `row_statistics`; with `where`, one masked copy of the rows.
    Source: "Cut Your Losses in Large-Vocabulary Language Models" for the loss.

    Example:
        >>> table = jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> logits = softlib.LinearLogits(jnp.eye(2), table)
        >>> metrics = softlib.logits.token_metrics(logits, jnp.array([0, 2]))
        >>> print(metrics.loss.round(4), softlib.masked_mean(metrics.correct))
        [0.5514 2.2395] 0.5
    """
    return _compose.token_metrics(
        source_of("token_metrics", logits),
        labels,
        metrics=metrics,
        label_smoothing=label_smoothing,
        logsumexp_penalty=logsumexp_penalty,
        where=where,
    )
