"""Labels of several tokens ahead, for multi-token prediction."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments


class FutureTokens(NamedTuple):
    """Labels of multi-token prediction.

    Attributes:
        labels: The token $k + 1$ places ahead, at $k$ of the last axis; 0 where there
            is none.
        where: Whether there is one that counts.
    """

    labels: Integer[Array, "*batch T K"]
    where: Bool[Array, "*batch T K"]


@array_arguments(as_given=("segment_ids",))
def future_tokens(
    tokens: Integer[Array, "*batch T"],
    num_ahead: int,
    *,
    segment_ids: Integer[Array, "*batch T"] | None = None,
    where: Bool[Array, "..."] | None = None,
) -> FutureTokens:
    r"""Labels for predicting the next K tokens at once (multi-token prediction).

    At position $t$ the labels are tokens $t + 1, \dots, t + K$. Give the K hidden
    states of each position to one head, which reads the vocabulary once for all:

    `logits = LinearLogits(hidden, weight)` with `hidden` (B, T, K, D), then
    `softmax_cross_entropy(logits, future.labels, where=future.where)`, which is the
    loss of every position and place ahead. `masked_mean(loss, future.where, axis=...)`
    weighs them as the model wants. With $K = 1$ it is next-token prediction.

    Args:
        tokens: Token ids.
        num_ahead: Static $K \geq 1$.
        segment_ids: The document of each token, for packed sequences: tokens of another
            document are no labels.
        where: True for the tokens that count as labels (the answer, not the prompt and
            not padding); broadcasts to `tokens`.

    Returns:
        `FutureTokens`.

    Raises:
        TypeError: An array has the wrong kind of dtype, or `num_ahead` is no Python
            int.
        ValueError: Shapes do not fit together, or `num_ahead` is not positive.

    Derivatives: none; the results are no floating numbers.
    Cost: a few operations on arrays of the size of the labels.
    Source: "Better & Faster Large Language Models via Multi-token Prediction".

    Example:
        >>> found = softlib.losses.future_tokens(jnp.array([[5, 6, 7]]), 2)
        >>> print(found.labels[0].tolist(), found.where[0].tolist())
        [[6, 7], [7, 0], [0, 0]] [[True, True], [True, False], [False, False]]
    """
    function = "future_tokens"
    checks.require_positive_integer(function, "num_ahead", num_ahead)
    checks.require_integer(function, tokens=tokens)
    checks.require_rank(function, "tokens", tokens, 1, "(..., T)")
    shape, why = tokens.shape, "the shape of `tokens`"
    counts = checks.checked_where(function, where, shape, why)
    place = jnp.arange(shape[-1])[:, None] + jnp.arange(1, num_ahead + 1)[None]

    def ahead(array: Array, nothing: int | bool) -> Array:
        """Entries at these places; `nothing` behind the end."""
        found = jnp.take(array, place, axis=-1, mode="fill", fill_value=nothing)
        return found.reshape(*shape, num_ahead)

    found = ahead(counts, False)
    if segment_ids is not None:
        checks.require_integer(function, segment_ids=segment_ids)
        checks.require_shape(function, "segment_ids", segment_ids, shape, why)
        found = found & (ahead(segment_ids, 0) == segment_ids[..., None])
    labels = jnp.where(found, ahead(tokens, 0), 0)
    return FutureTokens(labels, found)
