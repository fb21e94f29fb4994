"""The accumulator of positive weights: values, monoid laws, edges, derivatives."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from softlib.numerics import PlainSum
from softlib.testing import assert_close
from tests.host import jnp

ACCUMULATOR = PlainSum()


def accumulated(blocks, values=None):
    """Folds blocks (and the values that belong to their columns) one after another."""
    rows = blocks[0].shape[0]
    zeros = None if values is None else jnp.zeros((rows, values[0].shape[1]))
    state = ACCUMULATOR.init((rows,), blocks[0].dtype, weighted=zeros)
    for i, block in enumerate(blocks):
        weigh = None if values is None else (lambda w, i=i: w @ values[i])
        state = ACCUMULATOR.update(state, block, weigh=weigh)
    return state


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("sizes", [(1,), (1, 7, 3), (128, 1, 127)])
def test_fold_matches_oracle(dtype, sizes):
    with jax.enable_x64(dtype == "float64"):
        rng = np.random.default_rng(0)
        blocks = [jnp.asarray(rng.exponential(size=(4, n)), dtype) for n in sizes]
        values = [jnp.asarray(rng.normal(size=(n, 3)), dtype) for n in sizes]
        state = accumulated(blocks, values)
        w = np.concatenate(blocks, 1).astype(np.float64)
        x = np.concatenate(values, 0).astype(np.float64)
        total, length = w.sum(1), sum(sizes)
        log_sum, mean = ACCUMULATOR.finalize(state), ACCUMULATOR.mean(state)
        assert_close(log_sum, np.log(total), dtype=dtype, length=length)
        assert_close(mean, w @ x / total[:, None], dtype=dtype, length=length)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), absent=st.floats(0, 1))
def test_monoid_laws(seed, absent):
    rng = np.random.default_rng(seed)

    def state():
        weights = np.where(rng.random((3, 4)) < absent, 0, rng.exponential(size=(3, 4)))
        return ACCUMULATOR.update(
            ACCUMULATOR.init((3,)), jnp.asarray(weights, jnp.float32)
        )

    a, b, c = state(), state(), state()
    merge = ACCUMULATOR.merge
    equal = lambda x, y: np.testing.assert_allclose(x.sum, y.sum, rtol=1e-6)
    equal(merge(a, merge(b, c)), merge(merge(a, b), c))
    np.testing.assert_array_equal(merge(a, b).sum, merge(b, a).sum)
    neutral = ACCUMULATOR.init((3,))
    np.testing.assert_array_equal(merge(a, neutral).sum, a.sum)
    np.testing.assert_array_equal(merge(neutral, a).sum, a.sum)


def test_a_row_without_weight_is_minus_infinity_with_mean_and_gradient_zero():
    weights = jnp.array([[0.0, 0.0], [1.0, 3.0]])
    values = jnp.array([[1.0], [5.0]])

    def results(weights):
        state = accumulated([weights], [values])
        return ACCUMULATOR.finalize(state), ACCUMULATOR.mean(state)

    log_sum, mean = results(weights)
    np.testing.assert_allclose(log_sum, [-np.inf, np.log(4)], rtol=1e-6)
    np.testing.assert_allclose(mean[:, 0], [0, 4], rtol=1e-6)
    # The slope of the mean is (x - mean) / sum.
    slope = jax.grad(lambda w: results(w)[1][1, 0])(weights)
    np.testing.assert_allclose(slope, [[0, 0], [-0.75, 0.25]], rtol=1e-6)
    of_empty = jax.grad(lambda w: results(w)[1][0, 0])(weights)
    assert np.isfinite(of_empty).all()
    np.testing.assert_array_equal(of_empty[1], 0)
    log_slope = jax.grad(lambda w: results(w)[0][0])(weights)
    np.testing.assert_array_equal(log_slope, 0)


def test_nan_stays_in_its_row():
    state = accumulated([jnp.array([[jnp.nan, 0.0], [1.0, 1.0]])])
    np.testing.assert_array_equal(np.isnan(ACCUMULATOR.finalize(state)), [True, False])


def test_reduced_axis_may_be_any_and_weighted_sums_any_tree():
    weights = jnp.asarray(np.random.default_rng(0).exponential(size=(3, 5, 2)))
    zeros = {"square": jnp.zeros((3, 2)), "pair": jnp.zeros((3, 2, 2))}
    state = ACCUMULATOR.init((3, 2), weighted=zeros)

    def weigh(w):
        square = (w * w).sum(1)
        return {"square": square, "pair": jnp.stack([square, square], -1)}

    state = ACCUMULATOR.update(state, weights, axis=1, weigh=weigh)
    mean = ACCUMULATOR.mean(state)
    expected = (weights**2).sum(1) / weights.sum(1)
    np.testing.assert_allclose(mean["square"], expected, rtol=1e-6)
    np.testing.assert_allclose(mean["pair"][..., 1], expected, rtol=1e-6)


def test_states_pass_through_loops():
    w = jnp.asarray(np.random.default_rng(0).exponential(size=(3, 4, 5)), jnp.float32)

    @jax.jit
    def fold(w):
        step = lambda state, block: (ACCUMULATOR.update(state, block), None)
        return ACCUMULATOR.finalize(jax.lax.scan(step, ACCUMULATOR.init((4,)), w)[0])

    np.testing.assert_allclose(fold(w), jnp.log(w.sum((0, 2))), rtol=1e-6)


def test_second_derivative_is_that_of_the_logarithm():
    with jax.enable_x64():
        w = jnp.asarray(np.random.default_rng(0).exponential(size=(1, 4)))
        fold = lambda w: ACCUMULATOR.finalize(accumulated([w[:, :1], w[:, 1:]])).sum()
        total = float(w.sum())
        np.testing.assert_allclose(jax.grad(fold)(w), np.full((1, 4), 1 / total))
        hessian = jax.jit(jax.hessian(fold))(w).reshape(4, 4)
        np.testing.assert_allclose(hessian, np.full((4, 4), -1 / total**2))
