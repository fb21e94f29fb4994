r"""Preference losses that keep a likelihood term in the place of a reference model."""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Num

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import promoted
from softlib._expm1 import log_one_minus_exp
from softlib.typing import Scalar

from ._given_log_probs import (
    counted,
    finite_part,
    log_probs_of_sequences,
    logistic_loss,
    mean_of_tokens,
)


@array_arguments(as_given=("chosen_lengths", "rejected_lengths"))
def orpo_loss(
    chosen_log_prob: Float[Array, "*batch"],
    rejected_log_prob: Float[Array, "*batch"],
    chosen_lengths: Num[Array, "*batch"],
    rejected_lengths: Num[Array, "*batch"],
    *,
    beta: Scalar = 0.1,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""Odds ratio preference optimisation (ORPO), per pair: likelihood and odds.

    With the mean log-probability of a token, $m = \frac{1}{|y|} \log \pi(y)$, and the
    log-odds $o = m - \log(1 - e^m)$,

    $$L = -m_w - \beta \log \sigma(o_w - o_l) .$$

    The first term is the cross-entropy of the preferred sequence, so that one loss is
    fine-tuning and preference tuning at once, without a reference model.

    Args:
        chosen_log_prob: $\log \pi(y_w)$ of the preferred sequences, sums over tokens as
            from `sequence_log_probs`; divided here.
        rejected_log_prob: $\log \pi(y_l)$ of the others.
        chosen_lengths: $|y_w|$, the tokens in each sum: `where.sum(-1)`. A negative
            length gives NaN.
        rejected_lengths: $|y_l|$.
        beta: $\beta \geq 0$, the paper's $\lambda$; a number is static, an array traced
            and differentiable.
        where: True for the pairs that count; the others cost 0, whatever they hold.

    Returns:
        The loss per pair, float32 (float64 if an argument is float64). A pair with a
        sequence of length 0 has no odds: it costs the likelihood that remains. +inf for
        an impossible preferred sequence, or a certain other one; infinite and NaN terms
        have no gradient.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes differ, or `beta` is out of range.

    Derivatives: forward and reverse, any order; none for the lengths.
    Cost: a few operations for each pair.
    Source: "ORPO: Monolithic Preference Optimization without Reference Model".

    Example:
        >>> chosen, rejected = jnp.array([-10.0]), jnp.array([-12.0])
        >>> lengths = jnp.array([5]), jnp.array([4])
        >>> print(softlib.losses.orpo_loss(chosen, rejected, *lengths).round(4))
        [2.0289]
    """
    function = "orpo_loss"
    checks.require_scalar(function, "beta", beta, 0, math.inf)
    (chosen, rejected), where = log_probs_of_sequences(
        function,
        where,
        chosen_log_prob=chosen_log_prob,
        rejected_log_prob=rejected_log_prob,
    )
    of_chosen = mean_of_tokens(function, chosen, "chosen_lengths", chosen_lengths)
    of_rejected = mean_of_tokens(
        function, rejected, "rejected_lengths", rejected_lengths
    )
    empty = (chosen_lengths == 0) | (rejected_lengths == 0)
    difference = _log_odds(of_chosen) - _log_odds(of_rejected)
    odds, limit = finite_part(jnp.where(empty, 0, difference))
    likelihood, bad = finite_part(0 - of_chosen)
    odds, limit, likelihood, bad, beta = promoted(odds, limit, likelihood, bad, beta)
    ratio = jnp.where(empty, 0, logistic_loss(odds, 0.0, limit))
    # With a weight of 0 an infinite ratio is 0, not NaN.
    weighed = beta * jnp.where(lax.stop_gradient(beta) == 0, 0, ratio)
    return counted(where, likelihood + bad + weighed)


@array_arguments(as_given=("chosen_lengths",))
def cpo_loss(
    chosen_log_prob: Float[Array, "*batch"],
    rejected_log_prob: Float[Array, "*batch"],
    *,
    beta: Scalar = 0.1,
    likelihood_weight: Scalar = 1.0,
    chosen_lengths: Num[Array, "*batch"] | None = None,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""Contrastive preference optimisation (CPO), per pair: no reference model.

    $$L = -\log \sigma\bigl(\beta [\log \pi(y_w) - \log \pi(y_l)]\bigr)
        - \frac{\alpha}{n} \log \pi(y_w)$$

    It is `dpo_loss` with a reference that finds all sequences alike. What keeps the
    policy near its start is the likelihood of the preferred sequence.

    Args:
        chosen_log_prob: $\log \pi(y_w)$ of the preferred sequences, sums over tokens as
            from `sequence_log_probs`.
        rejected_log_prob: $\log \pi(y_l)$ of the others.
        beta: $\beta > 0$; a number is static, an array traced and differentiable.
        likelihood_weight: $\alpha \geq 0$; static or traced, as `beta`.
        chosen_lengths: $n$, the tokens of the preferred sequences (`where.sum(-1)`):
            the likelihood is a mean over tokens, as in public code. None: $n = 1$, as
            in the paper. Length 0 has likelihood 0; a negative one gives NaN.
        where: True for the pairs that count; the others cost 0, whatever they hold.

    Returns:
        The loss per pair, float32 (float64 if an argument is float64). Where a
        log-probability is infinite, the limit; terms that are infinite or NaN have no
        gradient.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes differ, or an option is out of range.

    Derivatives: forward and reverse, any order; none for the lengths.
    Cost: a few operations for each pair.
    Source: "Contrastive Preference Optimization: Pushing the Boundaries of LLM
        Performance in Machine Translation".

    Example:
        >>> chosen, rejected = jnp.array([-10.0]), jnp.array([-12.0])
        >>> loss = softlib.losses.cpo_loss
        >>> print(loss(chosen, rejected, chosen_lengths=jnp.array([5])).round(4))
        [2.5981]
    """
    function = "cpo_loss"
    checks.require_positive_scalars(function, beta=beta)
    name = "likelihood_weight"
    checks.require_scalar(function, name, likelihood_weight, 0, math.inf)
    (chosen, rejected), where = log_probs_of_sequences(
        function,
        where,
        chosen_log_prob=chosen_log_prob,
        rejected_log_prob=rejected_log_prob,
    )
    mean = chosen
    if chosen_lengths is not None:
        mean = mean_of_tokens(function, chosen, "chosen_lengths", chosen_lengths)
    difference, limit = finite_part(chosen - rejected)
    likelihood, bad = finite_part(0 - mean)
    difference, limit, likelihood, bad, beta, likelihood_weight = promoted(
        difference, limit, likelihood, bad, beta, likelihood_weight
    )
    bad = jnp.where(lax.stop_gradient(likelihood_weight) == 0, 0, bad)
    weighed = likelihood_weight * likelihood + bad
    return counted(where, logistic_loss(beta * difference, 0.0, limit) + weighed)


def _log_odds(log_prob: Array) -> Array:
    """Log-odds of a log-probability; NaN above 0, no gradient if not finite."""
    inside = (log_prob <= 0) & (log_prob > -jnp.inf)
    safe = jnp.where(inside, log_prob, -1)
    limit = jnp.where(log_prob == -jnp.inf, -jnp.inf, jnp.nan)
    return jnp.where(inside, safe - log_one_minus_exp(safe), limit)
