"""Labels of several tokens ahead."""

import jax
import numpy as np
import pytest

import softlib
from softlib import losses
from tests.host import jnp

B, T = 3, 6


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("ahead", [1, 3, 8])
def test_matches_loops(ahead, packed):
    random = np.random.default_rng(0)
    tokens = random.integers(1, 50, (B, T))
    where = random.uniform(size=(B, T)) < 0.8
    segments = np.array([[0, 0, 0, 1, 1, 1], [0] * 6, [4, 4, 4, 4, 4, 2]])
    given = {"segment_ids": jnp.asarray(segments)} if packed else {}
    found = jax.jit(
        lambda tokens, where, given: losses.future_tokens(
            tokens, ahead, where=where, **given
        )
    )(tokens, where, given)
    for b, t, k in np.ndindex(B, T, ahead):
        there = t + k + 1
        counts = there < T and where[b, there]
        if counts and packed:
            counts = segments[b, there] == segments[b, t]
        assert bool(found.where[b, t, k]) == counts
        assert found.labels[b, t, k] == (tokens[b, there] if counts else 0)


def test_one_token_ahead_is_next_token_prediction():
    random = np.random.default_rng(0)
    tokens = jnp.asarray(random.integers(0, 9, (B, T)))
    hidden = jnp.asarray(random.normal(size=(B, T, 1, 4)), jnp.float32)
    weight = jnp.asarray(random.normal(size=(9, 4)), jnp.float32)
    labels, where = losses.future_tokens(tokens, 1)
    logits = softlib.LinearLogits(hidden, weight)
    loss = losses.softmax_cross_entropy(logits, labels, where=where)
    wanted = losses.softmax_cross_entropy(logits[:, :-1, 0], tokens[:, 1:])
    np.testing.assert_allclose(loss[:, :-1, 0], wanted, rtol=1e-6)
    np.testing.assert_array_equal(loss[:, -1], 0)


def test_no_tokens_have_no_labels():
    found = losses.future_tokens(jnp.zeros((2, 0), int), 3)
    assert found.labels.shape == found.where.shape == (2, 0, 3)


def test_errors(untyped):
    tokens = jnp.zeros((2, 3), int)
    with pytest.raises(ValueError, match="`num_ahead` must be at least 1, got 0"):
        losses.future_tokens(tokens, 0)
    with pytest.raises(ValueError, match=r"`segment_ids` must have shape \(2, 3\)"):
        losses.future_tokens(tokens, 1, segment_ids=tokens[:, :2])
