"""The running-max accumulator: values, monoid laws, exceptional scores, derivatives."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from softlib.numerics import RunningMax
from softlib.testing import assert_close
from tests.compiled import f32
from tests.host import jnp

ACCUMULATOR = RunningMax()


def oracle(z, x=None):
    """Logsumexp per row, and the mean of x under the softmax."""
    z = np.asarray(z, np.float64)
    top = np.where(np.isneginf(z.max(-1)), 0, z.max(-1))
    e = np.exp(z - top[:, None])
    with np.errstate(divide="ignore"):
        lse = top + np.log(e.sum(-1))
    if x is None:
        return lse
    total = e.sum(-1)[:, None]
    return lse, e @ np.asarray(x, np.float64) / np.where(total == 0, 1, total)


def accumulated(blocks, values=None):
    """Folds blocks (and the values that belong to their columns) one after another."""
    rows = blocks[0].shape[0]
    zeros = None if values is None else jnp.zeros((rows, values[0].shape[1]))
    state = ACCUMULATOR.init((rows,), blocks[0].dtype, weighted=zeros)
    for i, block in enumerate(blocks):
        weigh = None if values is None else (lambda e, i=i: e @ values[i])
        state = ACCUMULATOR.update(state, block, weigh=weigh)
    return state


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("sizes", [(1,), (5,), (1, 7, 3), (128, 1, 127)])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_fold_matches_oracle(dtype, sizes, scale):
    with jax.enable_x64(dtype == "float64"):
        rng = np.random.default_rng(0)
        blocks = [(scale * rng.normal(size=(4, n))).astype(dtype) for n in sizes]
        values = [rng.normal(size=(n, 3)).astype(dtype) for n in sizes]
        state = jax.jit(accumulated)(blocks, values)
        lse, mean = oracle(np.concatenate(blocks, 1), np.concatenate(values, 0))
        length = sum(sizes)
        assert_close(ACCUMULATOR.finalize(state), lse, dtype=dtype, length=length)
        assert_close(ACCUMULATOR.mean(state), mean, dtype=dtype, length=length)


def test_reduced_axis_may_be_any():
    z = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, 2)), jnp.float32)
    state = ACCUMULATOR.update(ACCUMULATOR.init((3, 2)), z, axis=1)
    expected = jax.nn.logsumexp(z, axis=1)
    np.testing.assert_allclose(ACCUMULATOR.finalize(state), expected, rtol=1e-6)


@settings(max_examples=50)
@given(
    seed=st.integers(0, 2**31), absent=st.floats(0, 1), scale=st.sampled_from([1, 99])
)
def test_monoid_laws(seed, absent, scale):
    rng = np.random.default_rng(seed)

    def state():
        z = np.where(
            rng.random((3, 4)) < absent, -np.inf, scale * rng.normal(size=(3, 4))
        )
        return ACCUMULATOR.update(ACCUMULATOR.init((3,)), jnp.asarray(z, jnp.float32))

    a, b, c = state(), state(), state()
    lse = ACCUMULATOR.finalize
    merge = ACCUMULATOR.merge
    equal = lambda x, y: np.testing.assert_allclose(
        lse(x), lse(y), rtol=1e-5, atol=1e-5
    )
    equal(merge(a, merge(b, c)), merge(merge(a, b), c))
    equal(merge(a, b), merge(b, a))
    neutral = ACCUMULATOR.init((3,))
    np.testing.assert_array_equal(lse(merge(a, neutral)), lse(a))
    np.testing.assert_array_equal(lse(merge(neutral, a)), lse(a))


def test_an_empty_row_is_minus_infinity_with_mean_and_gradient_zero():
    z = f32([[-np.inf, -np.inf], [0.0, 0.0]])

    @jax.jit
    def results(z):
        state = accumulated([z, z], [jnp.ones((2, 1))] * 2)
        return ACCUMULATOR.finalize(state), ACCUMULATOR.mean(state)

    lse, mean = jax.device_get(results(z))
    np.testing.assert_allclose(lse, [-np.inf, np.log(4)], rtol=1e-6)
    np.testing.assert_array_equal(mean[:, 0], [0, 1])
    finite = lambda z: jnp.where(
        z[0, 0] == 0, 0, results(z)[0][1] + results(z)[1].sum()
    )
    gradient = np.asarray(jax.jit(jax.grad(finite))(z))
    np.testing.assert_array_equal(gradient[0], 0)
    np.testing.assert_allclose(gradient[1], 0.5, rtol=1e-6)


def test_nan_stays_in_its_row():
    state = accumulated([jnp.array([[jnp.nan, 0.0], [1.0, 1.0]])])
    np.testing.assert_array_equal(np.isnan(ACCUMULATOR.finalize(state)), [True, False])


def test_minus_infinity_counts_as_absent():
    z = jnp.array([[1.0, -jnp.inf, 2.0]])
    with_absent = ACCUMULATOR.finalize(accumulated([z]))
    without = ACCUMULATOR.finalize(accumulated([z[:, ::2]]))
    np.testing.assert_array_equal(with_absent, without)


def test_first_and_second_derivatives_are_those_of_logsumexp():
    with jax.enable_x64():
        z = np.random.default_rng(0).normal(size=(2, 6))
        fold = lambda z: ACCUMULATOR.finalize(accumulated([z[:, :4], z[:, 4:]])).sum()
        plain = lambda z: jax.nn.logsumexp(z, axis=1).sum()

        @functools.partial(jax.jit, static_argnums=0)
        def derivatives(f, z):
            return jax.grad(f)(z), jax.hessian(f)(z), jax.jvp(f, (z,), (z,))[1]

        found, expected = derivatives(fold, z), derivatives(plain, z)
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-12)
        np.testing.assert_allclose(found[1], expected[1], atol=1e-14)
        np.testing.assert_allclose(found[2], expected[2], rtol=1e-12)


def test_states_pass_through_loops():
    z = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 5)), jnp.float32)

    @jax.jit
    def fold(z):
        step = lambda state, block: (ACCUMULATOR.update(state, block), None)
        return ACCUMULATOR.finalize(jax.lax.scan(step, ACCUMULATOR.init((4,)), z)[0])

    expected = jax.nn.logsumexp(z, axis=(0, 2))
    np.testing.assert_allclose(fold(z), expected, rtol=1e-6)
