"""Chains of thought as latent variables: weights and surrogate of one TRICE step."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype


class TriceWeights(NamedTuple):
    r"""Factors of the log-probabilities of rationales, one per question.

    Attributes:
        chain: Of the remembered rationales, $1 / N$.
        proposal: Of the proposals, $-\beta_m / N$.
    """

    chain: Float[Array, " M"]
    proposal: Float[Array, " M"]


@array_arguments
def trice_weights(
    proposal_correct: Bool[Array, " M"], chain_correct: Bool[Array, " M"]
) -> TriceWeights:
    r"""Weights of the gradients of remembered and proposed rationales.

    For question $m$ with a rationale $z_m$ in memory (after the update by
    `softlib.decoding.independence_chain_update`) and a proposal $\tilde z_m$ drawn from
    the model, the gradient of the marginal likelihood of the answers is estimated by

    $$\frac{1}{N} \sum_m \bigl[\nabla \log p(z_m) - \beta_m \nabla \log p(\tilde z_m)
      \bigr], \qquad \beta_m = \frac{1}{N - 1} \sum_{m' \neq m} \tilde c_{m'} ,$$

    over the $N$ questions whose memory is correct. The second term has mean 0: it is a
    control variate, and its factor is the acceptance rate among the other questions. As
    the model becomes accurate the terms cancel, and with them the variance.

    They are no loss, but the factors of `trice_loss`, for those who sum gradients
    themselves or resample the terms.

    Args:
        proposal_correct: $\tilde c_m$: the proposal ends in the right answer, so that
            the chain has moved to it.
        chain_correct: The rationale in memory ends in the right answer, after the
            update. A question without a correct rationale so far has weight 0.

    Returns:
        Weights of the remembered rationales, $1 / N$, and of the proposals, $-\beta_m /
        N$, in the default float dtype. With one question $\beta$ is 0.

    Raises:
        TypeError: An argument is not boolean.  ValueError: Shapes differ.

    Derivatives: none, they are counts.
    Cost: O(M).
    Source: "Training Chain-of-Thought via Latent-Variable Inference".

    Example:
        >>> proposed, chain = jnp.array([True, False]), jnp.array([True, True])
        >>> print(*softlib.losses.trice_weights(proposed, chain))
        [0.5 0.5] [ 0.  -0.5]
    """
    function = "trice_weights"
    dtype = jnp.result_type(float)
    return _weights(*_checked(function, proposal_correct, chain_correct), dtype)


@array_arguments
def trice_loss(
    chain_log_prob: Float[Array, " M"],
    proposal_log_prob: Float[Array, " M"],
    proposal_correct: Bool[Array, " M"],
    chain_correct: Bool[Array, " M"],
) -> Float[Array, " M"]:
    r"""Summands whose gradient is that of the negative marginal log-likelihood.

    $-w_m \log p(z_m) - \tilde w_m \log p(\tilde z_m)$ with `trice_weights`. Train on
    their sum; the mean over questions is already in the weights. Its value is not a
    likelihood and need not fall: watch the mean of `proposal_correct` instead.

    Args:
        chain_log_prob: $\log p(z_m | x_m)$ of the remembered rationale with its answer,
            summed over tokens, in nats.
        proposal_log_prob: $\log p(\tilde z_m | x_m)$ of the proposal, summed likewise.
        proposal_correct: The proposal ends in the right answer.
        chain_correct: The remembered rationale does so, after the update.

    Returns:
        A summand for each question, float32 (float64 if an argument is float64). 0 with
        gradient 0 where `chain_correct` is False, whatever the log-probabilities hold.

    Raises:
        TypeError: Log-probabilities are not floating, or the others not boolean.
        ValueError: Shapes differ.

    Derivatives: any order, with respect to the log-probabilities. The weights are
        constants.
    Cost: O(M).
    Source: "Training Chain-of-Thought via Latent-Variable Inference". The estimate is
        unbiased where memories were correct before the update; a question that has just
        found its first rationale counts $1 - \beta$ instead of 1.

    Example:
        >>> log_prob, correct = jnp.array([-4.0, -2.0]), jnp.array([True, True])
        >>> accepted = softlib.losses.trice_loss(log_prob, log_prob, correct, correct)
        >>> print(accepted)
        [0. 0.]
    """
    function = "trice_loss"
    proposal, chain = _checked(function, proposal_correct, chain_correct)
    chain_log_prob, proposal_log_prob = (
        jnp.asarray(chain_log_prob),
        jnp.asarray(proposal_log_prob),
    )
    log_prob = {
        "chain_log_prob": chain_log_prob,
        "proposal_log_prob": proposal_log_prob,
    }
    checks.require_floating(function, **log_prob)
    for name, array in log_prob.items():
        checks.require_shape(function, name, array, chain.shape, "one per question")
    dtype = accumulator_dtype(chain_log_prob, proposal_log_prob)
    of_chain, of_proposal = _weights(proposal, chain, dtype)

    def term(weights: Array, log_prob: Array) -> Array:
        # A weight of 0 beside a log-probability of -inf is 0.
        return weights * jnp.where(weights != 0, log_prob.astype(dtype), 0)

    return 0 - term(of_chain, chain_log_prob) - term(of_proposal, proposal_log_prob)


def _checked(
    function: str, proposal_correct: Array, chain_correct: Array
) -> tuple[Bool[Array, " M"], Bool[Array, " M"]]:
    proposal, chain = jnp.asarray(proposal_correct), jnp.asarray(chain_correct)
    checks.require_boolean(function, proposal_correct=proposal, chain_correct=chain)
    if proposal.ndim != 1:
        raise ValueError(
            f"{function}: `proposal_correct` must have one axis (M,), got shape "
            f"{proposal.shape}."
        )
    why = "one per question"
    checks.require_shape(function, "chain_correct", chain, proposal.shape, why)
    return proposal, chain


def _weights(
    proposal: Bool[Array, " M"], chain: Bool[Array, " M"], dtype: DTypeLike
) -> TriceWeights:
    accepted = (proposal & chain).astype(jnp.int32)
    count = chain.sum(dtype=jnp.int32)
    others = (accepted.sum() - accepted).astype(dtype)
    beta = others / jnp.maximum(count - 1, 1).astype(dtype)
    share = chain.astype(dtype) / jnp.maximum(count, 1).astype(dtype)
    return lax.stop_gradient(TriceWeights(share, 0 - beta * share))
