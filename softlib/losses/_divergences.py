r"""Divergences of two softmax distributions, from two linear heads or from logits."""

from typing import Unpack

from jaxtyping import Array, Bool, Float, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib.logits._pair import HeadPairOptions, LogitsPairOptions, SourcePair
from softlib.typing import Scalar


@array_arguments
def linear_kl_divergence(
    hidden: Float[Array, "*batch D"],
    weight: Float[Array, "V D"] | Float[Array, "D V"],
    target_hidden: Float[Array, "*batch E"],
    target_weight: Float[Array, "V E"] | Float[Array, "E V"],
    *,
    reverse: bool = False,
    excluded_labels: Integer[Array, "..."] | None = None,
    where: Bool[Array, "..."] | None = None,
    **options: Unpack[HeadPairOptions],
) -> Float[Array, "*batch"]:
    r"""Kullback-Leibler divergence of two linear heads, without the logits of either.

    With $q$ the softmax of the head's logits and $p$ that of the target's,

    $$\mathrm{KL}(p \,\|\, q) = \sum_j p_j \log \frac{p_j}{q_j},$$

    the forward direction: the prediction must cover whatever the target does.
    Reversed, $\mathrm{KL}(q \,\|\, p)$, it may keep to a part of that. The sum runs
    over terms $p\,\phi(\log q - \log p) \geq 0$ with $\phi(d) = e^d - 1 - d$, so that
    nothing cancels where the distributions are close. Neither head's logits are ever
    formed.

    Args:
        hidden: Inputs of the head.
        weight: One row per class, or one column with `vocab_axis=1`.
        target_hidden: Inputs of the second head, of any number of features.
        target_weight: Of the same classes; one column per class with
            `target_vocab_axis=1`.
        reverse: Static; the other direction, KL(prediction || target).
        excluded_labels: Class ids, one or several per row, that both distributions
            leave out: they are normalised over the others. An id outside $[0, V)$
            excludes nothing.
        where: True for the rows that count; broadcasts to the batch shape. Elsewhere
            the result and all gradients are exactly 0, whatever the arguments hold.
        **options: `bias`, `logit_scale`, `logit_softcap`, `vocab_axis` of the head and,
            with `target_` in front, of the second one; `temperature`, `class_where`,
            `vocab_chunk`, `token_chunk`, `axis_name`, `precision` and `implementation`
            of both, as in `linear_softmax_cross_entropy`.

    Returns:
        The divergence per row in nats, float32 (float64 if an argument is float64). A
        row without classes has 0 and gradient 0; one whose logits are all -inf costs
        +inf, one of a target whose logits are costs 0 (with `reverse` the other way
        round), both with gradient 0.

    Raises:
        TypeError: An argument has the wrong kind of dtype, or a keyword is unknown.
        ValueError: Shapes do not fit together, or an option is out of range.
        NotImplementedError: No implementation that was named can run.

    Derivatives: reverse mode of any order and forward over reverse (Hessian-vector
        products), with respect to both heads; plain forward mode with
        `implementation="reference"`. A head of which no gradient is asked costs none:
        `jax.lax.stop_gradient` makes a constant of a teacher.
        In a row of infinite divergence they are those of its finite terms.
    Cost: four products of N V D forward (each head's logsumexp, then both heads' tiles)
        and six backward, four with one head constant; scratch of a few tiles of each
        head. Kept for the backward pass: the arguments and five numbers per row.
    Source: the row-statistics engine with a second head. No $T^2$: see
        `linear_knowledge_distillation_loss`.

    Example:
        >>> hidden, weight = jnp.eye(2), jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> kl = softlib.losses.linear_kl_divergence
        >>> print(kl(hidden, weight, hidden, 2 * weight).round(4))
        [0.0989 0.1329]
    """
    function = "linear_kl_divergence"
    pair = SourcePair.of_heads(
        function, hidden, weight, target_hidden, target_weight, **options
    )
    return pair.divergence(
        "kl", reverse=reverse, excluded_labels=excluded_labels, where=where
    )


@array_arguments
def softmax_kl_divergence(
    logits: Float[Array, "*batch V"],
    target_logits: Float[Array, "*batch V"],
    *,
    reverse: bool = False,
    excluded_labels: Integer[Array, "..."] | None = None,
    where: Bool[Array, "..."] | None = None,
    **options: Unpack[LogitsPairOptions],
) -> Float[Array, "*batch"]:
    r"""Kullback-Leibler divergence between the softmax of two arrays of logits.

    The divergence of `linear_kl_divergence` from logits that exist.

    Args:
        logits: Unnormalised log-probabilities.
        target_logits: Those of the second distribution, over the same classes.
        reverse: Static; the other direction, KL(prediction || target).
        excluded_labels: Class ids, one or several per row, that both distributions
            leave out: they are normalised over the others. An id outside $[0, V)$
            excludes nothing.
        where: True for the rows that count; broadcasts to the batch shape. Elsewhere
            the result and all gradients are exactly 0, whatever the arguments hold.
        **options: `bias`, `logit_scale`, `logit_softcap` of the logits and, with
            `target_` in front, of the second ones; `temperature`, `class_where` and
            `implementation` of both, as in `softmax_cross_entropy`.

    Returns:
        The divergence per row in nats, float32 (float64 if an argument is float64). A
        row without classes has 0 and gradient 0; one whose logits are all -inf costs
        +inf, one of a target whose logits are costs 0 (with `reverse` the other way
        round), both with gradient 0.

    Raises:
        TypeError: An argument has the wrong kind of dtype, or a keyword is unknown.
        ValueError: Shapes do not fit together, or an option is out of range.
        NotImplementedError: No implementation that was named can run.

    Derivatives: forward over reverse and reverse mode, any order, with respect to both
        logits.
        In a row of infinite divergence they are those of its finite terms.
    Cost: two passes over both logits forward and one backward, with arrays of their
        size.
    Source: the definition; the form without cancellation is `linear_kl_divergence`'s.

    Example:
        >>> logits, target = jnp.array([[0.0, 0.0]]), jnp.array([[2.0, 0.0]])
        >>> print(softlib.losses.softmax_kl_divergence(logits, target).round(4))
        [0.3278]
    """
    function = "softmax_kl_divergence"
    pair = SourcePair.of_logits(function, logits, target_logits, **options)
    return pair.divergence(
        "kl", reverse=reverse, excluded_labels=excluded_labels, where=where
    )


@array_arguments
def linear_jensen_shannon_divergence(
    hidden: Float[Array, "*batch D"],
    weight: Float[Array, "V D"] | Float[Array, "D V"],
    target_hidden: Float[Array, "*batch E"],
    target_weight: Float[Array, "V E"] | Float[Array, "E V"],
    *,
    mixture: Scalar = 0.5,
    excluded_labels: Integer[Array, "..."] | None = None,
    where: Bool[Array, "..."] | None = None,
    **options: Unpack[HeadPairOptions],
) -> Float[Array, "*batch"]:
    r"""Jensen-Shannon divergence of two linear heads, without the logits of either.

    With $q$ the softmax of the head's logits, $p$ that of the target's and their
    mixture $m = \beta p + (1 - \beta) q$,

    $$\mathrm{JS}_\beta = \beta\, \mathrm{KL}(p \,\|\, m)
        + (1 - \beta)\, \mathrm{KL}(q \,\|\, m) .$$

    Bounded by the entropy of $(\beta, 1 - \beta)$, $\log 2$ for equal weights, finite
    also where one distribution has no mass; divided by $\beta$ it tends to
    $\mathrm{KL}(p \,\|\, q)$ for $\beta \to 0$, and by $1 - \beta$ to the reverse for
    $\beta \to 1$. Neither head's logits are ever
    formed.

    Args:
        hidden: Inputs of the head.
        weight: One row per class, or one column with `vocab_axis=1`.
        target_hidden: Inputs of the second head, of any number of features.
        target_weight: Of the same classes; one column per class with
            `target_vocab_axis=1`.
        mixture: $\beta \in (0, 1)$, the weight of the target; a number is static, an
            array traced and differentiable. The ends are excluded: there the divergence
            is 0 everywhere.
        excluded_labels: Class ids, one or several per row, that both distributions
            leave out: they are normalised over the others. An id outside $[0, V)$
            excludes nothing.
        where: True for the rows that count; broadcasts to the batch shape. Elsewhere
            the result and all gradients are exactly 0, whatever the arguments hold.
        **options: `bias`, `logit_scale`, `logit_softcap`, `vocab_axis` of the head and,
            with `target_` in front, of the second one; `temperature`, `class_where`,
            `vocab_chunk`, `token_chunk`, `axis_name`, `precision` and `implementation`
            of both, as in `linear_softmax_cross_entropy`.

    Returns:
        The divergence per row in nats, float32 (float64 if an argument is float64).
        A row without classes has 0 and gradient 0; where the logits of one are all
        -inf, its probabilities in the formula are 0.

    Raises:
        TypeError: An argument has the wrong kind of dtype, or a keyword is unknown.
        ValueError: Shapes do not fit together, or an option is out of range.
        NotImplementedError: No implementation that was named can run.

    Derivatives: reverse mode of any order and forward over reverse (Hessian-vector
        products), with respect to both heads and `mixture`; plain forward mode with
        `implementation="reference"`. A head of which no gradient is asked costs none:
        `jax.lax.stop_gradient` makes a constant of a teacher.
    Cost: four products of N V D forward (each head's logsumexp, then both heads' tiles)
        and six backward, four with one head constant; scratch of a few tiles of each
        head. Kept for the backward pass: the arguments and five numbers per row.
    Source: "On-Policy Distillation of Language Models: Learning from Self-Generated
        Mistakes" calls it generalized; here streamed.

    Example:
        >>> hidden, weight = jnp.eye(2), jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> js = softlib.losses.linear_jensen_shannon_divergence
        >>> print(js(hidden, weight, hidden, 2 * weight).round(4))
        [0.026  0.0398]
    """
    function = "linear_jensen_shannon_divergence"
    _check_mixture(function, mixture)
    pair = SourcePair.of_heads(
        function, hidden, weight, target_hidden, target_weight, **options
    )
    return pair.divergence(
        "jensen_shannon",
        mixture=mixture,
        excluded_labels=excluded_labels,
        where=where,
    )


@array_arguments
def softmax_jensen_shannon_divergence(
    logits: Float[Array, "*batch V"],
    target_logits: Float[Array, "*batch V"],
    *,
    mixture: Scalar = 0.5,
    excluded_labels: Integer[Array, "..."] | None = None,
    where: Bool[Array, "..."] | None = None,
    **options: Unpack[LogitsPairOptions],
) -> Float[Array, "*batch"]:
    r"""Jensen-Shannon divergence between the softmax of two arrays of logits.

    The divergence of `linear_jensen_shannon_divergence` from logits that exist.

    Args:
        logits: Unnormalised log-probabilities.
        target_logits: Those of the second distribution, over the same classes.
        mixture: $\beta \in (0, 1)$, the weight of the target; a number is static, an
            array traced and differentiable. The ends are excluded: there the divergence
            is 0 everywhere.
        excluded_labels: Class ids, one or several per row, that both distributions
            leave out: they are normalised over the others. An id outside $[0, V)$
            excludes nothing.
        where: True for the rows that count; broadcasts to the batch shape. Elsewhere
            the result and all gradients are exactly 0, whatever the arguments hold.
        **options: `bias`, `logit_scale`, `logit_softcap` of the logits and, with
            `target_` in front, of the second ones; `temperature`, `class_where` and
            `implementation` of both, as in `softmax_cross_entropy`.

    Returns:
        The divergence per row in nats, float32 (float64 if an argument is float64).
        A row without classes has 0 and gradient 0; where the logits of one are all
        -inf, its probabilities in the formula are 0.

    Raises:
        TypeError: An argument has the wrong kind of dtype, or a keyword is unknown.
        ValueError: Shapes do not fit together, or an option is out of range.
        NotImplementedError: No implementation that was named can run.

    Derivatives: forward over reverse and reverse mode, any order, with respect to both
        logits and `mixture`.
    Cost: two passes over both logits forward and one backward, with arrays of their
        size.
    Source: as `linear_jensen_shannon_divergence`.

    Example:
        >>> logits, target = jnp.array([[0.0, 0.0]]), jnp.array([[2.0, 0.0]])
        >>> js = softlib.losses.softmax_jensen_shannon_divergence
        >>> print(js(logits, target).round(4))
        [0.0895]
    """
    function = "softmax_jensen_shannon_divergence"
    _check_mixture(function, mixture)
    pair = SourcePair.of_logits(function, logits, target_logits, **options)
    return pair.divergence(
        "jensen_shannon",
        mixture=mixture,
        excluded_labels=excluded_labels,
        where=where,
    )


@array_arguments
def linear_soft_target_cross_entropy(
    hidden: Float[Array, "*batch D"],
    weight: Float[Array, "V D"] | Float[Array, "D V"],
    target_hidden: Float[Array, "*batch E"],
    target_weight: Float[Array, "V E"] | Float[Array, "E V"],
    *,
    excluded_labels: Integer[Array, "..."] | None = None,
    where: Bool[Array, "..."] | None = None,
    **options: Unpack[HeadPairOptions],
) -> Float[Array, "*batch"]:
    r"""Cross-entropy of a linear head with a second one's softmax as the soft target.

    With $q$ the softmax of the head's logits and $p$ that of the target's,

    $$H(p, q) = -\sum_j p_j \log q_j = H(p) + \mathrm{KL}(p \,\|\, q) .$$

    For a constant target its gradient is that of the divergence; its minimum is the
    target's entropy, not 0. Neither head's logits are ever
    formed.

    Args:
        hidden: Inputs of the head.
        weight: One row per class, or one column with `vocab_axis=1`.
        target_hidden: Inputs of the second head, of any number of features.
        target_weight: Of the same classes; one column per class with
            `target_vocab_axis=1`.
        excluded_labels: Class ids, one or several per row, that both distributions
            leave out: they are normalised over the others. An id outside $[0, V)$
            excludes nothing.
        where: True for the rows that count; broadcasts to the batch shape. Elsewhere
            the result and all gradients are exactly 0, whatever the arguments hold.
        **options: `bias`, `logit_scale`, `logit_softcap`, `vocab_axis` of the head and,
            with `target_` in front, of the second one; `temperature`, `class_where`,
            `vocab_chunk`, `token_chunk`, `axis_name`, `precision` and `implementation`
            of both, as in `linear_softmax_cross_entropy`.

    Returns:
        The cross-entropy per row in nats, float32 (float64 if an argument is float64).
        A row without classes has 0 and gradient 0; one whose logits are all -inf costs
        +inf, with gradient 0.

    Raises:
        TypeError: An argument has the wrong kind of dtype, or a keyword is unknown.
        ValueError: Shapes do not fit together, or an option is out of range.
        NotImplementedError: No implementation that was named can run.

    Derivatives: reverse mode of any order and forward over reverse (Hessian-vector
        products), with respect to both heads; plain forward mode with
        `implementation="reference"`. A head of which no gradient is asked costs none:
        `jax.lax.stop_gradient` makes a constant of a teacher.
        In a row of infinite divergence they are those of its finite terms.
    Cost: four products of N V D forward (each head's logsumexp, then both heads' tiles)
        and six backward, four with one head constant; scratch of a few tiles of each
        head. Kept for the backward pass: the arguments and five numbers per row.
    Source: the definition.

    Example:
        >>> hidden, weight = jnp.eye(2), jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> loss = softlib.losses.linear_soft_target_cross_entropy
        >>> print(loss(hidden, weight, hidden, 2 * weight).round(2))
        [0.76 0.31]
    """
    function = "linear_soft_target_cross_entropy"
    pair = SourcePair.of_heads(
        function, hidden, weight, target_hidden, target_weight, **options
    )
    return pair.divergence(
        "cross_entropy", excluded_labels=excluded_labels, where=where
    )


@array_arguments
def softmax_soft_target_cross_entropy(
    logits: Float[Array, "*batch V"],
    target_logits: Float[Array, "*batch V"],
    *,
    excluded_labels: Integer[Array, "..."] | None = None,
    where: Bool[Array, "..."] | None = None,
    **options: Unpack[LogitsPairOptions],
) -> Float[Array, "*batch"]:
    r"""Cross-entropy of logits with the softmax of others as the soft target.

    The cross-entropy of `linear_soft_target_cross_entropy` from logits that exist.

    Args:
        logits: Unnormalised log-probabilities.
        target_logits: Those of the second distribution, over the same classes.
        excluded_labels: Class ids, one or several per row, that both distributions
            leave out: they are normalised over the others. An id outside $[0, V)$
            excludes nothing.
        where: True for the rows that count; broadcasts to the batch shape. Elsewhere
            the result and all gradients are exactly 0, whatever the arguments hold.
        **options: `bias`, `logit_scale`, `logit_softcap` of the logits and, with
            `target_` in front, of the second ones; `temperature`, `class_where` and
            `implementation` of both, as in `softmax_cross_entropy`.

    Returns:
        The cross-entropy per row in nats, float32 (float64 if an argument is float64).
        A row without classes has 0 and gradient 0; one whose logits are all -inf costs
        +inf, with gradient 0.

    Raises:
        TypeError: An argument has the wrong kind of dtype, or a keyword is unknown.
        ValueError: Shapes do not fit together, or an option is out of range.
        NotImplementedError: No implementation that was named can run.

    Derivatives: forward over reverse and reverse mode, any order, with respect to both
        logits.
        In a row of infinite divergence they are those of its finite terms.
    Cost: two passes over both logits forward and one backward, with arrays of their
        size.
    Source: the definition.

    Example:
        >>> logits, target = jnp.array([[0.0, 0.0]]), jnp.array([[2.0, 0.0]])
        >>> loss = softlib.losses.softmax_soft_target_cross_entropy
        >>> print(loss(logits, target).round(4))
        [0.6931]
    """
    function = "softmax_soft_target_cross_entropy"
    pair = SourcePair.of_logits(function, logits, target_logits, **options)
    return pair.divergence(
        "cross_entropy", excluded_labels=excluded_labels, where=where
    )


def _check_mixture(function: str, mixture: Scalar) -> None:
    checks.require_scalar(function, "mixture", mixture, 0, 1)
    if isinstance(mixture, int | float) and mixture in (0, 1):
        raise ValueError(
            f"{function}: `mixture` must lie between 0 and 1, got {mixture}, where the "
            "divergence is 0 everywhere."
        )
