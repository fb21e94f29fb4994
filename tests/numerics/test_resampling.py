"""Systematic resampling of signed weights."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from softlib.numerics import systematic_resample
from tests.host import jnp

_draw = jax.jit(systematic_resample, static_argnames="num_samples")


def weights_of(seed, dtype="float32"):
    random = np.random.default_rng(seed)
    weights = random.normal(size=7) * (random.uniform(size=7) < 0.7)
    weights[3] = -0.5
    return jnp.asarray(weights, dtype)


@pytest.mark.parametrize("num", [1, 3, 20])
def test_every_weighted_sum_is_kept_in_expectation(num):
    """Of the indicator of each index, within 5 standard errors."""
    weights, repeats = weights_of(0), 4000
    keys = jax.random.split(jax.random.key(num), repeats)
    draw = lambda key: systematic_resample(key, weights, num_samples=num)
    indices, drawn = jax.jit(jax.vmap(draw))(keys)
    sums = np.asarray(jax.vmap(lambda i, w: jnp.zeros(7).at[i].add(w))(indices, drawn))
    error = sums.std(0) / repeats**0.5
    assert (np.abs(sums.mean(0) - weights) <= 5 * error + 1e-6).all()


@settings(max_examples=40)
@given(seed=st.integers(0, 2**31), num=st.sampled_from([1, 3, 20]))
def test_counts_are_rounded_expectations(seed, num):
    """Never a weight of 0; each index its expected number of times, down or up."""
    weights = weights_of(seed)
    indices, drawn = _draw(jax.random.key(seed), weights, num_samples=num)
    assert indices.dtype == jnp.int32
    assert (np.diff(indices) >= 0).all()
    counts = np.bincount(indices, minlength=7)
    size = np.abs(np.asarray(weights, np.float64))
    expected = num * size / size.sum()
    assert (counts >= np.floor(expected - 1e-4)).all()
    assert (counts <= np.ceil(expected + 1e-4)).all()
    assert (counts[size == 0] == 0).all()
    wanted = np.sign(weights)[np.asarray(indices)] * size.sum() / num
    np.testing.assert_allclose(drawn, wanted, rtol=1e-5)


def test_weights_of_zero_at_both_ends_are_never_drawn():
    weights = jnp.array([0.0, 1.0, 0.0])
    keys = jax.random.split(jax.random.key(0), 500)
    draw = jax.jit(jax.vmap(lambda k: systematic_resample(k, weights, num_samples=5)))
    indices, _ = draw(keys)
    np.testing.assert_array_equal(indices, 1)


def test_weights_that_are_all_zero_give_zeros_and_broken_ones_nan():
    key = jax.random.key(0)
    np.testing.assert_array_equal(_draw(key, jnp.zeros(3), num_samples=2)[1], [0, 0])
    for broken in (jnp.nan, jnp.inf):
        found = _draw(key, jnp.array([1.0, broken, 1.0]), num_samples=2)[1]
        assert np.isnan(found).all()


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_dtype_of_weights(dtype):
    with jax.enable_x64(dtype == "float64"):
        _, drawn = systematic_resample(
            jax.random.key(0), weights_of(1, dtype), num_samples=4
        )
        assert drawn.dtype == jnp.promote_types(dtype, jnp.float32)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("argument", "weights", "num", "error"),
    [
        ("weights", jnp.ones(3, int), 2, TypeError),
        ("weights", jnp.ones((3, 1)), 2, ValueError),
        ("weights", jnp.ones(0), 2, ValueError),
        ("num_samples", jnp.ones(3), 0, ValueError),
        ("num_samples", jnp.ones(3), 2.0, TypeError),
    ],
)
def test_errors(argument, weights, num, error):
    with pytest.raises(error, match=f"^systematic_resample: `{argument}` must .*got"):
        systematic_resample(jax.random.key(0), weights, num_samples=num)
