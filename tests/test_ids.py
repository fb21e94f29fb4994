"""Ids mean the same in every integer dtype, also where the range does not fit it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softlib._ids import labels_in_range
from tests.compiled import information, losses, nn, scoring

ROWS, CLASSES = 4, 300
IDS = [3, 5, 100, 7]
LOGITS = jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, CLASSES)))
PROBS, SHARP = jax.nn.softmax(LOGITS), jax.nn.softmax(jnp.eye(CLASSES))
ORDER = jnp.argsort(-LOGITS)
ONES = jnp.ones(ROWS)
STATE = losses.GlobalContrastiveState(jnp.zeros(CLASSES))

FUNCTIONS = {
    "cross_entropy": lambda ids: losses.softmax_cross_entropy(LOGITS, ids),
    "self_distillation": lambda ids: losses.universal_self_distillation_loss(
        LOGITS, LOGITS, ids
    ),
    "zipf": lambda ids: losses.zipf_soft_labels(LOGITS, ids),
    "sdm": lambda ids: losses.sdm_loss(LOGITS, ids, ONES, ONES / 2),
    "mcmi": lambda ids: losses.mcmi_loss(LOGITS, ids, SHARP, weight=0.5),
    "centroids": lambda ids: information.class_centroids(
        PROBS, ids, num_classes=CLASSES
    ),
    "contrastive": lambda ids: losses.global_contrastive_update(
        STATE, ids, LOGITS[:, :7], 0.5, gamma=0.5
    ),
    "propensity": lambda ids: losses.propensity_scored_precision_at_k(
        ORDER, ids[:, None], jnp.full(CLASSES, 0.5), k=3
    ),
    "fourier": lambda ids: nn.fourier_cross_entropy(
        LOGITS[:, :6], ids, num_bins=CLASSES
    ),
    "codebook": lambda ids: nn.vq_logits(LOGITS[:, :ROWS], LOGITS.T, ids),
    "codes": lambda ids: nn.straight_through_codes(LOGITS[:, :ROWS], LOGITS.T, ids),
    "experts": lambda ids: nn.capacity_dispatch(ids[:, None], CLASSES, capacity=1),
    "load": lambda ids: losses.load_balancing_loss(PROBS, ids[:, None]),
    "confidence": lambda ids: scoring.calibrated_confidence(
        jnp.arange(4.0), ids, num_groups=CLASSES
    ),
}


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_ids_of_every_dtype_mean_the_same(name, dtype):
    found = FUNCTIONS[name](jnp.array(IDS, dtype))
    wanted = FUNCTIONS[name](jnp.array(IDS, "int32"))
    for one, two in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        assert np.isfinite(two).any()
        np.testing.assert_array_equal(one, two)


def test_labels_in_range():
    labels = jnp.array([-100, -1, 0, 2, 3, 127], "int8")
    found = labels_in_range(labels, 3)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, [-1, -1, 0, 2, -1, -1])
    found = labels_in_range(jnp.array([0, 2**32 - 1], "uint32"), 3)
    np.testing.assert_array_equal(found, [0, -1])
