r"""Knowledge distillation: a teacher's whole prediction instead of a label."""

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._expm1 import log_one_minus_exp
from softlib._ids import labels_in_range
from softlib.logits import Logits
from softlib.logits._compose import (
    chained_log_probability,
    log_probability_of_labels,
)
from softlib.logits._engine import pair_terms
from softlib.logits._labelled_rows import rows_that_count, weigh
from softlib.logits._pair import SourcePair
from softlib.typing import Scalar


@array_arguments
def knowledge_distillation_loss(
    logits: Logits,
    teacher_logits: Logits,
    *,
    temperature: Scalar = 1.0,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""Knowledge distillation: $T^2$ times a divergence from the teacher.

    With $S_T$ and $P_T$ the softmax of the student's and the teacher's logits over $T$,
    in nats per row,

    $$L = T^2\, \mathrm{KL}(P_T \,\|\, S_T) .$$

    The factor keeps the size of the gradient at any temperature. For large $T$ the loss
    tends to half the squared distance of the centred logits, over the number of
    classes.

    Args:
        logits: The student's: an array, or a value such as `softlib.LinearLogits`.
        teacher_logits: The teacher's, over the same classes: of another head with any
            number of features, or stored if `logits` are.
        temperature: $T > 0$; a number is static, an array traced and differentiable,
            through both distributions.
        where: True for the rows that count; the others cost 0, whatever they hold.

    Returns:
        The loss per row, float32 (float64 if an argument is float64): 0 without
        classes, +inf if all logits are -inf, both with gradient 0.

    Raises:
        TypeError, ValueError, NotImplementedError: As `softmax_cross_entropy`.

    Derivatives: as `softmax_kl_divergence`; the teacher has none.
    Cost: as `softmax_kl_divergence` with a constant second head.
    Source: "Distilling the Knowledge in a Neural Network".

    Example:
        >>> hidden, weight = jnp.eye(2), jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> kd = softlib.losses.knowledge_distillation_loss
        >>> logits = softlib.LinearLogits(hidden, weight)
        >>> teacher = softlib.LinearLogits(hidden, 2 * weight)
        >>> print(kd(logits, teacher, temperature=2.0).round(4))
        [0.124  0.3955]
    """
    function = "knowledge_distillation_loss"
    _check_temperature(function, temperature)
    pair = SourcePair.of(function, logits, teacher_logits, "teacher_logits")
    pair = pair.with_constant_target().at_temperature(temperature)
    divergence = pair.divergence("kl", where=where)
    return jnp.square(_wide(temperature, divergence)) * divergence


@array_arguments
def normalized_distillation_loss(
    logits: Logits,
    teacher_logits: Logits,
    labels: Integer[Array, "*batch"],
    *,
    temperature: Scalar = 1.0,
    gamma: Scalar = 1.5,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""Normalized distillation (NKD), to be added to cross-entropy.

    With $S$ and $P$ the softmax of the student's and the teacher's logits, and
    $\hat S$, $\hat P$ that of their logits over $\lambda$ among the classes other than
    the label $y$, in nats per row,

    $$L = -P_y \log S_y
        - \gamma \lambda^2 \sum_{j \neq y} \hat P_j \log \hat S_j .$$

    Among the other classes both distributions sum to 1, so that the student's can equal
    the teacher's; without the normalisation it can only if $S_y = P_y$. Add the loss to
    cross-entropy with the label. The minimum of the second term is $\gamma \lambda^2$
    times the entropy of $\hat P$, not 0.

    Args:
        logits, teacher_logits, where: As in `knowledge_distillation_loss`.
        labels: Class ids in $[0, V)$. Outside, the loss is NaN and the row has no
            gradient. The label of an excluded class leaves the second term.
        temperature: $\lambda > 0$, of the second term alone; a number is static, an
            array traced and differentiable, through both distributions.
        gamma: $\gamma \geq 0$; a number is static, an array traced and differentiable.

    Returns:
        As `knowledge_distillation_loss`; a row with two classes has no second term.

    Raises:
        TypeError, ValueError, NotImplementedError: As `softmax_cross_entropy`.

    Derivatives: as `softmax_kl_divergence`, and with respect to `gamma`; the teacher
        has none.
    Cost: six products of N V D forward and seven backward.
    Source: "From Knowledge Distillation to Self-Knowledge Distillation: A Unified
        Approach with Normalized Loss and Customized Soft Labels".

    Example:
        >>> hidden, weight = jnp.eye(2), jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> nkd = softlib.losses.normalized_distillation_loss
        >>> logits = softlib.LinearLogits(hidden, weight)
        >>> teacher = softlib.LinearLogits(hidden, 2 * weight)
        >>> print(f"{nkd(logits, teacher, jnp.array([0, 1]))[0]:.2f}")
        1.47
    """
    function = "normalized_distillation_loss"
    _check_temperature(function, temperature)
    pair = SourcePair.of(function, logits, teacher_logits, "teacher_logits")
    checks.require_scalar(function, "gamma", gamma, 0, math.inf)
    labels, where, outside = _valid(pair, labels, where)
    pair = pair.with_constant_target()
    confidence = jnp.exp(log_probability_of_labels(pair.target, labels, where))
    log_prob, own = chained_log_probability(pair.own, labels, where)
    target = weigh(confidence, 0 - log_prob)
    heated = SourcePair(own, pair.target).at_temperature(temperature)
    others = heated.divergence("cross_entropy", excluded_labels=labels, where=where)
    factor = _wide(gamma, others) * jnp.square(_wide(temperature, others))
    return _with_outside(target + factor * others, outside)


@array_arguments
def decoupled_knowledge_distillation_loss(
    logits: Logits,
    teacher_logits: Logits,
    labels: Integer[Array, "*batch"],
    *,
    alpha: Scalar = 1.0,
    beta: Scalar = 8.0,
    temperature: Scalar = 4.0,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""Decoupled knowledge distillation (DKD), in nats per row.

    $$L = T^2 \bigl(\alpha\, \mathrm{KL}((P_y, 1 - P_y) \,\|\, (S_y, 1 - S_y))
        + \beta\, \mathrm{KL}(\hat P \,\|\, \hat S)\bigr)$$

    with all distributions at temperature $T$ and $\hat P$, $\hat S$ those among the
    classes other than the label. Plain distillation is $\alpha = 1$ and
    $\beta = 1 - P_y$, so that the other classes count least where the teacher is sure
    of the label. Add the loss to cross-entropy with the label.

    Args:
        logits, teacher_logits, where: As in `knowledge_distillation_loss`.
        labels: Class ids in $[0, V)$. Outside, the loss is NaN and the row has no
            gradient. The label of an excluded class has probability 0 in both.
        alpha: Factor of the first term, $\geq 0$; an array is traced, differentiable.
        beta: Factor of the second term, $\geq 0$; an array is traced, differentiable.
        temperature: $T > 0$; a number is static, an array traced and differentiable.

    Returns:
        As `knowledge_distillation_loss`; a row with two classes has no second term.

    Raises:
        TypeError, ValueError, NotImplementedError: As `softmax_cross_entropy`.

    Derivatives: as `softmax_kl_divergence`, and with respect to `alpha` and `beta`; the
        teacher has none.
    Cost: a few passes over both logits.
    Source: "Decoupled Knowledge Distillation".

    Example:
        >>> logits, teacher = jnp.zeros((1, 3)), jnp.array([[2.0, 1.0, 0.0]])
        >>> dkd = softlib.losses.decoupled_knowledge_distillation_loss
        >>> print(dkd(logits, teacher, jnp.array([0]), temperature=1.0).round(2))
        [1.12]
    """
    function = "decoupled_knowledge_distillation_loss"
    _check_temperature(function, temperature)
    checks.require_scalar(function, "alpha", alpha, 0, math.inf)
    checks.require_scalar(function, "beta", beta, 0, math.inf)
    pair = SourcePair.of(function, logits, teacher_logits, "teacher_logits")
    pair = pair.with_constant_target().at_temperature(temperature)
    labels, where, outside = _valid(pair, labels, where)
    student, teacher = (
        _label_and_rest(log_probability_of_labels(source, labels, where))
        for source in (pair.own, pair.target)
    )
    binary = pair_terms.values("kl", teacher, student, None).sum(-1)
    others = pair.divergence("kl", excluded_labels=labels, where=where)
    loss = _wide(alpha, others) * jnp.where(where, binary, 0)
    loss = loss + _wide(beta, others) * others
    return _with_outside(jnp.square(_wide(temperature, loss)) * loss, outside)


# ------------------------------------------------------------------------- compositions
def _valid(
    pair: SourcePair, labels: Any, where: Array | None
) -> tuple[Array, Bool[Array, "*batch"], Bool[Array, "*batch"]]:
    """Labels, the rows that count with a label in range, and those with one outside."""
    source = pair.own
    labels = jnp.asarray(labels)
    checks.require_integer(source.function, labels=labels)
    why = "the batch shape"
    checks.require_shape(source.function, "labels", labels, source.batch_shape, why)
    where = rows_that_count(source, where)
    kept = jnp.ones(source.batch_shape, bool) if where is None else where
    labels = labels_in_range(labels, source.num_classes)
    return jnp.where(labels < 0, 0, labels), kept & (labels >= 0), kept & (labels < 0)


def _with_outside(loss: Array, outside: Bool[Array, "*batch"]) -> Array:
    return jnp.where(outside, jnp.nan, loss)


def _label_and_rest(log_prob: Float[Array, "*batch"]) -> Float[Array, "*batch 2"]:
    """The pairs (log p, log(1 - p)); log(1 - p) is -inf for p = 1."""
    return jnp.stack([log_prob, log_one_minus_exp(log_prob)], axis=-1)


def _wide(number: Scalar, like: Array) -> Array:
    """The number in the dtype of the loss, so that its square is too."""
    return jnp.asarray(number, like.dtype)


def _check_temperature(function: str, temperature: Scalar) -> None:
    checks.require_scalar(function, "temperature", temperature, 0, math.inf)
