"""Cross-entropy of logits, and of a linear head given by its arrays."""

from typing import Literal, NamedTuple, TypedDict, Unpack, overload

from jaxtyping import Array, Bool, Float, Integer

from softlib._array_arguments import array_arguments
from softlib.logits import LinearLogits, Logits
from softlib.logits._compose import (
    cross_entropy,
    cross_entropy_statistics,
    logsumexp,
    prepare,
)
from softlib.logits._options import LinearHeadOptions
from softlib.logits._sources import Source, source_of
from softlib.typing import (
    AxisName,
    GradientFilter,
    Implementations,
    PerRow,
    Precision,
    Scalar,
)


class CrossEntropyResult(NamedTuple):
    """Cross-entropy, and the logsumexp of which it is made.

    Attributes:
        loss: What the call without `return_lse` returns.
        lse: The logsumexp of the logits per row, differentiable.
    """

    loss: Float[Array, "*batch"]
    lse: Float[Array, "*batch"]


# For type checkers: the return type depends on a flag. The signatures in full are those
# of the functions below. (A TypedDict may have more keys than it names, hence the
# ignored errors.)
class _Options(TypedDict, total=False):
    label_smoothing: Scalar
    logsumexp_penalty: Scalar
    class_weights: Array | None
    where: Array | None


class _HeadOptions(_Options, LinearHeadOptions, total=False):
    pass


@overload
# pyrefly: ignore[inconsistent-overload]
def softmax_cross_entropy(
    logits: Logits,
    labels: Array,
    *,
    return_lse: Literal[True],
    **options: Unpack[_Options],
) -> CrossEntropyResult: ...
@overload
# pyrefly: ignore[inconsistent-overload]
def softmax_cross_entropy(
    logits: Logits,
    labels: Array,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[_Options],
) -> Array: ...
@array_arguments
def softmax_cross_entropy(
    logits: Logits,
    labels: Integer[Array, "*batch"] | Float[Array, "*batch V"],
    *,
    label_smoothing: Scalar = 0.0,
    logsumexp_penalty: Scalar = 0.0,
    class_weights: Float[Array, " V"] | None = None,
    where: Bool[Array, "..."] | None = None,
    return_lse: bool = False,
) -> Float[Array, "*batch"] | CrossEntropyResult:
    r"""Cross-entropy, in nats per row, for class ids or distributions.

    With $z$ the logits of a row, label $y$, smoothing $\epsilon$ and penalty $\lambda$,
    over the $V$ selected classes,

    $$L = (1 - \epsilon)(\mathrm{lse} - z_y)
        + \epsilon \Bigl(\mathrm{lse} - \frac{1}{V} \sum_j z_j\Bigr)
        + \lambda\, \mathrm{lse}^2, \qquad \mathrm{lse} = \log \sum_j e^{z_j} .$$

    With `softlib.LinearLogits` it replaces
    `optax.softmax_cross_entropy_with_integer_labels` on `hidden @ weight.T` and takes a
    small fraction of the memory. Reduce it with `softlib.masked_mean`. The next token
    is a slice: `logits[:, :-1]` with `tokens[:, 1:]`. For a label that is a
    distribution $q$ the label's logit becomes $\sum_j q_j z_j$, and lse in the first
    two terms and the mean of the logits are weighted by $\sum_j q_j$.

    In float32 $\mathrm{lse} - z_y$ rounds to 0 once the label is 17 nats above all
    others, and so does its gradient, $p_y - 1$: training stops. For class ids and
    stored logits this term, of weight $1 - \epsilon$, is computed from the logsumexp of
    the *other* classes as $\log(1 + e^{\mathrm{lse}_{j \neq y} - z_y})$. Then it and
    its gradient are accurate until the exponential underflows, at 87 nats. The terms of
    smoothing and penalty do not vanish and are computed as written above.

    Args:
        logits: An array of logits, or a value such as `softlib.LinearLogits`.
        labels: Integers are class ids in $[0, V)$. Outside, the loss is NaN and the row
            has no gradient; an id never wraps round, clamps, or trains another class.
            The label of an excluded class costs +inf, without gradient. Floating
            numbers of the shape of stored logits are distributions, where a mass of 0
            on a logit of -inf costs 0.
        label_smoothing: $\epsilon \in [0, 1]$, spread evenly over all selected classes,
            the label's included. A number is static, an array traced.
        logsumexp_penalty: Coefficient $\lambda \geq 0$ of $\mathrm{lse}^2$, which keeps
            logits from drifting; often called z-loss, a name this library keeps for
            the loss `z_loss`, which is another. A number is static, an array traced.
        class_weights: Factors $a_j$, one number per class, differentiable: the loss is
            $\sum_j a_j t_j (\mathrm{lse} - z_j) + \lambda\, \mathrm{lse}^2$, with $t$
            the label (or $q$) after smoothing, as in PyTorch. The penalty has no such
            factor, and nothing is divided by a sum of weights. A label of weight 0
            costs 0, on an excluded class too. A linear head does not combine them with
            `label_smoothing`.
        where: True for the rows that count; broadcasts to the batch shape. Elsewhere
            results and all gradients are exactly 0, whatever `logits` and `labels`
            hold (NaN, -100, ...). For labels of -100: `where=labels >= 0`.
        return_lse: Static; returns `CrossEntropyResult`, with the logsumexp.

    Returns:
        The loss per row, float32 (float64 if an argument is float64), or
        `CrossEntropyResult`. A row without classes has loss 0, gradient 0 and lse -inf;
        one whose logits are all -inf costs +inf, with gradient 0 and the same lse.

    Raises:
        TypeError: An argument has the wrong kind of dtype, or a static option is not a
            Python number.
        ValueError: Shapes do not fit together, an option is out of range, or
            `class_weights` of a linear head meet a `label_smoothing` that is not the
            number 0.
        NotImplementedError: No implementation that was named can run.

    Derivatives: as `row_statistics`.
    Cost: as `row_statistics`; with `where`, one masked copy of the rows.
    Source: "Cut Your Losses in Large-Vocabulary Language Models"; smoothing as in
        "Rethinking the Inception Architecture for Computer Vision". Deviations: exact
        (no gradient filter), sums in float32, one fixed order of summation, `where`
        instead of an ignored label value, the loss per row instead of a reduction.

    Example:
        >>> table = jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> labels = jnp.array([0, -100])
        >>> logits = softlib.LinearLogits(jnp.eye(2), table)
        >>> cross_entropy = softlib.losses.softmax_cross_entropy
        >>> loss = cross_entropy(logits, labels, where=labels >= 0)
        >>> print(loss.round(4), softlib.masked_mean(loss, labels >= 0).round(4))
        [0.5514 0.    ] 0.5514
    """
    source = source_of("softmax_cross_entropy", logits)
    smoothing = (label_smoothing, logsumexp_penalty, class_weights)
    return _cross_entropy(source, labels, *smoothing, where, return_lse)


@overload
# pyrefly: ignore[inconsistent-overload]
def linear_softmax_cross_entropy(
    hidden: Array,
    weight: Array,
    labels: Array,
    *,
    return_lse: Literal[True],
    **options: Unpack[_HeadOptions],
) -> CrossEntropyResult: ...
@overload
# pyrefly: ignore[inconsistent-overload]
def linear_softmax_cross_entropy(
    hidden: Array,
    weight: Array,
    labels: Array,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[_HeadOptions],
) -> Array: ...
@array_arguments
def linear_softmax_cross_entropy(
    hidden: Float[Array, "*batch D"],
    weight: Float[Array, "V D"] | Float[Array, "D V"],
    labels: Integer[Array, "*batch"],
    *,
    vocab_axis: int = 0,
    bias: Float[Array, " V"] | None = None,
    scale: PerRow | None = None,
    softcap: float | None = None,
    temperature: PerRow | None = None,
    label_smoothing: Scalar = 0.0,
    logsumexp_penalty: Scalar = 0.0,
    class_weights: Float[Array, " V"] | None = None,
    class_where: Bool[Array, " V"] | None = None,
    where: Bool[Array, "..."] | None = None,
    return_lse: bool = False,
    vocab_chunk: int | None = None,
    token_chunk: int | None = None,
    gradient_filter_eps: GradientFilter = None,
    axis_name: AxisName | None = None,
    precision: Precision = None,
    implementation: Implementations = None,
) -> Float[Array, "*batch"] | CrossEntropyResult:
    r"""Cross-entropy of a linear head, in nats per row, without forming its logits.

    It is `softmax_cross_entropy` of `softlib.LinearLogits`, under the name that many
    look for. `softlib.LinearLogits` itself can be given to every other loss, too.

    Args:
        hidden, weight, vocab_axis, bias, scale: As in `softlib.LinearLogits`.
        softcap, temperature, class_where: As in `softlib.LinearLogits`.
        labels: Class ids in $[0, V)$. Outside, the loss is NaN and the row has no
            gradient; an id never wraps round, clamps, or trains another class. The
            label of a class that `class_where` excludes costs +inf, without gradient.
        label_smoothing, where: As in `softmax_cross_entropy`.
        logsumexp_penalty: As in `softmax_cross_entropy`; not the loss `z_loss`.
        class_weights: A factor $a_y$ of the first term, one number per class,
            differentiable. The penalty has no such factor, and nothing is divided by a
            sum of weights. A label of weight 0 costs 0, on an excluded class too. Not
            with `label_smoothing`.
        return_lse: Static; returns `CrossEntropyResult`, with the logsumexp.
        vocab_chunk, token_chunk: As in `softlib.LinearLogits`.
        gradient_filter_eps: As in `softlib.LinearLogits`; not with `label_smoothing`.
        axis_name: As in `softlib.LinearLogits`; `class_weights` are divided, too.
        precision, implementation: As in `softlib.LinearLogits`.

    Returns:
        As `softmax_cross_entropy`: the loss per row, or `CrossEntropyResult`.

    Raises:
        TypeError: An argument has the wrong kind of dtype, or a static option is not a
            Python number.
        ValueError: Shapes do not fit together, an option is out of range, or
            `class_weights` meet a `label_smoothing` that is not the number 0.
        NotImplementedError: No implementation that was named can run.

    Derivatives: as `row_statistics`.
    Cost: as `row_statistics`; with `where`, one masked copy of `hidden`.
    Source: "Cut Your Losses in Large-Vocabulary Language Models".

    Example:
        >>> hidden, table = jnp.eye(2), jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> labels = jnp.array([0, -100])
        >>> loss = softlib.losses.linear_softmax_cross_entropy(
        ...     hidden, table, labels, where=labels >= 0
        ... )
        >>> print(loss.round(4), softlib.masked_mean(loss, labels >= 0).round(4))
        [0.5514 0.    ] 0.5514
    """
    logits = LinearLogits.of(
        "linear_softmax_cross_entropy",
        hidden,
        weight,
        vocab_axis=vocab_axis,
        bias=bias,
        scale=scale,
        softcap=softcap,
        temperature=temperature,
        class_where=class_where,
        vocab_chunk=vocab_chunk,
        token_chunk=token_chunk,
        gradient_filter_eps=gradient_filter_eps,
        axis_name=axis_name,
        precision=precision,
        implementation=implementation,
    )
    smoothing = (label_smoothing, logsumexp_penalty, class_weights)
    return _cross_entropy(logits, labels, *smoothing, where, return_lse)


def _cross_entropy(
    source: Source,
    labels: Array,
    label_smoothing: Scalar,
    logsumexp_penalty: Scalar,
    class_weights: Array | None,
    where: Array | None,
    return_lse: bool,
) -> Array | CrossEntropyResult:
    smoothing = (label_smoothing, logsumexp_penalty)
    names = cross_entropy_statistics(source, *smoothing, class_weights)
    rows = prepare(source, sorted(names), labels, where, class_weights=class_weights)
    loss = cross_entropy(rows, *smoothing)
    return CrossEntropyResult(loss, logsumexp(rows)) if return_lse else loss
