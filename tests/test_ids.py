"""Ids mean the same in every integer dtype, also where the range does not fit it."""

import jax
import numpy as np
import pytest

from softlib import attention, masks
from softlib._ids import equal_ids, labels_in_range, signed
from softlib.logits import VQLogits
from softlib.nn import FourierDensity
from tests.compiled import information, losses, method, metrics, nn, of_stored, scoring
from tests.host import jnp

ROWS, CLASSES = 4, 300
IDS = [3, 5, 100, 7]
LOGITS = jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, CLASSES)))
PROBS, SHARP = jax.nn.softmax(LOGITS), jax.nn.softmax(jnp.eye(CLASSES))
ORDER = jnp.argsort(-LOGITS)
ONES = jnp.ones(ROWS)
FOURIER = method(FourierDensity, "cross_entropy")
STATE = losses.GlobalContrastiveState(jnp.zeros(CLASSES))

FUNCTIONS = {
    "cross_entropy": lambda ids: of_stored.softmax_cross_entropy(LOGITS, ids),
    "self_distillation": lambda ids: losses.universal_self_distillation_loss(
        LOGITS, LOGITS, ids
    ),
    "zipf": lambda ids: losses.zipf_soft_labels(LOGITS, ids),
    "sdm": lambda ids: losses.sdm_loss(LOGITS, ids, ONES, ONES / 2),
    "mcmi": lambda ids: losses.mcmi_loss(LOGITS, ids, SHARP, weight=0.5),
    "centroids": lambda ids: information.class_centroids(
        PROBS, ids, num_classes=CLASSES
    ),
    "contrastive": lambda ids: STATE.update(
        ids, LOGITS[:, :7], temperature=0.5, gamma=0.5
    ),
    "propensity": lambda ids: metrics.propensity_scored_precision_at_k(
        ORDER, ids[:, None], jnp.full(CLASSES, 0.5), k=3
    ),
    "fourier": lambda ids: FOURIER(LOGITS[:, :6], ids, num_bins=CLASSES),
    "codebook": lambda ids: VQLogits(LOGITS[:, :ROWS], LOGITS.T, ids).materialize(),
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


DTYPES = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]


def test_labels_out_of_range_are_so_in_every_dtype_of_64_bits():
    with jax.enable_x64():
        for dtype in DTYPES:
            labels = jnp.array([1, np.iinfo(dtype).max], dtype)
            loss = of_stored.softmax_cross_entropy(jnp.zeros((2, 3)), labels)
            np.testing.assert_array_equal(np.isnan(loss), [False, True], dtype)


def test_experts_that_do_not_exist_take_no_slot_of_others():
    x, chosen = jnp.ones((2, 1)), jnp.array([[0], [2**31 - 1]])
    args = (x, x, chosen, jnp.zeros_like(chosen), lambda filled: 2 * filled)
    y = nn.capacity_experts(*args, num_experts=2, capacity=2)
    np.testing.assert_array_equal(y, [[2], [np.nan]])


def test_signed_ids():
    with jax.enable_x64():
        for dtype in DTYPES:
            most = np.iinfo(dtype).max
            found = signed(jnp.array([0, most], dtype))
            assert found.dtype in (jnp.int32, jnp.int64)
            assert found[1] == min(most, 2**63 - 1)
    found = signed(jnp.array([0, 2**32 - 1], "uint32"))
    np.testing.assert_array_equal(found, np.array([0, 2**31 - 1], "int32"))


def test_ids_are_compared_as_numbers():
    signed_ids = jnp.array([-1, 5, 7], "int32")
    for dtype in ("uint8", "uint32"):
        other = jnp.array([np.iinfo(dtype).max, 5, 8], dtype)
        found = equal_ids(signed_ids, other)
        np.testing.assert_array_equal(found, [False, True, False])
        np.testing.assert_array_equal(equal_ids(other, signed_ids), found)
    large = jnp.array([2**31 + 1, 2**31 + 2], "uint32")
    np.testing.assert_array_equal(equal_ids(large[:, None], large[None]), np.eye(2))


@pytest.mark.parametrize("dtype", ["uint8", "uint32"])
def test_ids_and_lengths_of_masks_are_of_any_dtype(dtype):
    wanted = masks.Segments(jnp.array([0, 0, 1])).materialize(3)
    query, key = jnp.array([0, 0, 1], dtype), jnp.array([0, 0, 1], "int32")
    np.testing.assert_array_equal(masks.Segments(query, key).materialize(3), wanted)
    most = jnp.array(np.iinfo(dtype).max, dtype)
    np.testing.assert_array_equal(masks.Padding(key=most).materialize(3), True)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 1, 2)), "float32")
    whole = attention.dot_product_attention(x, x, x)
    found = attention.dot_product_attention(x, x, x, key_value_seq_lengths=most[None])
    np.testing.assert_allclose(found, whole, rtol=1e-6)
    found = attention.decode_attention(x, x, x, key_value_seq_lengths=most[None])
    assert jnp.isnan(found).all()  # as for any length beyond the cache


def test_labels_in_range():
    labels = jnp.array([-100, -1, 0, 2, 3, 127], "int8")
    found = labels_in_range(labels, 3)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, [-1, -1, 0, 2, -1, -1])
    found = labels_in_range(jnp.array([0, 2**32 - 1], "uint32"), 3)
    np.testing.assert_array_equal(found, [0, -1])
