"""The mean token loss with extra weight on the largest token losses."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._masked_mean import masked_mean
from softlib.numerics import top_k_mean
from softlib.typing import Scalar


@array_arguments
def smoothed_token_loss(
    token_nll: Float[Array, "*batch T"],
    *,
    num_largest: int = 5,
    alpha: Scalar = 0.7,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""Mean loss of a sequence's tokens, plus $\alpha$ times that of the worst tokens.

    $$L = \frac{1}{T} \sum_t l_t + \frac{\alpha}{N} \sum_{t \in \mathrm{top}_N} l_t$$

    It is made for recovering memorised text with a soft prompt. A sequence is recited
    only if no token fails, so the tokens with the largest losses get $1 + \alpha T / N$
    times the gradient of the others. $\alpha = 0$ is the mean.

    Args:
        token_nll: $l_t$, negative log-probabilities in nats.
        num_largest: Static $N \geq 1$; a shorter sequence takes all its tokens.
        alpha: $\alpha \geq 0$; a number or a scalar array.
        where: True for the tokens that count; broadcasts to `token_nll`.

    Returns:
        The loss per sequence, float32 (float64 for float64); 0 for one without tokens.
        NaN if a token that counts is NaN.

    Raises:
        TypeError: `token_nll` is not floating, `where` not boolean, or `num_largest` no
            Python int.
        ValueError: Shapes do not fit together, or a number is out of range.

    Derivatives: any order, with respect to `token_nll` and `alpha`. Among equal losses
        the first ones are among the largest.
    Cost: a partial sort of each sequence.
    Source: "Ethicist: Targeted Training Data Extraction Through Loss Smoothed Soft
        Prompting and Calibrated Confidence Estimation". There the second term is
        averaged over the batch as well.

    Example:
        >>> nll = jnp.array([[0.25, 0.25, 6.5, 1.0]])
        >>> print(softlib.losses.smoothed_token_loss(nll, num_largest=1, alpha=0.5))
        [5.25]
    """
    function = "smoothed_token_loss"
    checks.require_scalar(function, "alpha", alpha, 0, jnp.inf)
    checks.require_positive_integer(function, "num_largest", num_largest)
    checks.require_floating(function, token_nll=token_nll)
    checks.require_rank(function, "token_nll", token_nll, 1, "(..., T)")
    shape, why = token_nll.shape, "that of `token_nll`"
    where = checks.checked_where(function, where, shape, why)
    worst = top_k_mean(token_nll, k=num_largest, where=where)
    return (
        masked_mean(token_nll, where, axis=-1) + jnp.asarray(alpha, worst.dtype) * worst
    )
