"""Losses of the spherical family beside the Z-loss: squares, second order, distance."""

from typing import Unpack

from jaxtyping import Array, Bool, Float, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib.logits._options import LinearHeadOptions, LogitsOptions
from softlib.logits._sources import GivenLogits, LinearHead, Source
from softlib.typing import Scalar

from ._spherical_family import (
    Sums,
    log_spherical_of,
    log_taylor_of,
    loss_of_sums,
    squared_error_of,
)


@array_arguments
def linear_log_spherical_softmax_loss(
    hidden: Float[Array, "*batch D"],
    weight: Float[Array, "V D"] | Float[Array, "D V"],
    labels: Integer[Array, "*batch"],
    *,
    epsilon: Scalar = 1e-6,
    where: Bool[Array, "..."] | None = None,
    **options: Unpack[LinearHeadOptions],
) -> Float[Array, "*batch"]:
    r"""Log-spherical softmax loss of a linear head, in nats per row; no logits.

    Of the logits $o$ of a row, over its selected classes,

    $$L = -\log \frac{o_y^2 + \epsilon}{\sum_j (o_j^2 + \epsilon)}$$

    Cross-entropy with `softlib.softmax.spherical_softmax` in the place of softmax. It
    does not see the sign of a logit, nor (up to $\epsilon$) their common scale, but a
    shift of them.

    Args:
        hidden: Inputs of the head.
        weight: One row per class, or one column with `vocab_axis=1`.
        labels: Class ids in $[0, V)$. Outside, the loss is NaN and the row has no
            gradient. The label of an excluded class costs +inf, without gradient.
        epsilon: $\epsilon > 0$, what makes a row of zeros uniform; a number is static,
            an array traced and differentiable.
        where: True for the rows that count; broadcasts to the batch shape. Elsewhere
            the loss and all gradients are exactly 0, whatever `hidden` and `labels`
            hold.
        **options: `bias`, `logit_scale`, `logit_softcap`, `temperature`, `class_where`,
            `vocab_axis`, `vocab_chunk`, `token_chunk`, `gradient_filter_eps` (which has
            to be None: every class has a part in the gradient), `axis_name`,
            `precision` and `implementation`, as in `linear_softmax_cross_entropy`.
            Classes of a bias of -inf without a softcap are excluded too.

    Returns:
        The loss per row, float32 (float64 if an argument is float64). A row without
        classes has loss 0 and gradient 0; one whose logits are all -inf costs +inf,
        with gradient 0; one whose sum of squares overflows is NaN.

    Raises:
        TypeError: An argument has the wrong kind of dtype, or a keyword is unknown.
        ValueError: Shapes do not fit together, or an option is out of range.
        NotImplementedError: No implementation that was named can run.

    Derivatives: as `linear_row_statistics`, and with respect to `epsilon`.
    Cost: as `linear_softmax_cross_entropy`, without exponentials. For a head whose step
        does not grow with the vocabulary see `factored_spherical_init`.
    Source: "An Exploration of Softmax Alternatives Belonging to the Spherical Loss
        Family".

    Example:
        >>> hidden, weight = jnp.eye(2), jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> loss = softlib.losses.linear_log_spherical_softmax_loss
        >>> print(loss(hidden, weight, jnp.array([0, 1])).round(4))
        [0. 0.]
    """
    source = LinearHead.of(
        "linear_log_spherical_softmax_loss", hidden, weight, **options
    )
    return _log_spherical_softmax_loss(source, labels, where, epsilon)


@array_arguments
def log_spherical_softmax_loss(
    logits: Float[Array, "*batch V"],
    labels: Integer[Array, "*batch"],
    *,
    epsilon: Scalar = 1e-6,
    where: Bool[Array, "..."] | None = None,
    **options: Unpack[LogitsOptions],
) -> Float[Array, "*batch"]:
    r"""Log-spherical softmax loss of logits, in nats per row.

    The loss of `linear_log_spherical_softmax_loss` from logits that exist.

    Args:
        logits: The scores $o$; -inf never counts.
        labels: Class ids in $[0, V)$, with the exceptions described in
            `linear_log_spherical_softmax_loss`. The label of a logit of -inf
            costs +inf, without gradient.
        epsilon: $\epsilon > 0$, what makes a row of zeros uniform; a number is static,
            an array traced and differentiable.
        where: True for the rows that count; broadcasts to the batch shape. Elsewhere
            the loss and all gradients are exactly 0, whatever `logits` and `labels`
            hold.
        **options: `bias`, `logit_scale`, `logit_softcap`, `temperature`, `class_where`
            and `implementation`, as in `softmax_cross_entropy`.

    Returns:
        The loss per row, float32 (float64 if an argument is float64). A row without
        classes has loss 0 and gradient 0; one whose logits are all -inf costs +inf,
        with gradient 0; one whose sum of squares overflows is NaN.

    Raises:
        TypeError: An argument has the wrong kind of dtype, or a keyword is unknown.
        ValueError: Shapes do not fit together, or an option is out of range.
        NotImplementedError: No implementation that was named can run.

    Derivatives: as `linear_log_spherical_softmax_loss`.
    Cost: one pass over `logits` forward, one backward that writes their gradient; kept
        are the arguments and a bit for each logit.
    Source: "An Exploration of Softmax Alternatives Belonging to the Spherical Loss
        Family".

    Example:
        >>> logits, labels = jnp.array([[2.0, 0.0], [0.0, 0.0]]), jnp.array([0, 1])
        >>> print(softlib.losses.log_spherical_softmax_loss(logits, labels).round(4))
        [0.     0.6931]
    """
    source = GivenLogits.of("log_spherical_softmax_loss", logits, **options)
    return _log_spherical_softmax_loss(source, labels, where, epsilon)


@array_arguments
def linear_log_taylor_softmax_loss(
    hidden: Float[Array, "*batch D"],
    weight: Float[Array, "V D"] | Float[Array, "D V"],
    labels: Integer[Array, "*batch"],
    *,
    where: Bool[Array, "..."] | None = None,
    **options: Unpack[LinearHeadOptions],
) -> Float[Array, "*batch"]:
    r"""Log-Taylor softmax loss of a linear head, in nats per row, without its logits.

    Of the logits $o$ of a row, over its selected classes,

    $$L = -\log \frac{1 + o_y + o_y^2 / 2}{\sum_j (1 + o_j + o_j^2 / 2)}$$

    Cross-entropy with `softlib.softmax.taylor_softmax` of order 2, the largest that is
    spherical, in the place of softmax. It is finite for every logit, and grows again
    for logits of the other classes below -1.

    Args:
        hidden: Inputs of the head.
        weight: One row per class, or one column with `vocab_axis=1`.
        labels: Class ids in $[0, V)$. Outside, the loss is NaN and the row has no
            gradient. The label of an excluded class costs +inf, without gradient.
        where: True for the rows that count; broadcasts to the batch shape. Elsewhere
            the loss and all gradients are exactly 0, whatever `hidden` and `labels`
            hold.
        **options: `bias`, `logit_scale`, `logit_softcap`, `temperature`, `class_where`,
            `vocab_axis`, `vocab_chunk`, `token_chunk`, `gradient_filter_eps` (which has
            to be None: every class has a part in the gradient), `axis_name`,
            `precision` and `implementation`, as in `linear_softmax_cross_entropy`.
            Classes of a bias of -inf without a softcap are excluded too.

    Returns:
        The loss per row, float32 (float64 if an argument is float64). A row without
        classes has loss 0 and gradient 0; one whose logits are all -inf costs +inf,
        with gradient 0; one whose sum of squares overflows is NaN.

    Raises:
        TypeError: An argument has the wrong kind of dtype, or a keyword is unknown.
        ValueError: Shapes do not fit together, or an option is out of range.
        NotImplementedError: No implementation that was named can run.

    Derivatives: as `linear_row_statistics`.
    Cost: as `linear_softmax_cross_entropy`, without exponentials. For a head whose step
        does not grow with the vocabulary see `factored_spherical_init`.
    Source: "An Exploration of Softmax Alternatives Belonging to the Spherical Loss
        Family".

    Example:
        >>> hidden, weight = jnp.eye(2), jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> loss = softlib.losses.linear_log_taylor_softmax_loss
        >>> print((100 * loss(hidden, weight, jnp.array([0, 1]))).round())
        [59. 34.]
    """
    source = LinearHead.of("linear_log_taylor_softmax_loss", hidden, weight, **options)
    return _log_taylor_softmax_loss(source, labels, where)


@array_arguments
def log_taylor_softmax_loss(
    logits: Float[Array, "*batch V"],
    labels: Integer[Array, "*batch"],
    *,
    where: Bool[Array, "..."] | None = None,
    **options: Unpack[LogitsOptions],
) -> Float[Array, "*batch"]:
    r"""Log-Taylor softmax loss of logits, in nats per row.

    The loss of `linear_log_taylor_softmax_loss` from logits that exist.

    Args:
        logits: The scores $o$; -inf never counts.
        labels: Class ids in $[0, V)$, with the exceptions described in
            `linear_log_taylor_softmax_loss`. The label of a logit of -inf
            costs +inf, without gradient.
        where: True for the rows that count; broadcasts to the batch shape. Elsewhere
            the loss and all gradients are exactly 0, whatever `logits` and `labels`
            hold.
        **options: `bias`, `logit_scale`, `logit_softcap`, `temperature`, `class_where`
            and `implementation`, as in `softmax_cross_entropy`.

    Returns:
        The loss per row, float32 (float64 if an argument is float64). A row without
        classes has loss 0 and gradient 0; one whose logits are all -inf costs +inf,
        with gradient 0; one whose sum of squares overflows is NaN.

    Raises:
        TypeError: An argument has the wrong kind of dtype, or a keyword is unknown.
        ValueError: Shapes do not fit together, or an option is out of range.
        NotImplementedError: No implementation that was named can run.

    Derivatives: as `linear_log_taylor_softmax_loss`.
    Cost: one pass over `logits` forward, one backward that writes their gradient; kept
        are the arguments and a bit for each logit.
    Source: "An Exploration of Softmax Alternatives Belonging to the Spherical Loss
        Family".

    Example:
        >>> logits, labels = jnp.array([[2.0, 0.0], [0.0, 0.0]]), jnp.array([0, 1])
        >>> print(softlib.losses.log_taylor_softmax_loss(logits, labels).round(4))
        [0.1823 0.6931]
    """
    source = GivenLogits.of("log_taylor_softmax_loss", logits, **options)
    return _log_taylor_softmax_loss(source, labels, where)


@array_arguments
def linear_spherical_squared_error(
    hidden: Float[Array, "*batch D"],
    weight: Float[Array, "V D"] | Float[Array, "D V"],
    labels: Integer[Array, "*batch"],
    *,
    where: Bool[Array, "..."] | None = None,
    **options: Unpack[LinearHeadOptions],
) -> Float[Array, "*batch"]:
    r"""Squared error to the one-hot label of a linear head, per row; no logits.

    Of the logits $o$ of a row, over its selected classes,

    $$L = \sum_j (o_j - [j = y])^2 = \sum_j o_j^2 - 2 o_y + 1$$

    The sum over the classes, not their mean. Convex, and the simplest loss of the
    spherical family.

    Args:
        hidden: Inputs of the head.
        weight: One row per class, or one column with `vocab_axis=1`.
        labels: Class ids in $[0, V)$. Outside, the loss is NaN and the row has no
            gradient. The label of an excluded class costs +inf, without gradient.
        where: True for the rows that count; broadcasts to the batch shape. Elsewhere
            the loss and all gradients are exactly 0, whatever `hidden` and `labels`
            hold.
        **options: `bias`, `logit_scale`, `logit_softcap`, `temperature`, `class_where`,
            `vocab_axis`, `vocab_chunk`, `token_chunk`, `gradient_filter_eps` (which has
            to be None: every class has a part in the gradient), `axis_name`,
            `precision` and `implementation`, as in `linear_softmax_cross_entropy`.
            Classes of a bias of -inf without a softcap are excluded too.

    Returns:
        The loss per row, float32 (float64 if an argument is float64). A row without
        classes has loss 0 and gradient 0; one whose logits are all -inf costs +inf,
        with gradient 0; one whose sum of squares overflows is NaN.

    Raises:
        TypeError: An argument has the wrong kind of dtype, or a keyword is unknown.
        ValueError: Shapes do not fit together, or an option is out of range.
        NotImplementedError: No implementation that was named can run.

    Derivatives: as `linear_row_statistics`.
    Cost: as `linear_softmax_cross_entropy`, without exponentials. For a head whose step
        does not grow with the vocabulary see `factored_spherical_init`.
    Source: "Efficient Exact Gradient Update for training Deep Networks with Very Large
        Sparse Targets".

    Example:
        >>> hidden, weight = jnp.eye(2), jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> loss = softlib.losses.linear_spherical_squared_error
        >>> print(loss(hidden, weight, jnp.array([0, 1])).round(4))
        [0. 1.]
    """
    source = LinearHead.of("linear_spherical_squared_error", hidden, weight, **options)
    return _spherical_squared_error(source, labels, where)


@array_arguments
def spherical_squared_error(
    logits: Float[Array, "*batch V"],
    labels: Integer[Array, "*batch"],
    *,
    where: Bool[Array, "..."] | None = None,
    **options: Unpack[LogitsOptions],
) -> Float[Array, "*batch"]:
    r"""Squared error to the one-hot label of logits, per row.

    The loss of `linear_spherical_squared_error` from logits that exist.

    Args:
        logits: The scores $o$; -inf never counts.
        labels: Class ids in $[0, V)$, with the exceptions described in
            `linear_spherical_squared_error`. The label of a logit of -inf
            costs +inf, without gradient.
        where: True for the rows that count; broadcasts to the batch shape. Elsewhere
            the loss and all gradients are exactly 0, whatever `logits` and `labels`
            hold.
        **options: `bias`, `logit_scale`, `logit_softcap`, `temperature`, `class_where`
            and `implementation`, as in `softmax_cross_entropy`.

    Returns:
        The loss per row, float32 (float64 if an argument is float64). A row without
        classes has loss 0 and gradient 0; one whose logits are all -inf costs +inf,
        with gradient 0; one whose sum of squares overflows is NaN.

    Raises:
        TypeError: An argument has the wrong kind of dtype, or a keyword is unknown.
        ValueError: Shapes do not fit together, or an option is out of range.
        NotImplementedError: No implementation that was named can run.

    Derivatives: as `linear_spherical_squared_error`.
    Cost: one pass over `logits` forward, one backward that writes their gradient; kept
        are the arguments and a bit for each logit.
    Source: "Efficient Exact Gradient Update for training Deep Networks with Very Large
        Sparse Targets".

    Example:
        >>> logits, labels = jnp.array([[2.0, 0.0], [0.0, 0.0]]), jnp.array([0, 1])
        >>> print(softlib.losses.spherical_squared_error(logits, labels).round(4))
        [1. 1.]
    """
    source = GivenLogits.of("spherical_squared_error", logits, **options)
    return _spherical_squared_error(source, labels, where)


def _log_spherical_softmax_loss(
    source: Source, labels: Array, where: Array | None, epsilon: Scalar
) -> Array:
    checks.require_positive_scalars(source.function, epsilon=epsilon)

    def formula(sums: Sums) -> Array:
        return log_spherical_of(sums.label, sums.squares, sums.classes, epsilon)

    return loss_of_sums(source, labels, where, formula)


def _log_taylor_softmax_loss(
    source: Source, labels: Array, where: Array | None
) -> Array:
    def formula(sums: Sums) -> Array:
        return log_taylor_of(sums.label, sums.total, sums.squares, sums.classes)

    return loss_of_sums(source, labels, where, formula)


def _spherical_squared_error(
    source: Source, labels: Array, where: Array | None
) -> Array:
    def formula(sums: Sums) -> Array:
        return squared_error_of(sums.label, sums.squares)

    return loss_of_sums(source, labels, where, formula)
