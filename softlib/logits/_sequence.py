"""Log-probabilities of sequences: what preference losses are made of."""

from typing import Unpack

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Integer

from softlib._array_arguments import array_arguments

from ._compose import log_probability_of_labels
from ._options import LinearHeadOptions, LogitsOptions
from ._sources import GivenLogits, LinearHead, Source


@array_arguments
def linear_sequence_log_probs(
    hidden: Float[Array, "*batch T D"],
    weight: Float[Array, "V D"] | Float[Array, "D V"],
    labels: Integer[Array, "*batch T"],
    *,
    where: Bool[Array, "..."] | None = None,
    **options: Unpack[LinearHeadOptions],
) -> Float[Array, "*batch"]:
    r"""Log-probability of each sequence under a linear head, without forming logits.

    $$\log \pi(y \mid x) = \sum_t w_t \log p_{y_t}$$

    in nats, the sum of `linear_token_log_probs` over the last axis. Preference losses
    want this sum, not a mean over tokens; where lengths matter they take these as well
    (`simpo_loss`), so that there is no option for it. `labels` are the tokens that
    `hidden` predicts: the caller has shifted them.

    Args:
        hidden: Inputs of the head, one per token.
        weight: One row per class, or one column with `vocab_axis=1`.
        labels: Class ids in $[0, V)$. Outside, the sequence is NaN; a label on an
            excluded class makes it -inf. Neither has a gradient, for none of its tokens
            and whatever the loss of it is.
        where: True for the tokens that count ($w_t$: the answer, not the prompt and not
            padding); broadcasts to the shape of `labels`. Other tokens may hold
            anything.
        **options: `bias`, `logit_scale`, `logit_softcap`, `temperature`, `class_where`,
            `vocab_axis`, `vocab_chunk`, `token_chunk`, `gradient_filter_eps`,
            `axis_name`, `precision` and `implementation`, as in
            `linear_softmax_cross_entropy`.

    Returns:
        One number per sequence, at most 0, float32 (float64 if an argument is float64);
        0 with gradient 0 for a sequence without tokens that count.

    Raises:
        TypeError: An argument has the wrong kind of dtype, or a keyword is unknown.
        ValueError: Shapes do not fit together, there is no axis of tokens, or an option
            is out of range.
        NotImplementedError: No implementation that was named can run.

    Derivatives: as `linear_row_statistics`.
    Cost: as `linear_token_log_probs`: nothing of the size of tokens times classes.
    Source: "Cut Your Losses in Large-Vocabulary Language Models", summed.

    Example:
        >>> hidden, weight = jnp.zeros((2, 3, 4)), jnp.ones((8, 4))
        >>> labels = jnp.zeros((2, 3), int)
        >>> where = jnp.array([[True, True, True], [True, False, False]])
        >>> sequence = softlib.losses.linear_sequence_log_probs
        >>> print(sequence(hidden, weight, labels, where=where).round(2))
        [-6.24 -2.08]
    """
    source = LinearHead.of("linear_sequence_log_probs", hidden, weight, **options)
    return _of_sequences(source, "hidden", labels, where)


@array_arguments
def sequence_log_probs(
    logits: Float[Array, "*batch T V"],
    labels: Integer[Array, "*batch T"],
    *,
    where: Bool[Array, "..."] | None = None,
    **options: Unpack[LogitsOptions],
) -> Float[Array, "*batch"]:
    r"""Log-probability of each sequence under logits, in nats.

    The sums of `linear_sequence_log_probs` from logits that exist, aligned with
    `labels` (the caller has shifted them).

    Args:
        logits: Unnormalised log-probabilities, one row per token.
        labels: Class ids in $[0, V)$, with the exceptions described in
            `linear_sequence_log_probs`.
        where: True for the tokens that count; broadcasts to the shape of `labels`.
            Other tokens may hold anything.
        **options: `bias`, `logit_scale`, `logit_softcap`, `temperature`, `class_where`
            and `implementation`, as in `softmax_cross_entropy`.

    Returns:
        One number per sequence, at most 0, float32 (float64 if an argument is float64);
        0 with gradient 0 for a sequence without tokens that count.

    Raises:
        TypeError: An argument has the wrong kind of dtype, or a keyword is unknown.
        ValueError: Shapes do not fit together, there is no axis of tokens, or an option
            is out of range.
        NotImplementedError: No implementation that was named can run.

    Derivatives: as `linear_row_statistics`.
    Cost: one pass over `logits` forward, one backward that writes their gradient.
    Source: a composition of `row_statistics`.

    Example:
        >>> logits = jnp.array([[[2.0, 0.0], [0.0, 0.0]]])
        >>> labels = jnp.array([[0, 1]])
        >>> print(softlib.losses.sequence_log_probs(logits, labels).round(2))
        [-0.82]
    """
    source = GivenLogits.of("sequence_log_probs", logits, **options)
    return _of_sequences(source, "logits", labels, where)


def _of_sequences(
    source: Source, name: str, labels: Array, where: Array | None
) -> Float[Array, "*batch"]:
    if not source.batch:
        raise ValueError(
            f"{source.function}: `{name}` must have at least 2 axes, the tokens of a "
            "sequence before the last one, got 1."
        )
    tokens = log_probability_of_labels(source, labels, where)
    # A sequence is a row here: one bad token takes the gradient of all, so that the
    # NaN of a loss of it does not reach the weight.
    total = lax.stop_gradient(tokens.sum(-1))
    finite = jnp.isfinite(total)
    summed = jnp.where(finite[..., None], tokens, 0).sum(-1)
    return jnp.where(finite, summed, total)
