r"""Policy gradients of drawn sequences: PPO's clip, GRPO, leave-one-out."""

import math
from typing import Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype, promoted
from softlib._expm1 import expm1
from softlib._log_domain import log_of
from softlib._masked_mean import masked_mean
from softlib.logits._compose import is_zero
from softlib.typing import Scalar

from ._given_log_probs import counted, finite_part, log_probs_of_sequences

type RatioLevel = Literal["token", "sequence"]
type Baseline = Literal["mean", "leave_one_out"]


@array_arguments
def ppo_clip_loss(
    log_prob: Float[Array, "*batch T"],
    old_log_prob: Float[Array, "*batch T"],
    advantages: Float[Array, "*batch T"] | Float[Array, "*batch"],
    *,
    clip_low: Scalar = 0.2,
    clip_high: Scalar = 0.2,
    level: RatioLevel = "token",
    reference_log_prob: Float[Array, "*batch T"] | None = None,
    kl_weight: Scalar = 0.0,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch T"]:
    r"""PPO's clipped policy loss, per token: also of GRPO, DAPO, Dr. GRPO and GSPO.

    With the ratio $\rho_t = \pi(y_t) / \pi_\mathrm{old}(y_t)$, advantages $A$ and
    $d_t = \log \pi_\mathrm{ref}(y_t) - \log \pi(y_t)$,

    $$L_t = -\min(\rho_t A_t,\ \mathrm{clip}(\rho_t, 1 - \epsilon_\mathrm{low},
        1 + \epsilon_\mathrm{high})\, A_t) + \beta\, (e^{d_t} - d_t - 1) .$$

    The last term is an estimate of the divergence from a reference, never negative and
    unbiased for tokens that $\pi$ drew. The methods differ in the advantages
    (`group_advantages`) and in what is done with the losses of a batch:

    - GRPO, the mean over sequences of means over their tokens:
      `masked_mean(loss, where, axis=-1).mean()`
    - DAPO, all tokens alike, with $\epsilon_\mathrm{high}$ = 0.28:
      `masked_mean(loss, where)`
    - Dr. GRPO, a constant in place of the lengths: `loss.sum(-1).mean() / max_tokens`
    - GSPO: `level="sequence"`, reduced as GRPO

    Args:
        log_prob: $\log \pi(y_t)$ as from `token_log_probs`.
        old_log_prob: $\log \pi_\mathrm{old}(y_t)$ of the policy that drew the tokens.
            While there is one step per batch it is `jax.lax.stop_gradient(log_prob)`.
        advantages: $A$ per token or, shared by its tokens, per sequence.
        clip_low: $\epsilon_\mathrm{low}$ in [0, 1]; a number is static, an array traced
            and differentiable.
        clip_high: $\epsilon_\mathrm{high} \geq 0$; infinity does not clip.
        level: Static; `"sequence"` gives all tokens the ratio of their sequence,
            $\exp$ of the mean over the tokens that count of $\log \rho_t$.
        reference_log_prob: $\log \pi_\mathrm{ref}(y_t)$; None without $\beta$.
        kl_weight: $\beta \geq 0$; static or traced.
        where: True for the tokens that count; broadcasts to `log_prob`. The others cost
            0, whatever they hold.

    Returns:
        The loss per token, float32 (float64 if an argument is float64). Where a
        log-ratio is infinite or NaN, the limit or NaN without a gradient.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes differ, an option is out of range, or there is a `kl_weight`
            without `reference_log_prob`.

    Derivatives: forward and reverse, any order, with respect to `log_prob` and the
        numbers; 0 for all other arrays. None where a ratio is clipped.
    Cost: a few operations for each token.
    Source: "Proximal Policy Optimization Algorithms"; "DeepSeekMath: Pushing the Limits
        of Mathematical Reasoning in Open Language Models"; "DAPO: An Open-Source LLM
        Reinforcement Learning System at Scale"; "Understanding R1-Zero-Like Training: A
        Critical Perspective"; "Group Sequence Policy Optimization".

    Example:
        >>> old = jnp.log(jnp.array([[0.5, 0.5], [0.5, 0.5]]))
        >>> new = jnp.log(jnp.array([[0.8, 0.55], [0.3, 0.5]]))
        >>> advantages = jnp.array([1.0, -1.0])
        >>> loss = softlib.losses.ppo_clip_loss(new, old, advantages)
        >>> print((100 * loss).round())
        [[-120. -110.]
         [  80.  100.]]
    """
    function = "ppo_clip_loss"
    checks.require_scalar(function, "clip_low", clip_low, 0, 1)
    checks.require_scalar(function, "clip_high", clip_high, 0, math.inf)
    checks.require_scalar(function, "kl_weight", kl_weight, 0, math.inf)
    checks.require_one_of(function, "level", level, ("token", "sequence"))
    if reference_log_prob is None and not is_zero(kl_weight):
        raise ValueError(
            f"{function}: `reference_log_prob` must be given with `kl_weight`, got "
            "None."
        )
    checks.require_rank(function, "log_prob", log_prob, 1, "(..., T)")
    checks.require_floating(function, advantages=advantages)
    shape = log_prob.shape
    why = "one per token, or one per sequence"
    checks.require_shape_in(
        function, "advantages", advantages, (shape, shape[:-1]), why
    )
    given = {"log_prob": log_prob, "old_log_prob": old_log_prob}
    if reference_log_prob is not None:
        given["reference_log_prob"] = reference_log_prob
    (log_prob, old, *reference), where = log_probs_of_sequences(
        function, where, **given
    )
    if advantages.ndim < log_prob.ndim:
        advantages = advantages[..., None]
    advantages = lax.stop_gradient(jnp.broadcast_to(advantages, shape))
    log_prob, old, advantages, clip_low, clip_high, kl_weight = promoted(
        log_prob, old, counted(where, advantages), clip_low, clip_high, kl_weight
    )
    log_ratio = log_prob - lax.stop_gradient(old)
    if level == "sequence":
        log_ratio = masked_mean(log_ratio, where, axis=-1)[..., None]
        log_ratio = jnp.broadcast_to(log_ratio, shape)
    finite, limit = finite_part(log_ratio)
    log_ratio = finite + limit  # `limit` has no gradient
    # Clipped before the exponential, which would overflow and make its gradient NaN.
    lowest = log_of(1 - jnp.asarray(clip_low, log_ratio.dtype))
    highest = jnp.log1p(jnp.asarray(clip_high, log_ratio.dtype))
    clipped = jnp.where(
        advantages < 0,
        jnp.maximum(log_ratio, lowest),
        jnp.minimum(log_ratio, highest),
    )
    ratio = jnp.exp(jnp.where(advantages == 0, 0, clipped))
    loss = 0 - ratio * advantages
    # An undefined ratio is NaN, also where the advantage is 0.
    loss = jnp.where(jnp.isnan(limit), limit, loss)
    if reference and not is_zero(kl_weight):
        d, apart = finite_part(lax.stop_gradient(reference[0]) - log_prob)
        estimate = expm1(d) - d + jnp.abs(apart)
        loss = loss + kl_weight * estimate
    return counted(where, loss)


@array_arguments
def group_advantages(
    rewards: Float[Array, "*batch G"],
    *,
    baseline: Baseline = "mean",
    standardized: bool = True,
    epsilon: Scalar = 1e-4,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch G"]:
    r"""Advantages of G answers to a prompt: rewards less those of the group.

    $$A_i = \frac{r_i - b_i}{s + \epsilon}, \qquad
        b_i = \frac{1}{G} \sum_j r_j
        \quad \text{or} \quad b_i = \frac{1}{G - 1} \sum_{j \neq i} r_j$$

    with the standard deviation $s$ of the rewards. No model of values is needed. GRPO
    is the default; Dr. GRPO is `standardized=False`, since the division favours prompts
    that are nearly solved or nearly hopeless; REINFORCE leave-one-out has the second
    baseline, undivided, which does not depend on the answer and so leaves the gradient
    unbiased.

    Args:
        rewards: $r$; the last axis is the group of a prompt.
        baseline: Static; `"mean"` or `"leave_one_out"`.
        standardized: Static; whether advantages are divided.
        epsilon: $\epsilon \geq 0$; a number is static, an array traced. With 0 a group
            of equal rewards has advantages 0.
        where: True for the answers that count; broadcasts to `rewards`. The others have
            advantage 0 and are in no group.

    Returns:
        The advantages, float32 (float64 for float64). An answer that is alone in its
        group has 0. $s$ is that of a sample, over $G - 1$.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: `where` does not broadcast, or an option is out of range.

    Derivatives: 0 in everything; the results are coefficients of a gradient.
    Cost: a few operations for each answer.
    Source: "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language
        Models"; "Back to Basics: Revisiting REINFORCE Style Optimization for Learning
        from Human Feedback in LLMs". The sample's deviation and $\epsilon$ are those of
        public code.

    Example:
        >>> rewards = jnp.array([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
        >>> print(softlib.losses.group_advantages(rewards).round(2))
        [[ 0.87 -0.87 -0.87  0.87]
         [ 0.    0.    0.    0.  ]]
    """
    function = "group_advantages"
    checks.require_one_of(function, "baseline", baseline, ("mean", "leave_one_out"))
    checks.require_scalar(function, "epsilon", epsilon, 0, math.inf)
    checks.require_floating(function, rewards=rewards)
    checks.require_rank(function, "rewards", rewards, 1, "(..., G)")
    shape, why = rewards.shape, "the shape of `rewards`"
    where = checks.checked_where(function, where, shape, why)
    rewards = counted(where, rewards.astype(accumulator_dtype(rewards)))
    rewards, epsilon = lax.stop_gradient(promoted(rewards, epsilon))
    centred = rewards - masked_mean(rewards, where, axis=-1)[..., None]
    centred = counted(where, centred)
    count = where.sum(-1, keepdims=True, dtype=rewards.dtype)
    others = jnp.maximum(count - 1, 1)
    found = centred
    if baseline == "leave_one_out":
        found = centred * (count / others)
    if standardized:
        deviation = jnp.sqrt((centred**2).sum(-1, keepdims=True) / others)
        found = found / jnp.where(deviation == 0, 1, deviation + epsilon)
    return found


@array_arguments
def reinforce_leave_one_out_loss(
    log_prob: Float[Array, "*batch G"],
    rewards: Float[Array, "*batch G"],
    *,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch G"]:
    r"""REINFORCE with the mean of the other answers as baseline (RLOO), per answer.

    $$L_i = -\Bigl(r_i - \frac{1}{G - 1} \sum_{j \neq i} r_j\Bigr) \log \pi(y_i)$$

    Its gradient is an unbiased one of the expected reward, if $\pi$ drew the answers.
    After further steps use `ppo_clip_loss` with these advantages.

    Args:
        log_prob: $\log \pi(y_i)$ of G answers to a prompt, sums over tokens as from
            `sequence_log_probs`.
        rewards: $r_i$. A penalty on the divergence from a reference is part of it:
            $r_i - \beta [\log \pi(y_i) - \log \pi_\mathrm{ref}(y_i)]$.
        where: True for the answers that count; the others cost 0 and are in no
            baseline, whatever they hold.

    Returns:
        The loss per answer, float32 (float64 if an argument is float64). 0 for one that
        is alone in its group. Where `log_prob` is infinite or NaN, there is no
        gradient.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes differ.

    Derivatives: forward and reverse, any order, with respect to `log_prob`; 0 for
        `rewards`.
    Cost: a few operations for each answer.
    Source: "Buy 4 REINFORCE Samples, Get a Baseline for Free!"; "Back to Basics:
        Revisiting REINFORCE Style Optimization for Learning from Human Feedback in
        LLMs".

    Example:
        >>> log_prob, rewards = jnp.array([[-10.0, -12.0, -8.0], [1.0, 0.0, 0.5]])
        >>> loss = softlib.losses.reinforce_leave_one_out_loss
        >>> print(loss(log_prob, rewards))
        [ 7.5 -9.   0. ]
    """
    function = "reinforce_leave_one_out_loss"
    checks.require_rank(function, "log_prob", log_prob, 1, "(..., G)")
    (log_prob, rewards), where = log_probs_of_sequences(
        function, where, log_prob=log_prob, rewards=rewards
    )
    advantages = group_advantages(
        rewards, baseline="leave_one_out", standardized=False, where=where
    )
    finite, limit = finite_part(log_prob)
    no_effect = (advantages == 0) & ~jnp.isnan(limit)
    return counted(
        where, 0 - advantages * finite - jnp.where(no_effect, 0, advantages * limit)
    )
