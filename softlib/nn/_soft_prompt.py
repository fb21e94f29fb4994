"""Prompts that are vectors and not tokens."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from softlib import _checks as checks
from softlib._array_arguments import array_arguments


@array_arguments
def prepend_soft_prompt(
    embeddings: Float[Array, "*batch T D"], soft_prompt: Float[Array, "P D"]
) -> Float[Array, "*batch P+T D"]:
    r"""Puts trained vectors in front of the embeddings of every sequence.

    The model is left as it is and the prompt is what is trained: to recover memorised
    text, to make up for compression, to stand for a long context. Predictions at its
    positions count for nothing: the loss is that of the last T positions,
    `hidden[..., P:, :]`.

    Args:
        embeddings: Of the tokens, before positions are added.
        soft_prompt: The same vectors for all sequences, in the model's own scale: a
            start at embeddings of common tokens trains faster than one near 0.

    Returns:
        In the dtype of `embeddings`.

    Raises:
        TypeError: An argument is not floating.
        ValueError: The arguments differ in their last axis, or `embeddings` have fewer
            than two axes.

    Derivatives: forward and reverse mode, of any order; that of `soft_prompt` is summed
        over the sequences.
    Cost: one copy of the embeddings.
    Source: "Ethicist: Targeted Training Data Extraction Through Loss Smoothed Soft
        Prompting and Calibrated Confidence Estimation".

    Example:
        >>> embeddings, prompt = jnp.zeros((4, 10, 8)), jnp.ones((3, 8))
        >>> print(softlib.nn.prepend_soft_prompt(embeddings, prompt).shape)
        (4, 13, 8)
    """
    function = "prepend_soft_prompt"
    embeddings, soft_prompt = jnp.asarray(embeddings), jnp.asarray(soft_prompt)
    checks.require_floating(function, embeddings=embeddings, soft_prompt=soft_prompt)
    checks.require_rank(function, "embeddings", embeddings, 2, "(..., T, D)")
    features = embeddings.shape[-1]
    if soft_prompt.ndim != 2 or soft_prompt.shape[1] != features:
        raise ValueError(
            f"{function}: `soft_prompt` must have shape (P, D) with D = {features} "
            f"(the last axis of `embeddings`), got {soft_prompt.shape}."
        )
    batch = embeddings.shape[:-2]
    prompt = jnp.broadcast_to(soft_prompt, (*batch, *soft_prompt.shape))
    return jnp.concatenate([prompt.astype(embeddings.dtype), embeddings], axis=-2)
