"""The maps of error-free exponentials: last places, edges, forms, derivatives."""

import functools

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from softlib.softmax import (
    two_pass_log_softmax,
    two_pass_logsumexp,
    two_pass_softmax,
)
from softlib.testing import assert_close, check_transformations
from tests.compiled import f32
from tests.host import jnp
from tests.oracles import extended as oracle

FUNCTIONS = {
    "softmax": (two_pass_softmax, oracle.softmax),
    "log_softmax": (two_pass_log_softmax, oracle.log_softmax),
    "logsumexp": (two_pass_logsumexp, oracle.logsumexp),
}
JAX = {
    "softmax": jax.nn.softmax,
    "log_softmax": jax.nn.log_softmax,
    "logsumexp": functools.partial(jax.nn.logsumexp, axis=-1),
}
both_forms = pytest.mark.parametrize("compensated", [True, False])
every_function = pytest.mark.parametrize("name", FUNCTIONS)


@functools.partial(jax.jit, static_argnames=("name", "compensated", "axis"))
def traced(x, where=None, *, name, compensated, axis=-1):
    function = FUNCTIONS[name][0]
    return function(x, axis, where=where, compensated=compensated)


def call(x, where=None, **options):
    """Its results are arrays of NumPy."""
    return jax.device_get(traced(x, where, **options))


@functools.partial(jax.jit, static_argnames=("name", "compensated"))
def with_gradient(x, cotangent, *, name, compensated):
    function = functools.partial(FUNCTIONS[name][0], compensated=compensated)
    y, pull = jax.vjp(function, x)
    return y, pull(cotangent)[0]


def of_size(low, rows=300, columns=100, seed=0):
    """Scores of either sign from `low` to ten times that in absolute value."""
    rng = np.random.default_rng(seed)
    size = low * 10 ** rng.random((rows, columns))
    return f32(size * rng.choice([-1, 1], size.shape))


# -------------------------------------------------------------------------- last places
@both_forms
@every_function
@pytest.mark.parametrize("low", [1e-3, 1.0, 10.0, 1e4])
def test_results_are_right_to_the_last_places(name, compensated, low):
    x = of_size(low)
    found = call(x, name=name, compensated=compensated)
    exact = FUNCTIONS[name][1](x)
    error = oracle.last_places(found, exact)
    limits = {"softmax": (0.9, 5), "log_softmax": (1.2, 4), "logsumexp": (0.55, 1.1)}
    assert error.max() < limits[name][0 if compensated else 1]


@both_forms
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_the_worst_error_is_four_times_smaller_than_that_of_jax(name, compensated):
    ours = theirs = 0
    for low in (1.0, 10.0):
        x = of_size(low)
        exact = FUNCTIONS[name][1](x)
        found = call(x, name=name, compensated=compensated)
        ours = max(ours, oracle.last_places(found, exact).max())
        found = jax.jit(JAX[name])(x)
        theirs = max(theirs, oracle.last_places(found, exact).max())
    assert theirs > 4 * ours


@both_forms
def test_the_logarithm_of_a_probability_near_1_is_not_lost(compensated):
    x = f32([[0.0, -20.0], [0.0, -80.0], [50.0, 20.0]])
    found = call(x, name="log_softmax", compensated=compensated)
    exact = -np.log1p(np.exp(np.float64(x[:, 1] - x[:, 0])))
    np.testing.assert_allclose(found[:, 0], exact, rtol=3e-7)
    assert (np.asarray(jax.nn.log_softmax(x))[:, 0] == 0).all()


@both_forms
def test_values_and_gradients_of_the_data_file(repository, compensated):
    case = np.load(repository / "tests/data/two_pass_softmax_case0.npz")
    x = case["in_x"]
    cotangent = case["in_cotangent"].astype(np.float32)
    y, gradient = with_gradient(x, cotangent, name="softmax", compensated=compensated)
    exact = case["out_softmax"]
    np.testing.assert_allclose(
        np.where(exact > 1e-30, y, 0), np.where(exact > 1e-30, exact, 0), rtol=1e-6
    )
    assert_close(gradient, case["out_grad"], dtype="float32", length=100)
    lse = call(x, name="logsumexp", compensated=compensated)
    exact = case["out_logsumexp"]
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(exact))
    finite = np.isfinite(exact)
    error = oracle.last_places(lse[finite], exact[finite])
    np.testing.assert_array_less(error, 4)


# ------------------------------------------------------------- dtypes, shapes, axes
@both_forms
@every_function
@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_dtypes(name, compensated, dtype):
    with jax.enable_x64(dtype == "float64"):
        x = np.random.default_rng(0).normal(size=(5, 37)) * 30
        x = np.asarray(x, jnp.dtype(dtype))
        found = call(x, name=name, compensated=compensated)
        assert found.dtype == x.dtype
        exact = FUNCTIONS[name][1](x.astype(np.float64) if dtype == "float64" else x)
        assert_close(found, exact, dtype=dtype, length=1)


@both_forms
@every_function
@pytest.mark.parametrize("axis", [0, (0, 2), (2, 1), None])
def test_axes_and_where(name, compensated, axis):
    rng = np.random.default_rng(0)
    x = f32(rng.normal(size=(3, 5, 4)) * 10)
    where = rng.random((5, 4)) < 0.7
    given = np.where(where, x, f32(np.nan))  # may hold anything
    found = call(given, where, name=name, compensated=compensated, axis=axis)
    absent = np.where(where, x, -np.inf)
    axes = range(3) if axis is None else np.atleast_1d(axis)
    axes = sorted(int(a) for a in axes)
    last = range(-len(axes), 0)

    def rows(array):
        array = np.moveaxis(np.asarray(array), axes, last)
        return array.reshape(*array.shape[: 3 - len(axes)], -1)

    found = np.asarray(found) if name == "logsumexp" else rows(found)
    exact = np.float64(FUNCTIONS[name][1](rows(absent)))
    np.testing.assert_allclose(found, exact, rtol=5e-7, atol=1e-30)


@both_forms
@every_function
@pytest.mark.parametrize("shape", [(3, 1), (3, 0)])
def test_small_shapes(name, compensated, shape):
    found = call(np.ones(shape, np.float32), name=name, compensated=compensated)
    one = {"softmax": 1, "log_softmax": 0, "logsumexp": 1 if shape[1] else -np.inf}
    assert found.shape == (shape[:1] if name == "logsumexp" else shape)
    np.testing.assert_array_equal(found, one[name])


def test_no_rows_and_keepdims():
    assert two_pass_softmax(jnp.ones((0, 4))).shape == (0, 4)
    call = functools.partial(two_pass_logsumexp, axis=(0, 2), keepdims=True)
    assert jax.eval_shape(call, jnp.ones((2, 3, 4))).shape == (1, 3, 1)


# -------------------------------------------------------------------------------- edges
@both_forms
def test_rows_at_the_edges(compensated):
    inf, nan = jnp.inf, jnp.nan
    x = f32([[-inf, -inf, -inf], [inf, 0, 1], [nan, 0, -inf], [3e38, -3e38, 3e38]])
    found = {n: call(x, name=n, compensated=compensated) for n in FUNCTIONS}
    half = f32(np.log(0.5))
    np.testing.assert_array_equal(found["softmax"][0], 0)
    np.testing.assert_array_equal(found["log_softmax"][0], -inf)
    for name in ("softmax", "log_softmax"):
        assert np.isnan(found[name][1:3]).all()
    np.testing.assert_array_equal(found["softmax"][3], [0.5, 0, 0.5])
    np.testing.assert_array_equal(found["log_softmax"][3], [half, -inf, half])
    lse = np.array([-inf, inf, nan, 3e38], np.float32)
    np.testing.assert_array_equal(found["logsumexp"], lse)


@both_forms
def test_no_size_of_scores_is_silently_wrong(compensated):
    large, small = np.e / (1 + np.e), 1 / (1 + np.e)
    cases = [
        ([1e6, 1e6 + 1], [small, large]),
        ([-1e6, -1e6 - 1], [large, small]),
        ([32_769.0, 32_768.0], [large, small]),
        ([45_001.0, 45_000.0], [large, small]),
        ([1e30, -1e30], [1, 0]),
        ([-1e9, 5.0], [0, 1]),
        ([200.0, 200.0], [0.5, 0.5]),
        ([-200.0, -200.0], [0.5, 0.5]),
    ]
    x = f32([scores for scores, _ in cases])
    found = call(x, name="softmax", compensated=compensated)
    np.testing.assert_allclose(found, [p for _, p in cases], rtol=3e-7)


@both_forms
@every_function
def test_gradients_at_the_edges(name, compensated):
    x = f32([[-np.inf] * 3, [-np.inf, 1e4, 1e4], [2.0, 2.0, 2.0], [0.0, -1e4, -np.inf]])
    shape = (4,) if name == "logsumexp" else (4, 3)
    g = np.arange(1.0, 1.0 + np.prod(shape), dtype=np.float32).reshape(shape)
    _, gradient = with_gradient(x, g, name=name, compensated=compensated)
    p = np.array([[0] * 3, [0, 0.5, 0.5], [1 / 3] * 3, [1, 0, 0]])
    present = np.isfinite(x)
    if name == "softmax":
        exact = p * (g - (p * g).sum(1, keepdims=True))
    elif name == "log_softmax":
        exact = np.where(present, g - p * np.where(present, g, 0).sum(1)[:, None], 0)
    else:
        exact = p * g[:, None]
    np.testing.assert_allclose(gradient, exact, rtol=1e-6, atol=1e-6)


# -------------------------------------------------------------------------- promises
@both_forms
@hypothesis.settings(max_examples=15)
@hypothesis.given(
    seed=st.integers(0, 2**31), shift=st.sampled_from([0.0, 128.0, 4096.0, -16384.0])
)
def test_a_shift_changes_nothing(compensated, seed, shift):
    """Scores on a grid of 2^-9: the shifted ones are exact."""
    x = np.random.default_rng(seed).integers(-10_000, 10_000, (2, 30)) / 512
    x = f32(x)
    moved = call(x + f32(shift), name="softmax", compensated=compensated)
    here = call(x, name="softmax", compensated=compensated)
    # Without compensation sums of 30 terms round differently.
    np.testing.assert_allclose(moved, here, rtol=2e-7 if compensated else 8e-7)


@both_forms
@every_function
def test_jit_is_eager(name, compensated):
    """Though XLA fuses products with sums when it compiles."""
    scale = np.array([[10.0], [1e2], [1e3], [4e4]])
    x = f32(np.random.default_rng(0).uniform(-scale, scale, (4, 16)))
    eager = FUNCTIONS[name][0](x, compensated=compensated)
    compiled = call(x, name=name, compensated=compensated)
    np.testing.assert_allclose(compiled, eager, rtol=4e-7, atol=1e-30)


@every_function
def test_second_derivatives_under_vmap(name):
    plain = JAX[name]
    weigh = np.sin(np.arange(1.0, 5.0))
    with jax.enable_x64():
        x = np.random.default_rng(0).normal(size=(3, 4))
        hessians = [
            jax.jit(jax.vmap(jax.hessian(lambda x, f=f: (f(x) * weigh).sum())))(x)
            for f in (FUNCTIONS[name][0], plain)
        ]
        np.testing.assert_allclose(*hessians, rtol=1e-10, atol=1e-14)


@pytest.mark.slow
@both_forms
@every_function
def test_transformations(name, compensated):
    x = np.asarray(np.random.default_rng(0).normal(size=(8, 5)), np.float32)
    function = functools.partial(FUNCTIONS[name][0], compensated=compensated)
    check_transformations(function, x)


@pytest.mark.usefixtures("untyped")
@every_function
def test_errors(name):
    function = FUNCTIONS[name][0]
    name = function.__name__
    with pytest.raises(TypeError, match=f"{name}: `x` must have a floating dtype"):
        function(jnp.zeros(2, int))
    with pytest.raises(ValueError, match=f"{name}: `axis` must hold axes"):
        function(jnp.zeros(2), 1)
    with pytest.raises(ValueError, match=f"{name}: `where` must broadcast"):
        function(jnp.zeros(2), where=jnp.zeros(3, bool))
