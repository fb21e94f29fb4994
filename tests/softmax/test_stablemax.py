"""StableMax and its logarithm: the oracle, every edge, the traps of its branches."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from softlib import softmax as maps
from softlib.testing import assert_close, check_transformations
from tests.oracles import stablemax as oracle

DATA = pathlib.Path(__file__).parent.parent / "data"
BOTH = {"stablemax": maps.stablemax, "log_stablemax": maps.log_stablemax}
AXES = {"last": -1, "first": 0, "two": (0, 2), "all": None}


@pytest.fixture(scope="module")
def case():
    with np.load(DATA / "stablemax_perpgrad_case0.npz") as arrays:
        return dict(arrays)


def jitted(function, **options):
    return jax.jit(functools.partial(function, **options))


def gradient_of(function, x, cotangent, **options):
    """Of the sum of finite results times a cotangent."""

    def total(x):
        y = function(x, **options)
        return (
            jnp.where(y == -jnp.inf, 0, y)
            * jnp.broadcast_to(cotangent, y.shape).astype(y.dtype)
        ).sum()

    return jax.jit(jax.grad(total))(x)


# --------------------------------------------------------------------------- the oracle
def test_vectors(case):
    x = jnp.asarray(case["in_logits"])
    p, log_p = (jitted(f)(x) for f in BOTH.values())
    assert_close(p, case["out_stablemax"], dtype="float32", length=16)
    assert_close(log_p, case["out_log_stablemax"], dtype="float32", length=16)


@pytest.mark.parametrize("axis", AXES.values(), ids=AXES)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_matches_oracle(dtype, axis):
    random = np.random.default_rng(0)
    x = 3 * random.normal(size=(5, 4, 7))
    x[0], x[1, 0], x[2, 0, 0] = 0, 1, -np.inf
    where = random.uniform(size=(4, 7)) < 0.7
    where[0, 0] = True
    with jax.enable_x64(dtype == "float64"):
        x = jnp.asarray(x, dtype)
        exact = np.asarray(x, np.float64)
        expected = oracle.stablemax(exact, axis, where)
        one, two = random.normal(size=(2, *x.shape)).astype(np.float32)
        for number, function in enumerate(BOTH.values()):
            options = {"axis": axis, "where": jnp.asarray(where)}
            found = jitted(function, **options)(x)
            assert found.dtype == x.dtype
            assert_close(found, expected[number], dtype=dtype, length=140)
            cotangents = [0 * one, 0 * two]
            cotangents[number] = cotangent = (one, two)[number]
            slope = gradient_of(function, x, jnp.asarray(cotangent), **options)
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
    x = jnp.array([0.0, 1.0, -1.0, 0.0, -0.0])
    cotangents = np.zeros((2, 5))
    cotangents[int(function is maps.log_stablemax)] = cotangent = np.arange(1.0, 6)
    found = gradient_of(function, x, jnp.asarray(cotangent))
    wanted = oracle.stablemax_gradient(np.asarray(x), *cotangents)
    assert_close(found, wanted, dtype="float32", length=5)


def test_derivative_of_the_logarithm_of_s_is_one_over_one_plus_magnitude():
    x = jnp.array([0.0, 1.0, -1.0, 3.0, -3.0, 1e4, -1e4, 0.5])
    # Of log p_i - log p_7 only x_i moves the first term.
    difference = lambda x: maps.log_stablemax(x) - maps.log_stablemax(x)[7:]
    jacobian = jax.jit(jax.jacobian(difference))(x)
    slope = jnp.diagonal(jacobian)[:7]
    np.testing.assert_allclose(slope, 1 / (1 + jnp.abs(x[:7])), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("function", BOTH.values(), ids=BOTH)
def test_entries_that_do_not_count_have_no_value_and_no_gradient(function):
    x = jnp.array([[jnp.nan, 1.0, -jnp.inf, 2.0], [jnp.inf, 1.0, -jnp.inf, 2.0]])
    where = jnp.array([False, True, True, True])
    found = jitted(function)(x, where=where)
    nothing = 0 if function is maps.stablemax else -jnp.inf
    np.testing.assert_array_equal(found[:, [0, 2]], jnp.full((2, 2), nothing))
    np.testing.assert_allclose(found[:, 1::2], jitted(function)(x[:, 1::2]), rtol=1e-6)
    slope = gradient_of(function, x, jnp.arange(1.0, 5), where=where)
    np.testing.assert_array_equal(slope[:, [0, 2]], jnp.zeros((2, 2)))
    assert jnp.isfinite(slope).all()


@pytest.mark.parametrize("function", BOTH.values(), ids=BOTH)
def test_row_without_entries_is_zero_without_gradient(function):
    x = jnp.array([[-jnp.inf, -jnp.inf], [jnp.nan, 1.0]])
    where = jnp.array([[True, True], [False, False]])
    found = jitted(function)(x, where=where)
    nothing = 0 if function is maps.stablemax else -jnp.inf
    np.testing.assert_array_equal(found, jnp.full((2, 2), nothing))
    slope = gradient_of(function, x, jnp.ones(2), where=where)
    np.testing.assert_array_equal(slope, jnp.zeros((2, 2)))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_bad_score_makes_its_row_nan(bad):
    x = jnp.array([[1.0, bad, bad], [1.0, 2.0, 3.0]])
    for function in BOTH.values():
        found = jitted(function)(x)
        assert jnp.isnan(found[0]).all()
        assert jnp.isfinite(found[1]).all()


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 1)])
def test_no_rows_no_entries_and_one_entry(shape):
    x = jnp.full(shape, -2.0)
    np.testing.assert_array_equal(maps.stablemax(x), jnp.ones(shape))
    np.testing.assert_array_equal(maps.log_stablemax(x), jnp.zeros(shape))


def test_huge_scores_keep_finite_derivatives():
    x = jnp.array([6e5, -6e5, 1e30, -1e30, 0.0])
    for function in BOTH.values():
        assert jnp.isfinite(jitted(function)(x)).all()
        assert jnp.isfinite(gradient_of(function, x, jnp.arange(5.0))).all()


def test_second_derivative_at_0_is_that_from_above():
    hessian = jax.jit(jax.hessian(lambda x: maps.log_stablemax(x)[0]))
    above, below = (hessian(jnp.array([at, 2.0]))[0, 0] for at in (1e-6, -1e-6))
    np.testing.assert_allclose(hessian(jnp.array([0.0, 2.0]))[0, 0], above, rtol=1e-4)
    assert abs(above - below) > 0.5


def test_other_probabilities_do_not_round_away():
    x = jnp.array([1e5, 0.0])
    p, exponential = maps.stablemax(x), maps.softmax(x)
    assert p[1] > 0 == exponential[1]
    assert p[0] < 1 == exponential[0]


# --------------------------------------------------------------------------- properties
@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 9]))
def test_it_is_the_softmax_of_the_symmetric_logarithm(seed, size):
    random = np.random.default_rng(seed)
    x = jnp.asarray(random.normal(size=size) * 10 ** random.uniform(-3, 4), "float32")
    symmetric = jnp.sign(x) * jnp.log1p(jnp.abs(x))
    found, wanted = maps.stablemax(x), maps.softmax(symmetric)
    # The exponential of a logarithm of up to 10.
    assert_close(found, wanted, dtype="float32", length=size, c=16)
    assert_close(found.sum(), 1.0, dtype="float32", length=size)
    assert (jnp.diff(found[jnp.argsort(x)]) >= -1e-7).all()


def test_it_is_not_invariant_to_a_shift():
    x = jnp.array([1.0, 0.0])
    assert jnp.abs(maps.stablemax(x) - maps.stablemax(x + 10)).max() > 0.1


def test_transformations():
    random = np.random.default_rng(1)
    x = jnp.asarray(random.normal(size=(8, 3)), "float32")
    where = jnp.asarray(random.uniform(size=(8, 3)) < 0.8)
    where = where.at[:, 0].set(True)

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
