"""Maps of tokens to codes: by moving averages, by frequencies."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from softlib.testing import assert_close
from tests.clouds import clouds
from tests.compiled import nn, quantize
from tests.host import jnp


# --------------------------------------------------------------------- moving averages
def test_weights_are_repetitions():
    x, _ = clouds(rows=20)
    counts = jnp.asarray(np.random.default_rng(0).integers(0, 4, 20))
    repeated = jnp.repeat(x, counts, axis=0)
    state = nn.codebook_state(x[:4])
    ema = functools.partial(nn.codebook_ema_update, state, decay=0.25)
    one = ema(x, quantize.assign_codes(x, state.codebook), weights=counts)
    other = ema(repeated, quantize.assign_codes(repeated, state.codebook))
    for a, b in zip(one, other, strict=True):
        assert_close(a, b, dtype="float32", length=40)


def test_update_is_the_formula():
    random = np.random.default_rng(0)
    x, codes = random.normal(size=(30, 3)), random.normal(size=(5, 3))
    mapping, decay = random.integers(0, 4, 30), 0.7  # code 4 has no token
    counts, sums = np.linspace(1, 2, 5), codes * np.linspace(1, 2, 5)[:, None]
    state = nn.codebook_state(jnp.float32(codes), jnp.linspace(1.0, 2.0, 5))
    update = jax.jit(nn.codebook_ema_update)
    for _ in range(3):
        state = update(state, jnp.float32(x), jnp.asarray(mapping), decay=decay)
        for j in range(5):
            own = x[mapping == j]
            counts[j] = decay * counts[j] + (1 - decay) * len(own)
            sums[j] = decay * sums[j] + (1 - decay) * own.sum(0)
    for actual, wanted in zip(
        state, (sums / counts[:, None], counts, sums), strict=True
    ):
        assert_close(actual, wanted, dtype="float32", length=30)
    assert_close(state.codebook[4], codes[4], dtype="float32", length=3)


def test_decay_zero_is_a_step_of_kmeans_and_one_changes_nothing():
    x, _ = clouds()
    state = nn.codebook_state(x[:4])
    mapping = quantize.assign_codes(x, state.codebook)
    step = nn.codebook_ema_update(state, x, mapping, decay=0)
    for code in range(4):
        mean = np.float64(x)[np.asarray(mapping) == code].mean(0)
        assert_close(step.codebook[code], mean, dtype="float32", length=60)
    same = nn.codebook_ema_update(state, x, mapping, decay=1)
    for a, b in zip(same, state, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_code_that_lost_its_tokens_stays_for_ever():
    state = nn.codebook_state(jnp.array([[1.0], [2.0]]))
    x, mapping = jnp.array([[5.0]]), jnp.array([0])
    update = lambda _, s: nn.codebook_ema_update(s, x, mapping, decay=0.5)
    state = jax.jit(lambda s: jax.lax.fori_loop(0, 400, update, s))(state)
    np.testing.assert_allclose(state.codebook[:, 0], [5, 2], rtol=1e-6)


def test_the_codebook_follows_by_its_rule_and_not_by_descent():
    x, mapping = jnp.ones((2, 1)), jnp.array([0, 1])
    value = lambda x, c: nn.codebook_ema_update(
        nn.codebook_state(c), x, mapping, decay=0.5
    ).codebook.sum()
    gradients = jax.grad(value, (0, 1))(x, jnp.zeros((2, 1)))
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0)


# -------------------------------------------------------------------- straight through
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_straight_through_is_the_code_with_the_gradient_of_the_embedding(dtype):
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(6, 3)), dtype)
    codebook = jnp.asarray(random.normal(size=(4, 3)), dtype)
    mapping = jnp.array([0, 3, 1, 1, 2, 0])
    table, pull = jax.vjp(
        lambda x, c: nn.straight_through_codes(x, c, mapping), x, codebook
    )
    np.testing.assert_array_equal(table, codebook[mapping])
    cotangent = jnp.asarray(random.normal(size=(6, 3)), dtype)
    of_x, of_codes = pull(cotangent)
    np.testing.assert_array_equal(of_x, cotangent)
    np.testing.assert_array_equal(of_codes, 0)


# -------------------------------------------------------------------------- frequencies
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_frequency_mapping_in_words(data):
    tokens = data.draw(st.integers(1, 40))
    codes = data.draw(st.integers(1, tokens))
    most = codes if codes == tokens else codes - 1
    alone = data.draw(st.integers(0, most))
    counts = data.draw(
        st.lists(st.integers(0, 9), min_size=tokens, max_size=tokens).map(np.array)
    )
    mapping = np.asarray(
        nn.frequency_mapping(jnp.asarray(counts), codes, num_singletons=alone)
    )
    order = np.argsort(-counts, kind="stable")
    np.testing.assert_array_equal(mapping[order[:alone]], np.arange(alone))
    sizes = np.bincount(mapping, minlength=codes)
    assert len(sizes) == codes
    assert sizes.min() >= 1
    tail = sizes[alone:]
    assert len(tail) == 0 or tail.max() - tail.min() <= 1
    assert (np.diff(mapping[order]) >= 0).all()  # groups are neighbours in frequency


def test_frequency_mapping_of_a_large_vocabulary_does_not_overflow():
    counts = jnp.arange(2**21, 0, -1)
    mapping = np.asarray(nn.frequency_mapping(counts, 4096, num_singletons=1000))
    sizes = np.bincount(mapping)
    assert (sizes[:1000] == 1).all()
    assert set(sizes[1000:]) == {677, 678}


def test_floors_of_a_vocabulary_under_the_law_of_zipf():
    """Zipf over 50,257 tokens, 1,000 alone and 24 groups: 2.62 nats."""
    tokens = 50_257
    p = 1 / np.arange(1, tokens + 1)
    p /= p.sum()
    mapping = nn.frequency_mapping(jnp.float32(p), 1024, num_singletons=1000)
    sizes = np.bincount(np.asarray(mapping))
    floor = (p * np.log(sizes[np.asarray(mapping)])).sum()
    np.testing.assert_allclose(floor, 2.62, atol=0.01)
    np.testing.assert_allclose(np.log(tokens / 1024), 3.89, atol=0.005)


# ------------------------------------------------------------------------------- errors
X, CODEBOOK, MAPPING = jnp.zeros((6, 3)), jnp.zeros((2, 3)), jnp.zeros(6, int)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: nn.codebook_state(X[0]), ValueError, "`codebook` must have shape"),
        (
            lambda: nn.codebook_state(X, jnp.ones(2)),
            ValueError,
            "`counts`.*one per code",
        ),
        (
            lambda: nn.codebook_ema_update(
                nn.codebook_state(CODEBOOK), X, MAPPING, decay=1.5
            ),
            ValueError,
            "`decay`.*1.5",
        ),
        (
            lambda: nn.codebook_ema_update(
                nn.codebook_state(CODEBOOK), X, MAPPING[1:], decay=0.5
            ),
            ValueError,
            "`mapping`.*one per embedding",
        ),
        (
            lambda: nn.straight_through_codes(X, CODEBOOK, MAPPING + 2),
            ValueError,
            r"`mapping` must hold codes in \[0, 2\), got 2",
        ),
        (
            lambda: nn.frequency_mapping(jnp.ones(3), 4),
            ValueError,
            "at least one token",
        ),
        (
            lambda: nn.frequency_mapping(jnp.ones(5), 3, num_singletons=3),
            ValueError,
            "`num_singletons` must be from 0 to 2 for 3 codes and 5 tokens, got 3",
        ),
        (
            lambda: nn.frequency_mapping(jnp.ones(5, bool), 3),
            TypeError,
            "`counts` must have a floating",
        ),
    ],
)
def test_wrong_arguments_are_errors(call, error, message, eager):
    with pytest.raises(error, match=message):
        call()
