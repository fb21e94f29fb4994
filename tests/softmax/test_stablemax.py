"""StableMax and its logarithm: the oracle, every edge, the traps of its branches."""

import functools
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from softlib import softmax as maps
from softlib.testing import assert_close, check_transformations
from tests.compiled import f32
from tests.host import jnp
from tests.oracles import stablemax as oracle

DATA = pathlib.Path(__file__).parent.parent / "data"
BOTH = {"stablemax": maps.stablemax, "log_stablemax": maps.log_stablemax}
AXES = {"last": -1, "first": 0, "two": (0, 2), "all": None}


@pytest.fixture(scope="module")
def case():
    with np.load(DATA / "stablemax_perpgrad_case0.npz") as arrays:
        return dict(arrays)


def jitted(function, **options):
    """Compiled, with results of NumPy."""
    call = jax.jit(functools.partial(function, **options))
    return lambda x, **arrays: jax.device_get(call(x, **arrays))


def gradient_of(function, x, cotangent, **options):
    """Of the sum of finite results times a cotangent."""

    def total(x):
        y = function(x, **options)
        return (
            jnp.where(y == -jnp.inf, 0, y)
            * jnp.broadcast_to(cotangent, y.shape).astype(y.dtype)
        ).sum()

    return jax.device_get(jax.jit(jax.grad(total))(x))


# --------------------------------------------------------------------------- the oracle
def test_vectors(case):
    x = case["in_logits"]
    p, log_p = (jitted(f)(x) for f in BOTH.values())
    assert_close(p, case["out_stablemax"], dtype="float32", length=16)
    assert_close(log_p, case["out_log_stablemax"], dtype="float32", length=16)


@pytest.mark.parametrize("axis", AXES.values(), ids=AXES)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_matches_oracle(dtype, axis):
    random = np.random.default_rng(0)
    x = 3 * random.normal(size=(5, 4, 7))
    x[0], x[1, 0], x[2, 0, 0] = 0, 1, -np.inf
    where: Any = random.uniform(size=(4, 7)) < 0.7
    where[0, 0] = True
    with jax.enable_x64(dtype == "float64"):
        x = np.asarray(x, jnp.dtype(dtype))
        exact = np.asarray(x, np.float64)
        expected = oracle.stablemax(exact, axis, where)
        one, two = random.normal(size=(2, *x.shape)).astype(np.float32)

        @jax.jit
        def both(x, *cotangents):
            results = []
            for function, cotangent in zip(BOTH.values(), cotangents, strict=True):

                def total(x, function=function, cotangent=cotangent):
                    y = function(x, axis=axis, where=where)
                    finite = jnp.where(y == -jnp.inf, 0, y)
                    return (finite * cotangent.astype(y.dtype)).sum(), y

                results.append(jax.grad(total, has_aux=True)(x))
            return results

        for number, (slope, found) in enumerate(jax.device_get(both(x, one, two))):
            assert found.dtype == x.dtype
            assert_close(found, expected[number], dtype=dtype, length=140)
            cotangents = [0 * one, 0 * two]
            cotangents[number] = (one, two)[number]
            wanted = oracle.stablemax_gradient(
                exact, *cotangents, axis=axis, where=where
            )
            assert slope.dtype == x.dtype
            # The cotangent of a narrow result is rounded to its dtype.
            c = 4 if dtype in ("float64", "float32") else 8
            assert_close(slope, wanted, dtype=dtype, length=140, c=c)


# ------------------------------------------------------------------------- the promises
@pytest.mark.parametrize("function", BOTH.values(), ids=BOTH)
def test_slope_is_exact_at_0_and_1(function):
    """jnp.maximum(x, 0) + 1 has the slope 0.5 at 0, 1 / (1 - x) is NaN at 1."""
    x = f32([0.0, 1.0, -1.0, 0.0, -0.0])
    cotangents = np.zeros((2, 5))
    cotangents[int(function is maps.log_stablemax)] = cotangent = np.arange(1.0, 6)
    found = gradient_of(function, x, f32(cotangent))
    wanted = oracle.stablemax_gradient(x, *cotangents)
    assert_close(found, wanted, dtype="float32", length=5)


def test_derivative_of_the_logarithm_of_s_is_one_over_one_plus_magnitude():
    x = f32([0.0, 1.0, -1.0, 3.0, -3.0, 1e4, -1e4, 0.5])
    # Of log p_i - log p_7 only x_i moves the first term.
    difference = lambda x: maps.log_stablemax(x) - maps.log_stablemax(x)[7:]
    jacobian = jax.jit(jax.jacobian(difference))(x)
    slope = np.diagonal(jacobian)[:7]
    np.testing.assert_allclose(slope, 1 / (1 + np.abs(x[:7])), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("function", BOTH.values(), ids=BOTH)
def test_entries_that_do_not_count_have_no_value_and_no_gradient(function):
    x = f32([[np.nan, 1.0, -np.inf, 2.0], [np.inf, 1.0, -np.inf, 2.0]])
    where = np.array([False, True, True, True])
    found = jitted(function)(x, where=where)
    nothing = 0 if function is maps.stablemax else -jnp.inf
    np.testing.assert_array_equal(found[:, [0, 2]], np.full((2, 2), nothing))
    np.testing.assert_allclose(found[:, 1::2], jitted(function)(x[:, 1::2]), rtol=1e-6)
    slope = gradient_of(function, x, np.arange(1.0, 5), where=where)
    np.testing.assert_array_equal(slope[:, [0, 2]], np.zeros((2, 2)))
    assert np.isfinite(slope).all()


@pytest.mark.parametrize("function", BOTH.values(), ids=BOTH)
def test_row_without_entries_is_zero_without_gradient(function):
    x = f32([[-np.inf, -np.inf], [np.nan, 1.0]])
    where = np.array([[True, True], [False, False]])
    found = jitted(function)(x, where=where)
    nothing = 0 if function is maps.stablemax else -jnp.inf
    np.testing.assert_array_equal(found, np.full((2, 2), nothing))
    slope = gradient_of(function, x, np.ones(2), where=where)
    np.testing.assert_array_equal(slope, np.zeros((2, 2)))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_bad_score_makes_its_row_nan(bad):
    x = f32([[1.0, bad, bad], [1.0, 2.0, 3.0]])
    for function in BOTH.values():
        found = jitted(function)(x)
        assert np.isnan(found[0]).all()
        assert np.isfinite(found[1]).all()


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 1)])
def test_no_rows_no_entries_and_one_entry(shape):
    x = np.full(shape, -2.0, np.float32)
    p, log_p = jax.jit(lambda x: (maps.stablemax(x), maps.log_stablemax(x)))(x)
    np.testing.assert_array_equal(p, np.ones(shape))
    np.testing.assert_array_equal(log_p, np.zeros(shape))


def test_huge_scores_keep_finite_derivatives():
    x = f32([6e5, -6e5, 1e30, -1e30, 0.0])
    for function in BOTH.values():
        assert np.isfinite(jitted(function)(x)).all()
        assert np.isfinite(gradient_of(function, x, np.arange(5.0))).all()


def test_second_derivative_at_0_is_that_from_above():
    hessian = jax.jit(jax.hessian(lambda x: maps.log_stablemax(x)[0]))
    at_0, above, below = (
        np.asarray(hessian(f32([at, 2.0])))[0, 0] for at in (0.0, 1e-6, -1e-6)
    )
    np.testing.assert_allclose(at_0, above, rtol=1e-4)
    assert abs(above - below) > 0.5


def test_other_probabilities_do_not_round_away():
    x = f32([1e5, 0.0])
    p, exponential = map(np.asarray, (maps.stablemax(x), maps.softmax(x)))
    assert p[1] > 0 == exponential[1]
    assert p[0] < 1 == exponential[0]


# --------------------------------------------------------------------------- properties
@jax.jit
def with_softmax_of_logarithms(x):
    symmetric = jnp.sign(x) * jnp.log1p(jnp.abs(x))
    return maps.stablemax(x), maps.softmax(symmetric)


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 9]))
def test_it_is_the_softmax_of_the_symmetric_logarithm(seed, size):
    random = np.random.default_rng(seed)
    x = f32(random.normal(size=size) * 10 ** random.uniform(-3, 4))
    found, wanted = map(np.asarray, with_softmax_of_logarithms(x))
    # The exponential of a logarithm of up to 10.
    assert_close(found, wanted, dtype="float32", length=size, c=16)
    assert_close(found.sum(), 1.0, dtype="float32", length=size)
    assert (np.diff(found[np.argsort(x)]) >= -1e-7).all()


def test_it_is_not_invariant_to_a_shift():
    x = f32([[1.0, 0.0], [11.0, 10.0]])
    here, moved = np.asarray(maps.stablemax(x))
    assert np.abs(here - moved).max() > 0.1


def test_transformations():
    random = np.random.default_rng(1)
    x = f32(random.normal(size=(8, 3)))
    where = random.uniform(size=(8, 3)) < 0.8
    where[:, 0] = True

    def both(x, where):
        log_p = maps.log_stablemax(x, where=where)
        return maps.stablemax(x, where=where), jnp.where(where, log_p, 0)

    check_transformations(both, x, where, rows=(0, 1))


# ------------------------------------------------------------------------------- errors
@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("function", BOTH.values(), ids=BOTH)
def test_errors_name_the_argument(function):
    name = function.__name__
    with pytest.raises(TypeError, match=f"{name}: `x` must have a floating dtype"):
        function(jnp.arange(3))
    with pytest.raises(ValueError, match=f"{name}: `axis` must hold axes"):
        function(jnp.ones(3), axis=1)
    with pytest.raises(TypeError, match=f"{name}: `where` must have dtype bool"):
        function(jnp.ones(3), where=jnp.ones(3))
    with pytest.raises(ValueError, match=f"{name}: `where` must broadcast to shape"):
        function(jnp.ones(3), where=jnp.ones(2, bool))
