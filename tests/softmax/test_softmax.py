"""softmax, log_softmax, logsumexp: against longdouble, at every edge, in every form."""

import functools
from typing import Any

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

import softlib
from softlib.softmax import _row_blocks, log_softmax, logsumexp, softmax
from softlib.testing import assert_close, check_transformations
from tests.compiled import f32
from tests.host import jnp
from tests.oracles import softmax as oracle
from tests.pairwise import name as case_name, pairwise

FUNCTIONS = {
    "softmax": (softmax, oracle.softmax),
    "log_softmax": (log_softmax, oracle.log_softmax),
    "logsumexp": (logsumexp, oracle.logsumexp),
}
OPTIONS = {
    "function": tuple(FUNCTIONS),
    "dtype": ("float64", "float32", "bfloat16", "float16"),
    "axis": (-1, 0, (0, 2), (2, 1), None),
    "where": (False, True),
    "scale": (0.1, 10.0, 1e4),
    "compiled": (False, True),
}


def scores(shape, dtype, scale, seed=0) -> Any:
    random = np.random.default_rng(seed)
    x = scale * random.normal(size=shape)
    x = np.where(random.random(shape) < 0.1, -np.inf, x)
    return np.asarray(x, jnp.dtype(dtype))


def rows_last(array, axis):
    """The axes of a row as the last axis, in their order."""
    array = np.asarray(array)
    axes = range(array.ndim) if axis is None else np.atleast_1d(axis)
    axes = sorted(int(a) % array.ndim for a in axes)
    array = np.moveaxis(array, axes, range(-len(axes), 0))
    return array.reshape(*array.shape[: array.ndim - len(axes)], -1)


@pytest.mark.parametrize("case", pairwise(OPTIONS), ids=case_name)
def test_matches_longdouble(case):
    function, expected = FUNCTIONS[case["function"]]
    with jax.enable_x64(case["dtype"] == "float64"):
        x = scores((3, 5, 4), case["dtype"], case["scale"])
        where = None
        if case["where"]:
            where = np.random.default_rng(1).random((5, 4)) < 0.6
            x[:, ~where] = np.nan  # what does not count may hold anything
        call = functools.partial(function, axis=case["axis"], where=where)
        found = jax.device_get((jax.jit(call) if case["compiled"] else call)(x))
        assert found.dtype == x.dtype
        counts = True if where is None else np.broadcast_to(where, x.shape)
        counts = rows_last(counts, case["axis"]) if where is not None else True
        wanted = expected(rows_last(np.asarray(x, np.float64), case["axis"]), counts)
        if case["function"] != "logsumexp":
            assert found.shape == x.shape
            found = rows_last(found, case["axis"])
        found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
        np.testing.assert_array_equal(found == -np.inf, wanted == -np.inf)
        finite = np.isfinite(wanted)
        assert_close(
            np.where(finite, found, 0),
            np.where(finite, wanted, 0),
            dtype=case["dtype"],
            length=60,
        )


def test_rows_at_the_edges():
    inf, nan = jnp.inf, jnp.nan
    call = jax.jit(lambda x: (softmax(x), log_softmax(x), logsumexp(x)))
    x = f32([[-inf] * 3, [0, inf, 1], [0, nan, 1], [1e4, 1e4, -1e4], [5, -inf, 5]])
    p, log, lse = jax.device_get(call(x))
    np.testing.assert_array_equal(p[0], 0)
    np.testing.assert_array_equal(log[0], -inf)
    assert np.isnan(p[1:3]).all()
    assert np.isnan(log[1:3]).all()
    np.testing.assert_array_equal(p[3:], [[0.5, 0.5, 0], [0.5, 0, 0.5]])
    np.testing.assert_allclose(log[3], -np.log([2, 2, 1]) - [0, 0, 2e4 + np.log(2)])
    np.testing.assert_array_equal(lse[:2], [-inf, inf])
    assert np.isnan(lse[2])
    p, log, lse = call(f32([[3.0], [-inf]]))
    np.testing.assert_array_equal(p, [[1], [0]])
    np.testing.assert_array_equal(log, [[0], [-inf]])
    np.testing.assert_array_equal(lse, [3, -inf])


@pytest.mark.parametrize(("shape", "axis"), [((2, 0), -1), ((0, 3), -1), ((2, 0), 0)])
def test_empty_axes_and_no_rows(shape, axis):
    x = f32(np.zeros(shape))
    assert softmax(x, axis).shape == log_softmax(x, axis).shape == shape
    found = logsumexp(x, axis)
    np.testing.assert_array_equal(found, np.full(found.shape, -np.inf))
    assert logsumexp(x, axis, keepdims=True).ndim == 2


def test_gradients_at_the_edges():
    inf = jnp.inf
    x = f32([[0, 0, -inf], [-inf] * 3, [1e4, -1e4, 1e4]])
    g = f32([[1.0, 2.0, 5.0], [1, 2, 3], [1, 2, 4]])
    pull = jax.jit(lambda x: jax.vjp(softmax, x)[1](g)[0])
    np.testing.assert_array_equal(
        pull(x), [[-0.25, 0.25, 0], [0, 0, 0], [-0.75, 0, 0.75]]
    )
    np.testing.assert_array_equal(pull(x), oracle.softmax_pullback(x, g))
    total = lambda x: jnp.where(jnp.isfinite(x), log_softmax(x), 0).sum()
    np.testing.assert_array_equal(
        jax.jit(jax.grad(total))(x), [[0, 0, 0], [0, 0, 0], [-0.5, 1, -0.5]]
    )
    total = lambda x: jnp.where(jnp.isfinite(x).any(-1), logsumexp(x), 0).sum()
    found = jax.jit(jax.grad(total))(x)
    np.testing.assert_array_equal(found, [[0.5, 0.5, 0], [0, 0, 0], [0.5, 0, 0.5]])
    hessian = jax.jit(jax.hessian(lambda row: (softmax(row) * g[0]).sum()))(x[0])
    assert np.isfinite(hessian).all()


def test_temperature_has_the_derivative_of_the_formula():
    with jax.enable_x64(True):
        x = scores((4, 6), "float64", 2.0)
        tau = np.asarray([0.3, 1.0, 2.0, 50.0])
        call = jax.jit(lambda x, tau: softmax(x, temperature=tau))
        found = jax.jit(jax.jacfwd(lambda tau: call(x, tau)))(tau)
        p = np.asarray(call(x, tau))
        z = np.where(np.isfinite(x), x, 0)
        mean = (p * z).sum(-1, keepdims=True)
        expected = -(p * (z - mean)) / tau[:, None] ** 2
        np.testing.assert_allclose(
            np.diagonal(found, axis1=0, axis2=2).T, expected, atol=1e-14
        )
        one = np.asarray([2.0])  # broadcasts over the rows
        two = jax.jit(lambda x: softmax(x, temperature=2.0))
        np.testing.assert_array_equal(call(x, one), two(x))


def test_limits_of_the_temperature():
    x = f32([1.0, 3.0, 3.0, -np.inf])
    np.testing.assert_allclose(softmax(x, temperature=1e-5), [0, 0.5, 0.5, 0])
    np.testing.assert_allclose(
        softmax(x, temperature=1e9), [1 / 3] * 3 + [0], rtol=1e-6
    )


softmax_and_log_sum = jax.jit(lambda x: (softmax(x), logsumexp(x)))


@hypothesis.given(
    seed=st.integers(0, 2**31), shift=st.sampled_from([0, 128, 4096, -16384])
)
@hypothesis.settings(max_examples=40, deadline=None)
def test_a_shift_and_a_permutation_change_nothing(seed, shift):
    random = np.random.default_rng(seed)
    x = random.integers(-1024, 1024, (3, 8)) / 256  # the shift is exact
    x = x.astype(np.float32)
    call = softmax_and_log_sum
    p, lse = map(np.asarray, call(x))
    shifted, lse_shifted = call(x + shift)
    np.testing.assert_allclose(shifted, p, rtol=4e-7)
    np.testing.assert_allclose(lse_shifted, lse + shift, rtol=3e-7, atol=3e-7)
    order = random.permutation(8)
    np.testing.assert_allclose(call(x[:, order])[0], p[:, order], rtol=4e-7)
    np.testing.assert_allclose(p.sum(-1), 1, rtol=4e-7)
    rising = np.take_along_axis(p, x.argsort(-1), -1)
    assert (rising[:, 1:] >= rising[:, :-1]).all()


def test_transformations():
    x = f32(2 * np.random.default_rng(0).normal(size=(8, 5)))
    check_transformations(lambda x: (softmax(x), log_softmax(x), logsumexp(x)), x)


# ------------------------------------------------------------- some rows at a time
@pytest.mark.parametrize("shape", [(37, 20), (3, 5, 7), (16, 300)])
def test_blocks_of_rows_change_nothing(shape, monkeypatch):
    monkeypatch.setattr(_row_blocks, "LEAST", 1)
    monkeypatch.setattr(_row_blocks, "STEP", 64)
    x = scores(shape, "float32", 3.0)
    x[0] = -np.inf
    axis = -1 if len(shape) == 2 else (1, 2)

    @jax.jit
    def log_sums(x):
        names = ("xla_blocks", ("xla",))
        return [logsumexp(x, axis, implementation=name) for name in names]

    @functools.partial(jax.jit, static_argnums=1)
    def with_slope(x, name):
        y, pull = jax.vjp(lambda x: softmax(x, axis, implementation=name), x)
        return y, pull(2 * y)

    np.testing.assert_allclose(*log_sums(x), rtol=1e-6)
    found, wanted = with_slope(x, "in_place"), with_slope(x, None)
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-6)
    np.testing.assert_allclose(found[1][0], wanted[1][0], 1e-5)


def test_a_donated_argument_is_overwritten():
    x = jax.ShapeDtypeStruct((4096, 4096), jnp.float32)
    call = lambda x: softmax(x, implementation="in_place")
    memory = jax.jit(call, donate_argnums=0).lower(x).compile().memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes == 4096 * 4096 * 4
    assert memory.temp_size_in_bytes < 1 << 24


def test_explain_says_which_rows_go_in_blocks():
    large, small = (jax.ShapeDtypeStruct((n, 4096), jnp.float32) for n in (1 << 14, 8))
    text = str(softlib.explain(logsumexp, large))
    assert "cpu: xla_blocks" in text
    assert "too few to gain" in str(softlib.explain(logsumexp, small))
    columns = lambda x: logsumexp(x, 0)
    assert "are not the last" in str(softlib.explain(columns, large))


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: softmax(x.astype(int)), TypeError, "softmax: `x` must have"),
        (lambda x: softmax(x, 2), ValueError, "softmax: `axis` must hold axes"),
        (lambda x: softmax(x, (0, -2)), ValueError, "must name no axis twice"),
        (lambda x: logsumexp(x, where=x), TypeError, "logsumexp: `where` must have"),
        (lambda x: log_softmax(x, where=x[:2] > 0), ValueError, "broadcast to shape"),
        (lambda x: softmax(x, temperature=0.0), ValueError, "`temperature` must be"),
        (lambda x: softmax(x, temperature=x), ValueError, "or one value per row"),
        (lambda x: softmax(x, implementation="cudnn"), ValueError, "must be None or"),
        (
            lambda x: softmax(x, 0, implementation="in_place"),
            NotImplementedError,
            "are not the last",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message.replace("(", r"\(")):
        call(jnp.zeros((3, 4)))
