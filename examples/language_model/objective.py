"""The loss, twice: streamed by softlib, and by optax from stored logits.

This is all that a training script changes to use softlib: the head is no longer
multiplied out, the loss takes the hidden states and the table instead.
"""

import jax
import jax.numpy as jnp
import optax

from softlib import masked_mean
from softlib.losses import linear_softmax_cross_entropy, linear_token_metrics

LOSSES = ("softlib", "optax")


def token_losses(
    hidden: jax.Array, table: jax.Array, labels: jax.Array, *, loss: str
) -> jax.Array:
    """Cross-entropy of each token in nats, from (..., D), (V, D) and (...)."""
    if loss == "softlib":
        return linear_softmax_cross_entropy(hidden, table, labels, vocab_axis=0)
    logits = jnp.einsum("...d,vd->...v", hidden, table)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def mean_loss(
    hidden: jax.Array, table: jax.Array, labels: jax.Array, *, loss: str
) -> jax.Array:
    return masked_mean(token_losses(hidden, table, labels, loss=loss))


def held_out_sums(
    hidden: jax.Array, table: jax.Array, labels: jax.Array
) -> dict[str, jax.Array]:
    """Summed "loss" and number of right top-1 guesses ("correct"), from one stream."""
    metrics = linear_token_metrics(
        hidden, table, labels, vocab_axis=0, metrics=("loss", "correct")
    )
    return jax.tree.map(jnp.sum, metrics)._asdict()
