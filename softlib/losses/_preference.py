r"""Losses of pairs of sequences, one preferred to the other, from log-probabilities."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import promoted
from softlib.logits._compose import is_zero
from softlib.typing import Scalar

from ._given_log_probs import (
    counted,
    finite_part,
    log_probs_of_sequences,
    logistic_loss,
    margin_over_beta,
    mean_of_tokens,
)


@array_arguments
def preference_margin(
    chosen_log_prob: Float[Array, "*batch"],
    rejected_log_prob: Float[Array, "*batch"],
    reference_chosen_log_prob: Float[Array, "*batch"],
    reference_rejected_log_prob: Float[Array, "*batch"],
    *,
    beta: Scalar = 0.1,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""Margin of the implicit reward between the chosen and the rejected sequence.

    $$h = \beta \Bigl[\log \frac{\pi(y_w)}{\pi_\mathrm{ref}(y_w)}
        - \log \frac{\pi(y_l)}{\pi_\mathrm{ref}(y_l)}\Bigr]$$

    $\sigma(h)$ is the probability of the pair's order in the model of Bradley and
    Terry, and the share of pairs with $h > 0$ the accuracy of the implicit reward.

    It is no loss, but what `dpo_loss` is a function of and what is reported beside it.

    Args:
        chosen_log_prob: $\log \pi(y_w)$ of the preferred sequences, sums over tokens as
            from `sequence_log_probs`.
        rejected_log_prob: $\log \pi(y_l)$ of the others.
        reference_chosen_log_prob: $\log \pi_\mathrm{ref}(y_w)$, of the model before
            training.
        reference_rejected_log_prob: $\log \pi_\mathrm{ref}(y_l)$.
        beta: $\beta > 0$; a number is static, an array traced and differentiable.
        where: True for the pairs that count; the others are 0, whatever they hold.

    Returns:
        $h$ per pair, float32 (float64 if an argument is float64). NaN where the pair
        has a NaN or infinities that cancel; without a gradient where it is not finite.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes differ, or `beta` is out of range.

    Derivatives: forward and reverse, any order; 0 for the log-probabilities of the
        reference, which is fixed.
    Cost: a few operations for each pair.
    Source: "Direct Preference Optimization: Your Language Model is Secretly a Reward
        Model".

    Example:
        >>> chosen, rejected = jnp.array([-10.0, -8.0]), jnp.array([-12.0, -8.0])
        >>> reference = jnp.array([-11.0, -9.0])
        >>> margin = softlib.losses.preference_margin
        >>> print(margin(chosen, rejected, reference, reference, beta=0.5))
        [1. 0.]
    """
    function = "preference_margin"
    checks.require_positive_scalars(function, beta=beta)
    difference, where = margin_over_beta(
        function,
        where,
        chosen_log_prob=chosen_log_prob,
        rejected_log_prob=rejected_log_prob,
        reference_chosen_log_prob=reference_chosen_log_prob,
        reference_rejected_log_prob=reference_rejected_log_prob,
    )
    difference, limit = finite_part(difference)
    difference, limit, beta = promoted(difference, limit, beta)
    return counted(where, beta * difference + limit)


@array_arguments
def dpo_loss(
    chosen_log_prob: Float[Array, "*batch"],
    rejected_log_prob: Float[Array, "*batch"],
    reference_chosen_log_prob: Float[Array, "*batch"],
    reference_rejected_log_prob: Float[Array, "*batch"],
    *,
    beta: Scalar = 0.1,
    flip_rate: Scalar = 0.0,
    label_smoothing: Scalar = 0.0,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""Direct preference optimisation, per pair: plain, robust or conservative.

    Of the margin $h$ of `preference_margin`, with the flip rate $\epsilon$ or the
    smoothing $s$,

    $$L = -\log \sigma(h), \qquad
      L_\mathrm{robust} = -\log \sigma(h) - \frac{\epsilon}{1 - 2 \epsilon} h, \qquad
      L_\mathrm{conservative} = -\log \sigma(h) + s\, h .$$

    If a share $\epsilon$ of the pairs is in the wrong order, the expectation of the
    robust loss is the plain loss of the right order,
    $(1 - \epsilon) L(h) + \epsilon L(-h) = -\log \sigma(h)$, which restores the scale
    of the reward. It is the quotient $[(1 - \epsilon) \ell(h) - \epsilon \ell(-h)] /
    (1 - 2 \epsilon)$ of the paper, without its cancellation near $\epsilon = 1/2$. The
    conservative loss is cross-entropy with smoothed labels, least at
    $\sigma(h) = 1 - s$: it makes the margin even smaller.

    The robust loss may be negative and has no lower bound: it falls without end along a
    direction of the parameters that a share of pairs below $\epsilon$ contradicts.
    `flip_rate` must not exceed the true rate.

    Args:
        chosen_log_prob, rejected_log_prob: As in `preference_margin`.
        reference_chosen_log_prob: As in `preference_margin`.
        reference_rejected_log_prob: As in `preference_margin`.
        beta: $\beta > 0$; a number is static, an array traced and differentiable.
        flip_rate: $0 \leq \epsilon < 1/2$ (rDPO); a number is static, an array traced.
        label_smoothing: $0 \leq s \leq 1/2$ (cDPO); static or traced. Not both: a
            traced number counts as set. (Other libraries use the name for either.)
        where: True for the pairs that count; the others cost 0, whatever they hold.

    Returns:
        The loss per pair, float32 (float64 if an argument is float64). Where $h$ is
        infinite or NaN, its limit or NaN without a gradient.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes differ, an option is out of range, or both `flip_rate` and
            `label_smoothing` are set.

    Derivatives: forward and reverse, any order; 0 for the log-probabilities of the
        reference.
    Cost: a few operations for each pair.
    Source: "Provably Robust DPO: Aligning Language Models with Noisy Feedback"; the
        plain loss of "Direct Preference Optimization: Your Language Model is Secretly a
        Reward Model".

    Example:
        >>> chosen, rejected = jnp.array([-10.0, -8.0]), jnp.array([-12.0, -8.0])
        >>> reference = jnp.array([-11.0, -9.0])
        >>> dpo = softlib.losses.dpo_loss
        >>> print(dpo(chosen, rejected, reference, reference).round(4))
        [0.5981 0.6931]
    """
    function = "dpo_loss"
    checks.require_positive_scalars(function, beta=beta)
    checks.require_scalar(function, "flip_rate", flip_rate, 0, math.nextafter(0.5, 0))
    checks.require_scalar(function, "label_smoothing", label_smoothing, 0, 0.5)
    if not (is_zero(flip_rate) or is_zero(label_smoothing)):
        raise ValueError(
            f"{function}: `label_smoothing` must be 0 with `flip_rate` (the one is the "
            f"conservative loss, the other the robust one), got "
            f"{_shown(label_smoothing)} and {_shown(flip_rate)}."
        )
    difference, where = margin_over_beta(
        function,
        where,
        chosen_log_prob=chosen_log_prob,
        rejected_log_prob=rejected_log_prob,
        reference_chosen_log_prob=reference_chosen_log_prob,
        reference_rejected_log_prob=reference_rejected_log_prob,
    )
    difference, limit = finite_part(difference)
    difference, limit, beta, flip_rate, label_smoothing = promoted(
        difference, limit, beta, flip_rate, label_smoothing
    )
    slope = label_smoothing if is_zero(flip_rate) else -flip_rate / (1 - 2 * flip_rate)
    return counted(where, logistic_loss(beta * difference, slope, limit))


@array_arguments
def ipo_loss(
    chosen_log_prob: Float[Array, "*batch"],
    rejected_log_prob: Float[Array, "*batch"],
    reference_chosen_log_prob: Float[Array, "*batch"],
    reference_rejected_log_prob: Float[Array, "*batch"],
    *,
    beta: Scalar = 0.1,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""Identity preference optimisation (IPO), per pair: a margin with a target.

    $$L = \Bigl(\log \frac{\pi(y_w)}{\pi_\mathrm{ref}(y_w)}
        - \log \frac{\pi(y_l)}{\pi_\mathrm{ref}(y_l)} - \frac{1}{2 \beta}\Bigr)^2$$

    `dpo_loss` falls for ever as the margin grows, so that pairs that are always in one
    order drive the policy away from its reference, whatever $\beta$. Here the margin
    has an end, $1 / (2 \beta)$, beyond which the loss rises again.

    Args:
        chosen_log_prob: $\log \pi(y_w)$ of the preferred sequences, sums over tokens as
            from `sequence_log_probs`. (Some libraries divide by the lengths for this
            loss alone: then give means, of the reference too.)
        rejected_log_prob: $\log \pi(y_l)$ of the others.
        reference_chosen_log_prob: As in `preference_margin`.
        reference_rejected_log_prob: As in `preference_margin`.
        beta: $\beta > 0$, the paper's $\tau$; a number is static, an array traced and
            differentiable.
        where: True for the pairs that count; the others cost 0, whatever they hold.

    Returns:
        The loss per pair, float32 (float64 if an argument is float64). +inf where the
        margin is infinite, NaN where it is NaN, both without a gradient.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes differ, or `beta` is out of range.

    Derivatives: forward and reverse, any order; 0 for the log-probabilities of the
        reference.
    Cost: a few operations for each pair.
    Source: "A General Theoretical Paradigm to Understand Learning from Human
        Preferences".

    Example:
        >>> chosen, rejected = jnp.array([-10.0, -8.0]), jnp.array([-12.0, -8.0])
        >>> reference = jnp.array([-11.0, -9.0])
        >>> print(softlib.losses.ipo_loss(chosen, rejected, reference, reference))
        [ 9. 25.]
    """
    function = "ipo_loss"
    checks.require_positive_scalars(function, beta=beta)
    difference, where = margin_over_beta(
        function,
        where,
        chosen_log_prob=chosen_log_prob,
        rejected_log_prob=rejected_log_prob,
        reference_chosen_log_prob=reference_chosen_log_prob,
        reference_rejected_log_prob=reference_rejected_log_prob,
    )
    difference, limit = finite_part(difference)
    difference, limit, beta = promoted(difference, limit, beta)
    value = (difference - 0.5 / beta) ** 2
    return counted(where, jnp.where(limit == 0, value, limit * limit))


@array_arguments(as_given=("chosen_lengths", "rejected_lengths"))
def simpo_loss(
    chosen_log_prob: Float[Array, "*batch"],
    rejected_log_prob: Float[Array, "*batch"],
    chosen_lengths: Num[Array, "*batch"],
    rejected_lengths: Num[Array, "*batch"],
    *,
    beta: Scalar = 2.0,
    gamma: Scalar = 1.0,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""Simple preference optimisation, per pair: mean log-probabilities, no reference.

    $$L = -\log \sigma\Bigl(\beta \Bigl[\frac{\log \pi(y_w)}{|y_w|}
        - \frac{\log \pi(y_l)}{|y_l|}\Bigr] - \gamma\Bigr)$$

    The division removes the advantage of short sequences; the loss is small only if the
    margin exceeds the target margin $\gamma$.

    Args:
        chosen_log_prob: $\log \pi(y_w)$ of the preferred sequences, sums over tokens as
            from `sequence_log_probs`; divided here.
        rejected_log_prob: $\log \pi(y_l)$ of the others.
        chosen_lengths: $|y_w|$, the tokens in each sum: `where.sum(-1)`. A sequence of
            length 0 has mean 0 without gradient; a negative length gives NaN.
        rejected_lengths: $|y_l|$.
        beta: $\beta > 0$; a number is static, an array traced and differentiable.
        gamma: $\gamma \geq 0$; static or traced, as `beta`.
        where: True for the pairs that count; the others cost 0, whatever they hold.

    Returns:
        The loss per pair, float32 (float64 if an argument is float64). Where the means
        differ by an infinity or NaN, the limit or NaN without a gradient.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes differ, or an option is out of range.

    Derivatives: forward and reverse, any order; none for the lengths.
    Cost: a few operations for each pair.
    Source: "SimPO: Simple Preference Optimization with a Reference-Free Reward", as
        "CDR: Customizable Density Ratios of Strong-over-weak LLMs for Preference
        Annotation" uses it. The defaults are common practice, not of either paper.

    Example:
        >>> chosen, rejected = jnp.array([-10.0]), jnp.array([-12.0])
        >>> lengths = jnp.array([5]), jnp.array([4])
        >>> print(softlib.losses.simpo_loss(chosen, rejected, *lengths).round(2))
        [0.31]
    """
    function = "simpo_loss"
    checks.require_positive_scalars(function, beta=beta)
    checks.require_scalar(function, "gamma", gamma, 0, math.inf)
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
    difference, limit = finite_part(of_chosen - of_rejected)
    difference, limit, beta, gamma = promoted(difference, limit, beta, gamma)
    return counted(where, logistic_loss(beta * difference - gamma, 0.0, limit))


def _shown(value: Scalar) -> str:
    return str(value) if isinstance(value, int | float) else "a traced number"
