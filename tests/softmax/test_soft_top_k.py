"""Soft top-k: oracle, sums, derivatives by x, k and alpha, extremes, errors."""

from typing import Any

import jax
import numpy as np
import pytest
from jax.test_util import check_grads

from softlib import softmax as library
from softlib.softmax import _soft_top_k
from softlib.testing import assert_close, check_transformations
from tests.compiled import computed, f32
from tests.host import jnp
from tests.oracles import gates as oracle

INF, NAN = jnp.inf, jnp.nan
soft_top_k = computed(library.soft_top_k)
log_soft_top_k = computed(library.log_soft_top_k)


@jax.jit
def everything(x, k, alpha, where, cotangent):
    """z, log z, and the gradients of both by x."""
    call = lambda f: jax.vjp(lambda x: f(x, k=k, alpha=alpha, where=where), x)
    (z, pull), (log_z, pull_log) = call(soft_top_k), call(log_soft_top_k)
    return z, log_z, pull(cotangent)[0], pull_log(cotangent)[0]


def problem(dtype) -> Any:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(7, 9)).round(2) * 3
    x[1] = 1.0
    x[2, [0, 5]] = -np.inf
    x[3] = -np.inf
    x[4] = x[4] * 100
    where = rng.random((7, 9)) < 0.8
    x[6, ~where[6]] = np.nan
    k = np.array([3, 2.5, 9, 1, 4, 0.125, 5])
    alpha = np.array([1, 2, 1, 1, 4, 0.5, 8])
    make = lambda y: np.asarray(y, jnp.dtype(dtype))
    cotangent = rng.normal(size=x.shape)
    return make(x), make(k), make(alpha), where, make(cotangent)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_matches_oracle(dtype):
    with jax.enable_x64(dtype == "float64"):
        x, k, alpha, where, cotangent = problem(dtype)
        found = jax.device_get(everything(x, k, alpha, where, cotangent))
        z, log_z, by_x, log_by_x = found
        exact, log_exact, *jacobians = oracle.soft_top_k(x, k, alpha, where)
        assert z.dtype == log_z.dtype == by_x.dtype == dtype
        assert_close(z, exact, dtype=dtype, length=9)
        assert_close(log_z, log_exact, dtype=dtype, length=9)
        for slopes, jacobian in zip((by_x, log_by_x), jacobians, strict=True):
            expected = np.einsum("rij,ri->rj", jacobian, np.asarray(cotangent, float))
            assert_close(slopes, expected, dtype=dtype, length=81)


def test_sums_to_k_wherever_the_scores_are():
    x = np.asarray(np.random.default_rng(1).normal(size=(4, 1000)), np.float32)
    call = jax.jit(lambda x, k, alpha: soft_top_k(x, k=k, alpha=alpha).sum(-1))
    for k in (0.001, 1.0, 3.0, 2.5, 999.5):
        for shift, alpha in ((0.0, 1.0), (1e4, 1.0), (0.0, 1e3), (0.0, 1e6)):
            total = call(x + f32(shift), f32(k), f32(alpha))
            assert_close(total, np.full(4, k), dtype="float32", length=1000, c=1)


def test_a_few_steps_find_the_threshold(monkeypatch):
    """Where bisection is not there yet."""
    k = np.tile([0.5, 50.0, 900.25], 3)
    x = 2 * np.asarray(np.random.default_rng(4).normal(size=(9, 1000)), np.float32)
    steps, root = [], _soft_top_k._root

    def counted(step, low, high, t, most=None):
        steps.append(5 if most is None else most)
        return root(step, low, high, t, steps[-1])

    monkeypatch.setattr(_soft_top_k, "_root", counted)
    jax.clear_caches()  # what is traced here must not be found again elsewhere
    z = np.asarray(jax.jit(library.soft_top_k)(x, k=k.astype(np.float32)))
    jax.clear_caches()
    assert_close(z.sum(-1), k, dtype="float32", length=1000, c=1)
    assert 0 < sum(steps) < 12


def test_large_alpha_is_the_hard_top_k_and_ties_share():
    x = f32([[4.0, 2, 3, 1], [2.0, 2, 2, 2], [5.0, 1, 1, 1]])
    z = soft_top_k(x, k=2, alpha=200.0)
    expected = [[1, 0, 1, 0], [0.5] * 4, [1, 1 / 3, 1 / 3, 1 / 3]]
    assert_close(z, expected, dtype="float32", length=4)


def test_shift_does_nothing_and_larger_entries_have_more():
    x = np.asarray(np.random.default_rng(2).normal(size=(3, 6)), np.float32)
    z = soft_top_k(x, k=2.5)
    assert_close(soft_top_k(x + 5, k=2.5), z, dtype="float32", length=6)
    order = np.argsort(x, axis=-1)
    assert (np.diff(np.take_along_axis(z, order, -1), axis=-1) > 0).all()


@pytest.mark.parametrize("order", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_derivatives_by_x_k_and_alpha(order):
    with jax.enable_x64(True):
        x = np.random.default_rng(3).normal(size=(2, 4))
        x[1, 2] = -np.inf
        k, alpha = np.array([1.5, 2.0]), np.array([1.0, 2.5])

        @jax.jit
        def call(x, k, alpha):
            log_z = log_soft_top_k(x, k=k, alpha=alpha)
            return soft_top_k(x, k=k, alpha=alpha), jnp.where(
                log_z > -jnp.inf, log_z, 0
            )

        finite = np.where(np.isfinite(x), x, 0)
        # Differences are taken of finite entries only.
        hide = lambda y: jnp.where(np.isfinite(x), y, -jnp.inf)
        hidden = jax.jit(lambda y, *rest: call(hide(y), *rest))
        check_grads(hidden, (finite, k, alpha), order=order, rtol=1e-5)
        total = jax.jit(jax.grad(lambda k: soft_top_k(x, k=k, alpha=alpha).sum()))(k)
        np.testing.assert_allclose(total, 1, rtol=1e-12)


def test_jacobian_is_symmetric_and_its_rows_sum_to_zero():
    x = np.asarray(np.random.default_rng(4).normal(size=5), np.float32)
    for mode in (jax.jacfwd, jax.jacrev):
        call = jax.jit(mode(lambda x: soft_top_k(x, k=2, alpha=3.0)))
        jacobian = np.asarray(call(x))
        assert_close(jacobian, jacobian.T, dtype="float32", length=5)
        assert_close(jacobian.sum(0), np.zeros(5), dtype="float32", length=5)


def test_logarithm_and_its_slopes_far_from_the_threshold():
    # 1 - z_0 = 2 z_1: the threshold is log(2) / 2 above the middle.
    x = f32([400.0, 0, 0])
    half = np.log(2) / 2
    log_z = log_soft_top_k(x, k=1)
    assert_close(log_z, [0, -200 - half, -200 - half], dtype="float32", length=3)
    slopes = jax.jit(jax.grad(lambda x: log_soft_top_k(x, k=1)[1]))(x)
    assert_close(slopes, [-0.5, 0.75, -0.25], dtype="float32", length=3, c=256)
    huge = soft_top_k(f32([1e30, -1e30, 0]), k=1)
    np.testing.assert_array_equal(huge, [1, 0, 0])


def test_rows_without_a_threshold():
    x = f32([[1, -INF, 0], [-INF] * 3, [1, 2, 3], [1, 2, 3], [NAN, 0, 1]])
    k = f32([2.0, 1, 0, 7, 1])
    call = jax.jit(lambda x, k: (soft_top_k(x, k=k), log_soft_top_k(x, k=k)))
    z, log_z = jax.device_get(call(x, k))
    np.testing.assert_array_equal(z[:4], [[1, 0, 1], [0] * 3, [0] * 3, [1] * 3])
    logs = [[0, -INF, 0], [-INF] * 3, [-INF] * 3, [0] * 3]
    np.testing.assert_array_equal(log_z[:4], logs)
    assert np.isnan(z[4]).all()
    total = lambda f: lambda x, k: jnp.where(jnp.isfinite(y := f(x, k=k)), y, 0).sum()
    for f in (soft_top_k, log_soft_top_k):
        for slopes in jax.jit(jax.grad(total(f), (0, 1)))(x[:4], k[:4]):
            assert not np.any(slopes)
    for alpha in map(np.array, (0.0, -1.0, NAN)):
        assert np.isnan(soft_top_k(x[2:3], k=1, alpha=alpha)).all()


def test_axes_and_empty_shapes():
    x = np.asarray(np.random.default_rng(5).normal(size=(2, 3, 4)), np.float32)
    flat = soft_top_k(x.reshape(-1), k=5).reshape(x.shape)
    np.testing.assert_array_equal(soft_top_k(x, k=5, axis=None), flat)
    moved = np.moveaxis(soft_top_k(np.moveaxis(x, 1, -1), k=2), -1, 1)
    np.testing.assert_array_equal(soft_top_k(x, k=2, axis=1), moved)
    for shape in ((0, 3), (2, 0)):
        assert soft_top_k(np.zeros(shape, "f4"), k=1).shape == shape
    one = np.zeros((2, 1), np.float32)
    np.testing.assert_array_equal(soft_top_k(one, k=1), np.ones((2, 1)))
    assert_close(soft_top_k(one[:1], k=0.25), [[0.25]], dtype="f4", length=1)


@pytest.mark.slow
def test_transformations():
    rng = np.random.default_rng(6)
    x = jnp.asarray(rng.normal(size=(4, 5)), "float32")
    k, alpha = jnp.array([1.0, 2, 3, 1.5]), jnp.array([1.0, 0.5, 2, 3])
    call = lambda x, k, alpha: soft_top_k(x, k=k, alpha=alpha)
    check_transformations(call, x, k, alpha, rows=(0, 1, 2))


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("k", "options", "error", "message"),
    [
        (0, {}, ValueError, "`k` must be positive and finite, got 0"),
        (1, {"alpha": 0.0}, ValueError, "`alpha` must be positive"),
        (jnp.ones(2), {}, ValueError, "`k` must broadcast"),
        (1, {"alpha": jnp.ones(3, int)}, TypeError, "`alpha` must have a floating"),
        (1, {"axis": 1}, ValueError, "`axis` must hold"),
    ],
)
def test_errors(k, options, error, message):
    with pytest.raises(error, match=f"soft_top_k: {message}"):
        soft_top_k(jnp.zeros(3), k=k, **options)
