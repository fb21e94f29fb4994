"""Log-probabilities of sequences: what preference losses are made of."""

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

    the sum of `token_log_probs` over the last axis of the batch. Preference losses want
    this sum, not a mean over tokens; where lengths matter they take these as well
    (`simpo_loss`), so that there is no option for it. `labels` are the tokens that the
    rows predict: the caller has shifted them.

    Args:
        logits: An array of logits, or a value such as `softlib.LinearLogits`; one row
            per token.
        labels: Class ids in $[0, V)$. Outside, the sequence is NaN; a label on an
            excluded class makes it -inf. Neither has a gradient, for none of its tokens
            and whatever the loss of it is.
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
    Cost: as `token_log_probs`: of a linear head nothing of the size of tokens times
        classes.
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
    # A sequence is a row here: one bad token takes the gradient of all, so that the
    # NaN of a loss of it does not reach the weight.
    total = lax.stop_gradient(tokens.sum(-1))
    finite = jnp.isfinite(total)
    summed = jnp.where(finite[..., None], tokens, 0).sum(-1)
    return jnp.where(finite, summed, total)
