"""The losses of the glyph models; each is added to cross-entropy with the label."""

import jax
import jax.numpy as jnp

import softlib
from softlib import losses

from .glyph_models import Classifier

# Temperatures and factors are the defaults of the papers.
TEMPERATURE = 4.0


def cross_entropy(model: Classifier, images, labels, teacher=None) -> jax.Array:
    return losses.softmax_cross_entropy(model(images), labels).mean()


def plain(model: Classifier, images, labels, teacher) -> jax.Array:
    z = model(images)
    own = losses.softmax_cross_entropy(z, labels)
    kd = losses.knowledge_distillation_loss(z, teacher, temperature=TEMPERATURE)
    return (own + kd).mean()


def decoupled(model: Classifier, images, labels, teacher) -> jax.Array:
    z = model(images)
    own = losses.softmax_cross_entropy(z, labels)
    dkd = losses.decoupled_knowledge_distillation_loss(
        z, teacher, labels, temperature=TEMPERATURE, beta=2.0
    )
    return (own + dkd).mean()


def normalized(model: Classifier, images, labels, teacher) -> jax.Array:
    z = model(images)
    own = losses.softmax_cross_entropy(z, labels)
    return (own + losses.normalized_distillation_loss(z, teacher, labels)).mean()


def self_distillation(model: Classifier, images, labels, teacher=None) -> jax.Array:
    z, weak = model(images), model.weak(images)
    own = losses.softmax_cross_entropy(z, labels)
    terms = losses.universal_self_distillation_loss(z, weak, labels)
    return (own + sum(terms)).mean()


def informative(model: Classifier, images, labels, centroids, weight) -> jax.Array:
    """Of a teacher: what it says beyond the label is rewarded."""
    z = model(images)
    return losses.mcmi_loss(z, labels, centroids, weight=weight).mean()


METHODS = {
    "CE": cross_entropy,
    "KD": plain,
    "DKD": decoupled,
    "NKD": normalized,
    "USKD": self_distillation,
}


def accuracy(z: jax.Array, labels: jax.Array) -> float:
    return float(jnp.mean(softlib.logits.top1_correct(z, labels)))
