"""Losses between two heads over a large vocabulary; no logits of either are formed.

A batch is (tokens, labels, the teacher's logits), and logits are values: that of the
teacher holds its hidden states and its table.
"""

import jax
from language_model.model import LanguageModel

from softlib import LinearLogits, losses


def cross_entropy(
    model: LanguageModel, tokens, labels, teacher: LinearLogits | None = None
) -> jax.Array:
    return losses.softmax_cross_entropy(model(tokens), labels).mean()


def plain(model: LanguageModel, tokens, labels, teacher: LinearLogits) -> jax.Array:
    z = model(tokens)
    own = losses.softmax_cross_entropy(z, labels)
    return (own + losses.knowledge_distillation_loss(z, teacher)).mean()


def normalized(
    model: LanguageModel, tokens, labels, teacher: LinearLogits
) -> jax.Array:
    z = model(tokens)
    own = losses.softmax_cross_entropy(z, labels)
    return (own + losses.normalized_distillation_loss(z, teacher, labels)).mean()


def reverse(model: LanguageModel, tokens, labels, teacher: LinearLogits) -> jax.Array:
    z = model(tokens)
    own = losses.softmax_cross_entropy(z, labels)
    # Neither gradient nor time goes to the teacher, which is no argument of training.
    return (own + losses.softmax_kl_divergence(z, teacher, reverse=True)).mean()


def jensen_shannon(
    model: LanguageModel, tokens, labels, teacher: LinearLogits
) -> jax.Array:
    z = model(tokens)
    own = losses.softmax_cross_entropy(z, labels)
    # Near the teacher JS is a quarter of KL.
    return (own + 4 * losses.softmax_jensen_shannon_divergence(z, teacher)).mean()


METHODS = {
    "CE": cross_entropy,
    "KD": plain,
    "NKD": normalized,
    "reverse-KL": reverse,
    "JS": jensen_shannon,
}


def divergence(
    model: LanguageModel, tokens, teacher: LinearLogits, *, reverse: bool = False
) -> jax.Array:
    """Measures the divergence of the teacher from the student, or in reverse."""
    z = model(tokens)
    return losses.softmax_kl_divergence(z, teacher, reverse=reverse).mean()
