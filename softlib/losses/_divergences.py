r"""Divergences of two softmax distributions."""

from jaxtyping import Array, Bool, Float, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib.logits import Logits
from softlib.logits._pair import SourcePair
from softlib.typing import Scalar


@array_arguments
def softmax_kl_divergence(
    logits: Logits,
    teacher_logits: Logits,
    *,
    reverse: bool = False,
    excluded_labels: Integer[Array, "..."] | None = None,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""Kullback-Leibler divergence of two softmax distributions, in nats per row.

    With $q$ the softmax of `logits` and $p$ that of `teacher_logits`,

    $$\mathrm{KL}(p \,\|\, q) = \sum_j p_j \log \frac{p_j}{q_j},$$

    the forward direction: the prediction must have mass wherever the teacher has some.
    In the reverse direction, $\mathrm{KL}(q \,\|\, p)$, it may leave out classes of the
    teacher. The terms of the sum are $p\,\phi(\log q - \log p) \geq 0$ with
    $\phi(d) = e^d - 1 - d$, so that nothing cancels where the distributions are close.
    Logits of heads are never formed.

    Args:
        logits: An array of logits, or a value such as `softlib.LinearLogits`.
        teacher_logits: Those of the second distribution, over the same classes: of
            another head with any number of features, or stored if `logits` are.
        reverse: Static; the other direction, KL(prediction || teacher).
        excluded_labels: Class ids, one or several per row, that both distributions
            leave out: they are normalised over the others. An id outside $[0, V)$
            excludes nothing.
        where: True for the rows that count; the others cost 0, whatever they hold.

    Returns:
        The divergence per row in nats, float32 (float64 if an argument is float64). A
        row without classes has 0 and gradient 0. It is +inf if `logits` are all -inf,
        and 0 if `teacher_logits` are (with `reverse` the other way round), both with
        gradient 0.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together, or an option is out of range.
        NotImplementedError: No implementation that was named can run.

    Derivatives: reverse mode of any order and forward over reverse (Hessian-vector
        products), with respect to both; plain forward mode with
        `implementation="reference"`. A head of which no gradient is asked costs none:
        `jax.lax.stop_gradient` makes a constant of a teacher.
        In a row of infinite divergence they are those of its finite terms.
    Cost: of two heads four products of N V D forward (each head's logsumexp, then both
        heads' tiles) and six backward, four with one head constant; scratch of a few
        tiles of each head, and the arguments and five numbers per row are kept for the
        backward pass. Of stored logits two passes over both forward and one backward,
        with arrays of their size.
    Source: the row-statistics engine with a second head. No $T^2$: see
        `knowledge_distillation_loss`.

    Example:
        >>> hidden, weight = jnp.eye(2), jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> kl = softlib.losses.softmax_kl_divergence
        >>> logits = softlib.LinearLogits(hidden, weight)
        >>> teacher = softlib.LinearLogits(hidden, 2 * weight)
        >>> print(kl(logits, teacher).round(4))
        [0.0989 0.1329]
    """
    function = "softmax_kl_divergence"
    pair = SourcePair.of(function, logits, teacher_logits)
    return pair.divergence(
        "kl", reverse=reverse, excluded_labels=excluded_labels, where=where
    )


@array_arguments
def softmax_jensen_shannon_divergence(
    logits: Logits,
    teacher_logits: Logits,
    *,
    mixture: Scalar = 0.5,
    excluded_labels: Integer[Array, "..."] | None = None,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""Jensen-Shannon divergence of two softmax distributions, in nats per row.

    With $q$ the softmax of `logits`, $p$ that of `teacher_logits` and their mixture
     $m = \beta p + (1 - \beta) q$,

    $$\mathrm{JS}_\beta = \beta\, \mathrm{KL}(p \,\|\, m)
        + (1 - \beta)\, \mathrm{KL}(q \,\|\, m) .$$

    It is at most the entropy of $(\beta, 1 - \beta)$, $\log 2$ for equal weights, also
    where one distribution has no mass. Divided by $\beta$ it tends to
    $\mathrm{KL}(p \,\|\, q)$ for $\beta \to 0$; divided by $1 - \beta$ it tends to the
    reverse for $\beta \to 1$. Logits of heads are never formed.

    Args:
        logits: An array of logits, or a value such as `softlib.LinearLogits`.
        teacher_logits: As in `softmax_kl_divergence`.
        mixture: $\beta \in (0, 1)$, the weight of the teacher; a number is static, an
            array traced and differentiable. The ends are excluded: there the divergence
            is 0 everywhere.
        excluded_labels, where: As in `softmax_kl_divergence`.

    Returns:
        The divergence per row in nats, float32 (float64 if an argument is float64).
        A row without classes has 0 and gradient 0; where the logits of one are all
        -inf, its probabilities in the formula are 0.

    Raises:
        TypeError, ValueError, NotImplementedError: As `softmax_kl_divergence`.

    Derivatives: as `softmax_kl_divergence`, and with respect to `mixture`.
    Cost: as `softmax_kl_divergence`.
    Source: "On-Policy Distillation of Language Models: Learning from Self-Generated
        Mistakes" calls it generalized; here streamed.

    Example:
        >>> hidden, weight = jnp.eye(2), jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> js = softlib.losses.softmax_jensen_shannon_divergence
        >>> logits = softlib.LinearLogits(hidden, weight)
        >>> teacher = softlib.LinearLogits(hidden, 2 * weight)
        >>> print(js(logits, teacher).round(4))
        [0.026  0.0398]
    """
    function = "softmax_jensen_shannon_divergence"
    _check_mixture(function, mixture)
    pair = SourcePair.of(function, logits, teacher_logits)
    return pair.divergence(
        "jensen_shannon",
        mixture=mixture,
        excluded_labels=excluded_labels,
        where=where,
    )


@array_arguments
def softmax_soft_target_cross_entropy(
    logits: Logits,
    teacher_logits: Logits,
    *,
    excluded_labels: Integer[Array, "..."] | None = None,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""Cross-entropy with the softmax of other logits as the soft target.

    With $q$ the softmax of `logits` and $p$ that of `teacher_logits`,

    $$H(p, q) = -\sum_j p_j \log q_j = H(p) + \mathrm{KL}(p \,\|\, q) .$$

    For a constant teacher its gradient is that of the divergence. Its minimum is the
    teacher's entropy, not 0. Logits of heads are never formed.

    Args:
        logits: An array of logits, or a value such as `softlib.LinearLogits`.
        teacher_logits: As in `softmax_kl_divergence`.
        excluded_labels, where: As in `softmax_kl_divergence`.

    Returns:
        The cross-entropy per row in nats, float32 (float64 if an argument is float64).
        A row without classes has 0 and gradient 0; one whose logits are all -inf costs
        +inf, with gradient 0.

    Raises:
        TypeError, ValueError, NotImplementedError: As `softmax_kl_divergence`.

    Derivatives: as `softmax_kl_divergence`.
    Cost: as `softmax_kl_divergence`.
    Source: the definition.

    Example:
        >>> hidden, weight = jnp.eye(2), jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> loss = softlib.losses.softmax_soft_target_cross_entropy
        >>> logits = softlib.LinearLogits(hidden, weight)
        >>> teacher = softlib.LinearLogits(hidden, 2 * weight)
        >>> print(loss(logits, teacher).round(2))
        [0.76 0.31]
    """
    function = "softmax_soft_target_cross_entropy"
    pair = SourcePair.of(function, logits, teacher_logits)
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
