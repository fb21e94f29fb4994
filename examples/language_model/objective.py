"""The loss, twice: streamed by softlib, and by optax from stored logits.

The logits of the model are a value: softlib's loss streams over them, optax's needs
the array.
"""

import jax
import jax.numpy as jnp
import optax

import softlib

LOSSES = ("softlib", "optax")


def token_losses(
    logits: softlib.LinearLogits, labels: jax.Array, *, loss: str
) -> jax.Array:
    """Cross-entropy of each token in nats, from logits (..., V) and labels (...)."""
    if loss == "softlib":
        return softlib.losses.softmax_cross_entropy(logits, labels)
    # Not `logits.materialize()`: the yardstick is to have nothing of softlib in it.
    stored = jnp.einsum("...d,vd->...v", logits.hidden, logits.weight)
    return optax.softmax_cross_entropy_with_integer_labels(stored, labels)


def mean_loss(
    logits: softlib.LinearLogits, labels: jax.Array, *, loss: str
) -> jax.Array:
    return softlib.masked_mean(token_losses(logits, labels, loss=loss))


def held_out_sums(
    logits: softlib.LinearLogits, labels: jax.Array
) -> dict[str, jax.Array]:
    """Summed "loss" and number of right top-1 guesses ("correct"), from one stream."""
    metrics = softlib.logits.token_metrics(logits, labels, metrics=("loss", "correct"))
    return jax.tree.map(jnp.sum, metrics)._asdict()
