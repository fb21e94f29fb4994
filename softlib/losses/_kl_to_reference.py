"""How far a policy has moved from its reference: the regulariser of fine-tuning."""

from typing import Unpack

from jaxtyping import Array, Bool, Float

from softlib._array_arguments import array_arguments
from softlib._masked_mean import masked_mean
from softlib.logits._pair import HeadPairOptions, LogitsPairOptions, SourcePair


@array_arguments
def linear_kl_to_reference(
    hidden: Float[Array, "*batch T D"],
    weight: Float[Array, "V D"] | Float[Array, "D V"],
    ref_hidden: Float[Array, "*batch T E"],
    ref_weight: Float[Array, "V E"] | Float[Array, "E V"],
    *,
    where: Bool[Array, "..."] | None = None,
    **options: Unpack[HeadPairOptions],
) -> Float[Array, "*batch"]:
    r"""Mean divergence of a policy from its reference, without the logits of either.

    $$\frac{1}{n} \sum_t
        \mathrm{KL}(\pi(\cdot | s_t) \,\|\, \pi_\mathrm{ref}(\cdot | s_t))$$

    over the $n$ tokens that count, in nats, over the whole vocabulary. Unlike estimates
    from the tokens that were drawn it needs no sample from $\pi$: data may be
    off-policy.

    Args:
        hidden: The policy's inputs of its head.
        weight: One row per class, or one column with `vocab_axis=1`.
        ref_hidden: The reference's inputs of its head, of any number of features.
        ref_weight: Of the same classes; one column per class with
            `target_vocab_axis=1`.
        where: True for the tokens that count; broadcasts to the shape of the tokens.
        **options: As in `linear_kl_divergence`; those of the reference begin with
            `target_`.

    Returns:
        The mean per sequence, float32 (float64 if an argument is float64); 0, with
        gradient 0, for a sequence without tokens that count.

    Raises:
        TypeError: An argument has the wrong kind of dtype, or a keyword is unknown.
        ValueError: Shapes do not fit together, or an option is out of range.
        NotImplementedError: No implementation that was named can run.

    Derivatives: as `linear_kl_divergence`; the reference has none.
    Cost: as `linear_kl_divergence` with a constant second head.
    Source: "Offline Reinforcement Learning for LLM Multi-Step Reasoning", its
        regulariser.

    Example:
        >>> hidden, weight = jnp.eye(2), jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> kl = softlib.losses.linear_kl_to_reference
        >>> print(kl(2 * hidden, weight, hidden, weight).round(2))
        0.12
    """
    function = "linear_kl_to_reference"
    pair = SourcePair.of_heads(
        function, hidden, weight, ref_hidden, ref_weight, second="ref", **options
    )
    return _mean(pair, where)


@array_arguments
def kl_to_reference(
    logits: Float[Array, "*batch T V"],
    ref_logits: Float[Array, "*batch T V"],
    *,
    where: Bool[Array, "..."] | None = None,
    **options: Unpack[LogitsPairOptions],
) -> Float[Array, "*batch"]:
    r"""Mean divergence of a policy from its reference, of logits.

    The mean of `linear_kl_to_reference` from logits that exist.

    Args:
        logits: The policy's unnormalised log-probabilities, one row per token.
        ref_logits: The reference's.
        where: True for the tokens that count; broadcasts to the shape of the tokens.
        **options: As in `softmax_kl_divergence`; those of the reference begin with
            `target_`.

    Returns:
        The mean per sequence, float32 (float64 if an argument is float64); 0, with
        gradient 0, for a sequence without tokens that count.

    Raises:
        TypeError: An argument has the wrong kind of dtype, or a keyword is unknown.
        ValueError: Shapes do not fit together, or an option is out of range.
        NotImplementedError: No implementation that was named can run.

    Derivatives: as `softmax_kl_divergence`; the reference has none.
    Cost: as `softmax_kl_divergence`.
    Source: "Offline Reinforcement Learning for LLM Multi-Step Reasoning".

    Example:
        >>> logits, reference = jnp.zeros((1, 2, 2)), jnp.array([[[1.0, 0.0]] * 2])
        >>> print(softlib.losses.kl_to_reference(logits, reference).round(4))
        [0.1201]
    """
    function = "kl_to_reference"
    pair = SourcePair.of_logits(function, logits, ref_logits, second="ref", **options)
    return _mean(pair, where)


def _mean(pair: SourcePair, where: Array | None) -> Float[Array, "*batch"]:
    if not pair.own.batch:
        raise ValueError(
            f"{pair.function}: tokens must have an axis, over which the mean is taken, "
            "got a single row."
        )
    divergence = pair.with_constant_target().divergence("kl", reverse=True, where=where)
    return masked_mean(divergence, where, axis=-1)
