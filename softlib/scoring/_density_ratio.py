"""Rewards without a reward model: the density ratio of two language models."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype


@array_arguments
def density_ratio_reward(
    strong_log_prob: Float[Array, "*batch T"],
    weak_log_prob: Float[Array, "*batch T"],
    *,
    normalize: str = "sum",
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""Log density ratio of a better over a worse aligned language model, per response.

    $$r(x, y) = \sum_t \bigl[\log \pi_\mathrm{strong}(y_t) - \log \pi_\mathrm{weak}(y_t)
        \bigr]$$

    If the strong model maximises a reward with a KL penalty of weight $\beta$ towards
    the weak one, this is that reward over $\beta$, minus a number that depends on the
    prompt alone: responses to one prompt are ordered as by the reward, but those to
    different prompts cannot be compared. The strong model may be given a longer prompt
    with criteria and examples, which is what makes the reward customizable: here that
    is nothing but other log-probabilities.

    Args:
        strong_log_prob: Log-probabilities of the tokens of each response, as from
            `softlib.logits.token_log_probs`. From float32 logits: a rounding to
            bfloat16 adds about a nat to the sum over a few hundred tokens.
        weak_log_prob: The same of the other model. (Sequences cut into other tokens, by
            another tokenizer, are compared by sums of the whole: T = 1.)
        normalize: Static: "sum", or "mean" over the tokens that count, which takes the
            advantage of length away and with it the meaning above.
        where: True for the tokens of the response; broadcasts to `strong_log_prob`.
            Other tokens may hold anything.

    Returns:
        One reward per response, float32 (float64 if an argument is float64); 0 for a
        response without tokens. -inf or +inf if a token is impossible for one of the
        models, NaN if for both.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes differ, there is no axis of tokens, `where` does not
            broadcast, or `normalize` is neither of its two values.

    Derivatives: forward and reverse; nothing is stopped.
    Cost: one pass over the arrays.
    Source: "CDR: Customizable Density Ratios of Strong-over-weak LLMs for Preference
        Annotation"; whether it divides by the length is not known to us.

    Example:
        >>> strong, weak = jnp.array([[-1.0, -2.0]]), jnp.array([[-2.0, -2.5]])
        >>> print(softlib.scoring.density_ratio_reward(strong, weak))
        [1.5]
    """
    function = "density_ratio_reward"
    strong, weak = jnp.asarray(strong_log_prob), jnp.asarray(weak_log_prob)
    checks.require_floating(function, strong_log_prob=strong, weak_log_prob=weak)
    checks.require_rank(function, "strong_log_prob", strong, 1, "(..., T)")
    shape = strong.shape
    checks.require_shape(
        function, "weak_log_prob", weak, shape, "the shape of `strong_log_prob`"
    )
    checks.require_one_of(function, "normalize", normalize, ("sum", "mean"))
    dtype = accumulator_dtype(strong, weak)
    strong, weak = strong.astype(dtype), weak.astype(dtype)
    counts: Array | int = shape[-1]
    if where is not None:
        where = checks.checked_where(
            function, where, shape, "the shape of `strong_log_prob`"
        )
        # Before the difference: two impossible tokens outside would be NaN.
        strong, weak = jnp.where(where, strong, 0), jnp.where(where, weak, 0)
        counts = where.sum(-1)
    total = (strong - weak).sum(-1)
    if normalize == "sum":
        return total
    return total / jnp.maximum(jnp.asarray(counts), 1).astype(dtype)


class PreferenceAnnotation(NamedTuple):
    """The preferred and the rejected one of several responses to each prompt.

    Attributes:
        chosen_index: Index of the greatest reward, the first one on ties.
        rejected_index: Index of the least reward, the first one on ties.
        margin: The difference of their rewards; 0 where there is no pair.

    Derivatives: `margin` with respect to the rewards; the indices have none.
    Cost: three numbers per prompt.

    Example:
        >>> rewards = jnp.array([[0.5, 2.0, -1.0]])
        >>> pair = softlib.scoring.annotate_preferences(rewards)
        >>> print(pair.chosen_index, pair.rejected_index, pair.margin)
        [1] [2] [3.]
    """

    chosen_index: Int[Array, "*batch"]
    rejected_index: Int[Array, "*batch"]
    margin: Float[Array, "*batch"]


@array_arguments
def annotate_preferences(
    rewards: Float[Array, "*batch N"], *, where: Bool[Array, "..."] | None = None
) -> PreferenceAnnotation:
    r"""Best against worst of N responses to each prompt, by their rewards.

    What preference losses are trained on, without a human: draw N responses from the
    model to be tuned, reward them (`density_ratio_reward`), take the two ends. Prompts
    with fewer than two responses, or with equal rewards, have margin 0: give
    `margin > 0` to the loss as `where`.

    Args:
        rewards: One per response; -inf is legal.
        where: True for the responses that exist; broadcasts to `rewards`. Others may
            hold anything.

    Returns:
        Indices and margin per prompt, float32 (float64 for float64). Without a response
        both indices are 0 and the margin is 0. A NaN among the rewards of a prompt
        makes its margin NaN.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: `rewards` has no axis of responses or none on it, or `where` does
            not broadcast.

    Derivatives: of the margin, +1 to the chosen and -1 to the rejected reward.
    Cost: a few passes over the rewards.
    Source: "CDR: Customizable Density Ratios of Strong-over-weak LLMs for Preference
        Annotation".

    Example:
        >>> rewards = jnp.array([[0.5, 2.0, -1.0], [jnp.nan, 1.0, jnp.nan]])
        >>> where = jnp.array([[True, True, True], [False, True, False]])
        >>> print(softlib.scoring.annotate_preferences(rewards, where=where).margin)
        [3. 0.]
    """
    function = "annotate_preferences"
    rewards = jnp.asarray(rewards)
    checks.require_floating(function, rewards=rewards)
    checks.require_rank(function, "rewards", rewards, 1, "(..., N)")
    if rewards.shape[-1] == 0:
        raise ValueError(
            f"{function}: `rewards` must have at least one response on the last axis, "
            f"got shape {rewards.shape}."
        )
    rewards = rewards.astype(accumulator_dtype(rewards))
    exists = jnp.ones(rewards.shape, bool)
    if where is not None:
        exists = checks.checked_where(
            function, where, rewards.shape, "the shape of `rewards`"
        )
    # Responses that do not exist must lose against -inf and +inf too: the extremes are
    # found first, then the first response that has them.
    known = jnp.where(exists, rewards, 0)
    greatest = jnp.where(exists, known, -jnp.inf).max(-1, keepdims=True)
    least = jnp.where(exists, known, jnp.inf).min(-1, keepdims=True)
    nan = jnp.isnan(known)
    chosen, rejected = (
        (exists & ((known == end) | nan)).argmax(-1).astype(jnp.int32)
        for end in (greatest, least)
    )
    at = lambda i: jnp.take_along_axis(known, i[..., None], -1)[..., 0]
    pair = (chosen != rejected) | nan.any(-1)
    best, worst = jnp.where(pair, at(chosen), 0), jnp.where(pair, at(rejected), 0)
    return PreferenceAnnotation(chosen, rejected, best - worst)
