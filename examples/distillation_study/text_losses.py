"""Losses between two heads over a large vocabulary; no logits of either are formed.

A batch is (tokens, labels, teacher's hidden states, teacher's table).
"""

import jax
from language_model.model import LanguageModel

from softlib import losses


def cross_entropy(
    model: LanguageModel, tokens, labels, there=None, table=None
) -> jax.Array:
    found = losses.linear_softmax_cross_entropy(model(tokens), model.table, labels)
    return found.mean()


def plain(model: LanguageModel, tokens, labels, there, table) -> jax.Array:
    h = model(tokens)
    own = losses.linear_softmax_cross_entropy(h, model.table, labels)
    kd = losses.linear_knowledge_distillation_loss(h, model.table, there, table)
    return (own + kd).mean()


def normalized(model: LanguageModel, tokens, labels, there, table) -> jax.Array:
    h = model(tokens)
    own = losses.linear_softmax_cross_entropy(h, model.table, labels)
    nkd = losses.linear_normalized_distillation_loss(
        h, model.table, there, table, labels
    )
    return (own + nkd).mean()


def reverse(model: LanguageModel, tokens, labels, there, table) -> jax.Array:
    h = model(tokens)
    own = losses.linear_softmax_cross_entropy(h, model.table, labels)
    # Neither gradient nor time goes to the teacher, which is no argument of training.
    kl = losses.linear_kl_divergence(h, model.table, there, table, reverse=True)
    return (own + kl).mean()


def jensen_shannon(model: LanguageModel, tokens, labels, there, table) -> jax.Array:
    h = model(tokens)
    own = losses.linear_softmax_cross_entropy(h, model.table, labels)
    js = losses.linear_jensen_shannon_divergence(h, model.table, there, table)
    # Near the teacher JS is a quarter of KL.
    return (own + 4 * js).mean()


METHODS = {
    "CE": cross_entropy,
    "KD": plain,
    "NKD": normalized,
    "reverse-KL": reverse,
    "JS": jensen_shannon,
}


def divergence(model: LanguageModel, tokens, labels, there, table) -> jax.Array:
    """Of the teacher from the student, for evaluation."""
    h = model(tokens)
    return losses.linear_kl_divergence(h, model.table, there, table).mean()
