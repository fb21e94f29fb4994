"""Cross-entropy with several labels per row, each with its weight."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib.logits import Logits
from softlib.logits._compose import cross_entropy, cross_entropy_statistics
from softlib.logits._labelled_rows import prepare_several
from softlib.logits._sources import source_of
from softlib.typing import Scalar


@array_arguments
def multi_label_cross_entropy(
    logits: Logits,
    labels: Integer[Array, "*batch L"],
    *,
    label_weights: Float[Array, "*batch L"] | None = None,
    label_where: Bool[Array, "*batch L"] | None = None,
    normalization: Literal["mean", "sum"] = "mean",
    label_smoothing: Scalar = 0.0,
    logsumexp_penalty: Scalar = 0.0,
    class_weights: Float[Array, " V"] | None = None,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""Cross-entropy with several labels per row.

    With labels $y_1, \dots, y_L$ of weights $w_l$, mass $W = \sum_l w_l$, smoothing
    $\epsilon$ and penalty $\lambda$, over the $V$ selected classes, in nats,

    $$L = (1 - \epsilon) \sum_l w_l (\mathrm{lse} - z_{y_l})
        + \epsilon\, W \Bigl(\mathrm{lse} - \frac{1}{V} \sum_j z_j\Bigr)
        + \lambda\, \mathrm{lse}^2 .$$

    It is `softmax_cross_entropy` of the distribution with mass $w_l$ on class $y_l$,
    for a vocabulary so large that only the few classes with mass can be listed: tags of
    an item, products bought together, the top of a teacher's distribution.

    The labels compete with each other: with equal weights all have the same score at
    the optimum, and one more certain than its share of the mass is pushed down. In
    `decoupled_softmax_loss` each label competes with the negatives alone.

    Args:
        logits: An array of logits, or a value such as `softlib.LinearLogits`.
        labels: Class ids in $[0, V)$; one that occurs twice counts twice. Outside, if
            `label_where` keeps it, the loss is NaN and the row has no gradient. A label
            with a weight on an excluded class costs +inf, without gradient.
        label_weights: $w_l$, differentiable, used as given. None: by `normalization`.
        label_where: True for the labels that count, so that lists may be padded with
            anything. A row without labels that count has loss 0 and gradient 0.
        normalization: Static: `"mean"` over the $n$ labels that are kept, $w_l = 1 /
            n$, or their `"sum"`, $w_l = 1$. Only without `label_weights`.
        label_smoothing: $\epsilon \in [0, 1]$, spread evenly over all selected classes.
            A number is static, an array traced.
        logsumexp_penalty: $\lambda \geq 0$, as in `linear_softmax_cross_entropy`.
        class_weights: Factors $a_j$, one number per class, differentiable: $w_l$
            becomes $a_{y_l} w_l$ in the first term. Not with `label_smoothing`.
        where: True for the rows that count; the others cost 0, whatever they hold.

    Returns:
        The loss per row, float32 (float64 if an argument is float64): 0 without
        classes, +inf if all logits are -inf, both with gradient 0.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together, an option is out of range,
            `normalization` meets `label_weights`, or `class_weights` meet a
            `label_smoothing` that is not the number 0.
        NotImplementedError: No implementation that was named can run.

    Derivatives: as `row_statistics`, and with respect to `label_weights` and
        `class_weights`.
    Cost: as `softmax_cross_entropy`; the backward pass compares each tile of
        logits with all $L$ labels of its rows.
    Source: the cross-entropy of statistics textbooks, with the labels as a list. The
        sum is the baseline of "Dual-Encoders for Extreme Multi-Label Classification".

    Example:
        >>> hidden, weight = jnp.eye(2), jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> loss = softlib.losses.multi_label_cross_entropy
        >>> labels = jnp.array([[0, 2], [1, -1]])
        >>> logits = softlib.LinearLogits(hidden, weight)
        >>> print(loss(logits, labels, label_where=labels >= 0).round(4))
        [1.0514 0.2395]
    """
    function = "multi_label_cross_entropy"
    source = source_of(function, logits)
    checks.require_one_of(function, "normalization", normalization, ("mean", "sum"))
    if normalization == "sum":
        if label_weights is not None:
            raise ValueError(
                f"{function}: `normalization` must be 'mean', its default, where "
                f"`label_weights` are given, got {normalization!r}."
            )
        label_weights = jnp.ones(labels.shape, source.dtype)
    names = cross_entropy_statistics(
        source, label_smoothing, logsumexp_penalty, class_weights
    )
    rows = prepare_several(
        source,
        sorted(names),
        labels,
        where,
        label_weights=label_weights,
        label_where=label_where,
        class_weights=class_weights,
    )
    return cross_entropy(rows, label_smoothing, logsumexp_penalty)
