"""Log-probabilities of sequences, for preference losses."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Integer

from softlib._array_arguments import array_arguments

from ._compose import log_probability_of_labels
from ._sources import Logits, source_of


@array_arguments
def sequence_log_probs(
    logits: Logits,
    labels: Integer[Array, "*batch T"],
    *,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""Log-probability of each sequence, in nats.

    $$\log \pi(y \mid x) = \sum_t w_t \log p_{y_t}$$

    It is the sum of `token_log_probs` over the last axis of the batch. There is no
    option for a mean over tokens: preference losses take the sum, and the lengths too
    if they matter (`simpo_loss`). `labels` are the tokens that the rows predict, so the
    caller shifts them.

    Args:
        logits: An array of logits, or a value such as `softlib.LinearLogits`; one row
            per token.
        labels: Class ids in $[0, V)$. Outside, the sequence is NaN; a label on an
            excluded class makes it -inf. Such a sequence has no gradient for any of its
            tokens.
        where: True for the tokens that count ($w_t$: the answer, not the prompt and not
            padding); broadcasts to the shape of `labels`. Other tokens may hold
            anything.

    Returns:
        One number per sequence, at most 0, float32 (float64 if an argument is float64);
        0 with gradient 0 for a sequence without tokens that count.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together, or there is no axis of tokens.
        NotImplementedError: No implementation that was named can run.

    Derivatives: as `row_statistics`.
    Cost: as `token_log_probs`; for a linear head no array of tokens x classes.
    Source: "Cut Your Losses in Large-Vocabulary Language Models", summed.

    Example:
        >>> logits = softlib.LinearLogits(jnp.zeros((2, 3, 4)), jnp.ones((8, 4)))
        >>> labels = jnp.zeros((2, 3), int)
        >>> where = jnp.array([[True, True, True], [True, False, False]])
        >>> found = softlib.logits.sequence_log_probs(logits, labels, where=where)
        >>> print(found.round(2))
        [-6.24 -2.08]
    """
    source = source_of("sequence_log_probs", logits)
    if not source.batch_shape:
        raise ValueError(
            f"{source.function}: `logits` must have at least 2 axes, the tokens of a "
            "sequence before the classes, got 1."
        )
    tokens = log_probability_of_labels(source, labels, where)
    # One bad token removes the gradient of the whole sequence, so that a NaN of its
    # loss does not reach the weight.
    total = lax.stop_gradient(tokens.sum(-1))
    finite = jnp.isfinite(total)
    summed = jnp.where(finite[..., None], tokens, 0).sum(-1)
    return jnp.where(finite, summed, total)
