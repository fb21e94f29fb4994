"""calibrate_unified_max: quantiles, ranges, heads without samples, and its use."""

import re

import jax
import numpy as np
import pytest

from softlib.attention import calibrate_unified_max
from tests.attention.decode_problems import decoded, oracle, problem
from tests.host import jnp

calibrate = jax.jit(calibrate_unified_max, static_argnums=1)


def maxima(samples=4000):
    random = np.random.default_rng(0)
    spread = np.array([1.0, 3.0, 0.5])
    return spread * random.normal(size=(samples, 3)) + np.array([6.0, -20.0, 0.0])


@pytest.mark.parametrize("quantiles", [(1e-4, 1 - 1e-4), (0.05, 0.9), (0.0, 1.0)])
def test_range_reaches_from_quantile_to_quantile(quantiles):
    x = maxima()
    found = calibrate(jnp.asarray(x, jnp.float32), quantiles)
    low, high = np.quantile(x, quantiles, axis=0)
    np.testing.assert_allclose(found.phi, (low + high) / 2, rtol=1e-5, atol=1e-5)
    half = ((high - low) / 2).max()
    a, b = found.valid_range
    np.testing.assert_allclose([-a, b], half, rtol=2e-3)
    # The quantiles themselves are inside.
    phi, a, b = np.array(found.phi), float(a), float(b)
    assert (np.array([low, high]) - phi > a).all()
    assert (np.array([low, high]) - phi < b).all()
    outside = (x - phi <= a) | (x - phi >= b)
    np.testing.assert_allclose(found.recompute_rate, outside.mean(0), atol=1e-3)
    widest = found.recompute_rate[1]
    asked = quantiles[0] + 1 - quantiles[1]
    # A quantile lies between two samples, the outer of which is outside.
    assert asked - 1e-3 <= widest <= asked + 2 / len(x)


def test_a_range_that_is_kept_has_the_maxima_in_its_middle():
    x = jnp.asarray(maxima(), jnp.float32)
    found = calibrate_unified_max(x, valid_range=(-70.0, 80.0))
    assert found.valid_range == (-70.0, 80.0)
    plain = calibrate_unified_max(x)
    np.testing.assert_allclose(found.phi, plain.phi - 5, rtol=1e-5)
    assert (found.recompute_rate == 0).all()


def test_rows_without_keys_and_heads_without_rows_do_not_count():
    x = jnp.asarray(maxima(50), jnp.float32)
    holes = jnp.concatenate([x, jnp.full((9, 3), -jnp.inf), jnp.full((9, 3), jnp.nan)])
    empty = jnp.full((68, 1), -jnp.inf)
    found = calibrate(jnp.concatenate([holes, empty], axis=1))
    expected = calibrate(x)
    np.testing.assert_allclose(found.phi[:3], expected.phi, rtol=1e-6)
    np.testing.assert_allclose(found.valid_range, expected.valid_range, rtol=1e-6)
    np.testing.assert_allclose(found.recompute_rate[:3], expected.recompute_rate)
    assert (found.phi[3], found.recompute_rate[3]) == (0, 0)
    nothing = calibrate(empty, valid_range=(-70.0, 80.0))
    assert nothing.phi == 0


def test_heads_are_the_last_axis_and_one_axis_is_one_head():
    x = jnp.asarray(maxima(60), jnp.float32)
    found = calibrate(x.reshape(3, 20, 3))
    np.testing.assert_array_equal(found.phi, calibrate(x).phi)
    one = calibrate(x[:, 1])
    assert one.phi.shape == one.recompute_rate.shape == ()
    np.testing.assert_allclose(one.phi, found.phi[1], rtol=1e-6)


def test_equal_maxima_are_all_inside():
    found = calibrate_unified_max(jnp.full((5, 2), 3.0))
    assert (found.recompute_rate == 0).all()


@pytest.mark.parametrize("keep", [False, True])
def test_what_it_returns_is_what_decode_attention_takes(keep):
    arrays = problem(B=8, N=4, K=2, S=40)
    _, statistics = decoded(arrays)
    kept = (-70.0, 80.0) if keep else None
    found = calibrate_unified_max(statistics.max_score, (0.1, 0.9), valid_range=kept)
    out, statistics = decoded(arrays, phi=found.phi, valid_range=found.valid_range)
    np.testing.assert_allclose(out, oracle(arrays).out, atol=2e-6)
    share = np.asarray(statistics.needs_recompute).mean((0, 1))
    np.testing.assert_allclose(share, found.recompute_rate, atol=1e-6)
    assert (share.max() > 0) != keep


def test_is_a_constant_to_differentiation():
    x = jnp.asarray(maxima(20), jnp.float32)
    total = lambda x: sum(leaf.sum() for leaf in jax.tree.leaves(calibrate(x)))
    np.testing.assert_array_equal(jax.grad(total)(x), 0)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("scores", "quantiles", "error", "message"),
    [
        (jnp.zeros((2, 2), int), (0.0, 1.0), TypeError, "`scores_max` must have a f"),
        (jnp.zeros(()), (0.0, 1.0), ValueError, "`scores_max` must have at least 1"),
        (jnp.zeros(3), (1.0, 0.0), ValueError, "`quantiles` must be an ascending"),
        (jnp.zeros(3), (0.0, 1.5), ValueError, "in [0, 1], got (0.0, 1.5)"),
        (jnp.zeros(3), 0.5, ValueError, "in [0, 1], got 0.5"),
        (jnp.zeros(3), (0.0, 0.5, 1.0), ValueError, "got (0.0, 0.5, 1.0)"),
    ],
)
def test_errors(scores, quantiles, error, message):
    with pytest.raises(error, match=f"calibrate_unified_max: .*{re.escape(message)}"):
        calibrate_unified_max(scores, quantiles)
