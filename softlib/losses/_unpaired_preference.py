r"""A loss of single sequences that were found good or bad, without pairs."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import promoted
from softlib.typing import Scalar

from ._given_log_probs import counted, finite_part, log_probs_of_sequences


@array_arguments
def kto_loss(
    log_prob: Float[Array, "*batch"],
    reference_log_prob: Float[Array, "*batch"],
    is_desirable: Bool[Array, "*batch"],
    *,
    reference_point: Scalar,
    beta: Scalar = 0.1,
    desirable_weight: Scalar = 1.0,
    undesirable_weight: Scalar = 1.0,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""Kahneman-Tversky optimisation (KTO), per sequence: good or bad, no pairs.

    With $r = \log \frac{\pi(y)}{\pi_\mathrm{ref}(y)}$ and the reference point $z$,

    $$L = \lambda_D\, \sigma(\beta [z - r]) \text{ if desirable}, \qquad
      L = \lambda_U\, \sigma(\beta [r - z]) \text{ otherwise.}$$

    The slope is largest near the reference point and vanishes on both sides of it.
    Choose the weights so that $\lambda_D$ times the number of desirable sequences is
    1 to 4/3 of $\lambda_U$ times that of the others.

    Args:
        log_prob: $\log \pi(y)$, sums over tokens as from `sequence_log_probs`.
        reference_log_prob: $\log \pi_\mathrm{ref}(y)$, of the model before training.
        is_desirable: True for a sequence that was found good.
        reference_point: $z$, an estimate of $\mathrm{KL}(\pi \| \pi_\mathrm{ref})$ that
            the batch shares; below 0 it counts as 0. The paper takes the mean of $r$
            over pairs of a prompt and the answer to another prompt of the batch.
            `kl_to_reference` is an exact one per token.
        beta: $\beta > 0$; a number is static, an array traced and differentiable.
        desirable_weight: $\lambda_D \geq 0$; static or traced, as `beta`.
        undesirable_weight: $\lambda_U \geq 0$, likewise.
        where: True for the sequences that count; others cost 0, whatever they hold.

    Returns:
        The loss per sequence, between 0 and its weight, float32 (float64 if an argument
        is float64). Where $r$ is infinite or NaN, the limit or NaN without a gradient.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes differ, or an option is out of range.

    Derivatives: forward and reverse, any order; 0 for `reference_log_prob` and
        `reference_point`.
    Cost: a few operations for each sequence.
    Source: "KTO: Model Alignment as Prospect Theoretic Optimization".

    Example:
        >>> log_prob, reference = jnp.array([[-10.0, -9.0], [-12.0, -12.0]])
        >>> desirable = jnp.array([True, False])
        >>> loss = softlib.losses.kto_loss
        >>> print(loss(log_prob, reference, desirable, reference_point=1.0).round(4))
        [0.475  0.5498]
    """
    function = "kto_loss"
    checks.require_positive_scalars(function, beta=beta)
    for name, weight in (
        ("desirable_weight", desirable_weight),
        ("undesirable_weight", undesirable_weight),
    ):
        checks.require_scalar(function, name, weight, 0, math.inf)
    checks.require_scalar(
        function, "reference_point", reference_point, -math.inf, math.inf
    )
    (log_prob, reference_log_prob), where = log_probs_of_sequences(
        function, where, log_prob=log_prob, reference_log_prob=reference_log_prob
    )
    checks.require_boolean(function, is_desirable=is_desirable)
    shape, why = log_prob.shape, "the shape of `log_prob`"
    checks.require_shape(function, "is_desirable", is_desirable, shape, why)
    ratio, limit = finite_part(log_prob - lax.stop_gradient(reference_log_prob))
    point = lax.stop_gradient(jnp.maximum(reference_point, 0))
    ratio, limit, point, beta, of_good, of_bad = promoted(
        ratio, limit, point, beta, desirable_weight, undesirable_weight
    )
    sign = jnp.where(is_desirable, -1, 1).astype(ratio.dtype)
    value = jax.nn.sigmoid(sign * beta * (ratio - point))
    value = jnp.where(limit == 0, value, jax.nn.sigmoid(sign * limit))
    return counted(where, jnp.where(is_desirable, of_good, of_bad) * value)
