"""Divergence of a policy from its reference: the regulariser of fine-tuning."""

from jaxtyping import Array, Bool, Float

from softlib._array_arguments import array_arguments
from softlib._masked_mean import masked_mean
from softlib.logits import Logits
from softlib.logits._pair import SourcePair


@array_arguments
def kl_to_reference(
    logits: Logits,
    reference_logits: Logits,
    *,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""Mean divergence of a policy from its reference, per sequence.

    $$\frac{1}{n} \sum_t
        \mathrm{KL}(\pi(\cdot | s_t) \,\|\, \pi_\mathrm{ref}(\cdot | s_t))$$

    over the $n$ tokens that count, in nats, over the whole vocabulary. Unlike estimates
    from drawn tokens it needs no sample from $\pi$: data may be off-policy.

    Args:
        logits: The policy's, one row per token: an array, or a value such as
            `softlib.LinearLogits`.
        reference_logits: The reference's, over the same classes: of another head with
            any number of features, or stored if `logits` are.
        where: True for the tokens that count; broadcasts to the shape of the tokens.

    Returns:
        The mean per sequence, float32 (float64 if an argument is float64); 0, with
        gradient 0, for a sequence without tokens that count.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together.
        NotImplementedError: No implementation that was named can run.

    Derivatives: as `softmax_kl_divergence`; the reference has none.
    Cost: as `softmax_kl_divergence` with a constant second distribution.
    Source: "Offline Reinforcement Learning for LLM Multi-Step Reasoning", its
        regulariser.

    Example:
        >>> hidden, weight = jnp.eye(2), jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> policy = softlib.LinearLogits(2 * hidden, weight)
        >>> reference = softlib.LinearLogits(hidden, weight)
        >>> print(softlib.losses.kl_to_reference(policy, reference).round(2))
        0.12
    """
    pair = SourcePair.of(
        "kl_to_reference", logits, reference_logits, "reference_logits"
    )
    if not pair.own.batch_shape:
        raise ValueError(
            f"{pair.function}: tokens must have an axis, over which the mean is taken, "
            "got a single row."
        )
    divergence = pair.with_constant_target().divergence("kl", reverse=True, where=where)
    return masked_mean(divergence, where, axis=-1)
