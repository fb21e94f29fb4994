"""Noisy top-k gating: brute force, Monte Carlo, no noise, rows that lack entries."""

import math
from typing import Any

import jax
import numpy as np
import pytest

from softlib.softmax import noisy_top_k_gating, top_k_gating
from softlib.testing import assert_close
from tests.compiled import computed, f32
from tests.host import jnp

INF, NAN = jnp.inf, jnp.nan
KEY = jax.random.key(3)
gating, normal = computed(top_k_gating), computed(jax.random.normal)


@computed
def draw(key, logits, noise_logits, k, axis=-1, where=None, noise_floor=0.0):
    return noisy_top_k_gating(
        key, logits, noise_logits, k=k, axis=axis, where=where, noise_floor=noise_floor
    )


def problem(dtype="float32", rows=6, experts=5) -> Any:
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(2, rows, experts))
    return tuple(np.asarray(a, jnp.dtype(dtype)) for a in draws)


def brute_force(noise, logits, noise_logits, k, where, noise_floor):
    """Indices and loads, one entry after the other."""
    v, u, noise = (np.asarray(a, np.float64) for a in (logits, noise_logits, noise))
    s = np.log1p(np.exp(u)) + noise_floor
    load, chosen = np.zeros(v.shape), []
    for t, row in enumerate(v + s * noise):
        exist = np.flatnonzero(where[t] & (v[t] > -np.inf))
        best = sorted(exist, key=lambda i, row=row: -row[i])[:k]
        chosen.append([*best, *[-1] * (k - len(best))])
        for i in exist:
            others = sorted((row[j] for j in exist if j != i), reverse=True)
            border = others[k - 1] if len(others) >= k else -np.inf
            load[t, i] = (1 + math.erf((v[t, i] - border) / s[t, i] / 2**0.5)) / 2
    return np.array(chosen), load


@pytest.mark.parametrize(
    ("k", "dtype", "noise_floor"),
    [(2, "float64", 0.0), (1, "float32", 0.5), (5, "bfloat16", 0.0)],
)
def test_is_the_brute_force(k, dtype, noise_floor):
    with jax.enable_x64(dtype == "float64"):
        logits, noise_logits = problem(dtype)
        logits[1, 2] = -INF
        where = np.ones(logits.shape, bool)
        where[2, 1:], where[3] = False, False
        logits[2, 1] = NAN
        found = draw(
            KEY,
            logits,
            noise_logits,
            k,
            where=where,
            noise_floor=noise_floor,
        )
        wide = found.load.dtype
        assert wide == found.weights.dtype == jnp.promote_types(dtype, "float32")
        noise = normal(KEY, logits.shape, wide)
        indices, load = brute_force(noise, logits, noise_logits, k, where, noise_floor)
        np.testing.assert_array_equal(found.indices, indices)
        assert_close(found.load, load, dtype=wide, length=k)
        noisy = (
            logits.astype(wide)
            + (np.logaddexp(noise_logits.astype(wide), 0) + wide.type(noise_floor))
            * noise
        )
        weights, _ = gating(noisy, k=k, where=where)
        assert_close(found.weights, weights, dtype=wide, length=k)


def test_loads_are_the_frequencies_of_selection_and_sum_to_k():
    logits, noise_logits = problem(rows=3)
    draws, k = 20_000, 2

    @jax.jit
    def averages(keys):
        draw = lambda key: noisy_top_k_gating(key, logits, noise_logits, k=k)
        found = jax.vmap(draw)(keys)
        counts = jax.nn.one_hot(found.indices, 5).sum(-2)
        return found.load.mean(0), counts.mean(0)

    load, frequency = averages(jax.random.split(jax.random.key(0), draws))
    error = 5 * 0.5 / draws**0.5  # five standard errors of a frequency
    np.testing.assert_allclose(load, frequency, atol=error)
    np.testing.assert_allclose(load.sum(-1), k, atol=error)


def test_without_a_key_there_is_no_noise_and_the_load_is_the_selection():
    logits, noise_logits = problem()
    logits[0] = 1.0  # all equal: the lower index is selected
    weights, indices = gating(logits, k=2)
    found = draw(None, logits, noise_logits, 2)
    np.testing.assert_array_equal(found.indices, indices)
    assert_close(found.weights, weights, dtype=weights.dtype, length=2)
    np.testing.assert_array_equal(found.load, np.eye(5)[indices].sum(-2))
    silent = draw(KEY, logits, np.full_like(noise_logits, -INF), 2)
    for one, two in zip(silent, found, strict=True):
        np.testing.assert_array_equal(one, two)


def test_gradients_are_the_finite_differences_and_reach_the_noise():
    with jax.enable_x64():
        logits, noise_logits = problem("float64", rows=2)
        rng = np.random.default_rng(1)
        by_weight = rng.normal(size=(2, 2))
        by_load, dv, du = rng.normal(size=(3, 2, 5))

        def call(v, u):
            found = noisy_top_k_gating(KEY, v, u, k=2)
            return (found.weights * by_weight).sum() + (found.load * by_load).sum()

        gv, gu = jax.device_get(jax.jit(jax.grad(call, (0, 1)))(logits, noise_logits))
        compiled = jax.jit(call)
        move = lambda h: float(compiled(logits + h * dv, noise_logits + h * du))
        slope = (move(1e-5) - move(-1e-5)) / 2e-5
        assert gu.any()
        np.testing.assert_allclose((gv * dv + gu * du).sum(), slope, rtol=1e-7)


def test_small_scales_and_missing_entries_make_no_nan():
    logits = f32([[1.0, 1, 0, NAN], [-INF, -INF, 3, -INF], [NAN] * 4, [1e4, 0, 0, 0]])
    noise_logits = f32([[-200, -INF, -90, NAN], [0] * 4, [0] * 4, [-80] * 4])
    where: Any = np.ones((4, 4), bool)
    where[0, 3], where[2] = False, False

    @jax.jit
    def slopes(v, u):
        def total(v, u):
            found = noisy_top_k_gating(KEY, v, u, k=2, where=where)
            return found.load.sum() + found.weights[:, 0].sum(), found.load

        return jax.grad(total, (0, 1), has_aux=True)(v, u)

    gradients, load = jax.device_get(slopes(logits, noise_logits))
    for gradient in gradients:
        assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(load[:3], [[1, 1, 0, 0], [0, 0, 1, 0], [0] * 4])


def test_nan_and_infinity_make_their_row_nan_and_no_other():
    logits, noise_logits = problem()
    logits[0, 1], logits[1, 2] = NAN, INF
    noise_logits[2, 0], noise_logits[3, 4] = INF, NAN
    for key in (KEY, None):
        found = draw(key, logits, noise_logits, 2)
        bad = [True] * 4 + [False] * 2
        assert np.isnan(found.load).all(-1).tolist() == bad
        assert np.isnan(found.weights).all(-1).tolist() == bad
        assert np.isfinite(found.load[4:]).all()


def test_any_axis_and_empty_batches():
    logits, noise_logits = problem()
    found = draw(KEY, logits, noise_logits, 2, axis=0)
    assert found.weights.shape == found.indices.shape == (2, 5)
    assert found.load.shape == (6, 5)
    noise = normal(KEY, (6, 5))
    indices, load = brute_force(
        noise.T, logits.T, noise_logits.T, 2, np.ones((5, 6), bool), 0
    )
    np.testing.assert_array_equal(found.indices, indices.T)
    assert_close(found.load, load.T, dtype=found.load.dtype, length=6)
    empty = draw(KEY, *np.zeros((2, 0, 3), np.float32), 3)
    assert empty.load.shape == (0, 3)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("noise_logits", "k", "options", "error", "message"),
    [
        (jnp.zeros(4), 1, {}, ValueError, r"`noise_logits` must have shape \(3,\)"),
        (jnp.zeros(3, int), 1, {}, TypeError, "`noise_logits` must have a floating"),
        (jnp.zeros(3), 4, {}, ValueError, "at most the size of `axis`, 3, got 4"),
        (
            jnp.zeros(3),
            1,
            {"noise_floor": -1.0},
            ValueError,
            "`noise_floor` must be >=",
        ),
    ],
)
def test_errors(noise_logits, k, options, error, message):
    with pytest.raises(error, match=f"noisy_top_k_gating: .*{message}"):
        noisy_top_k_gating(KEY, jnp.zeros(3), noise_logits, k=k, **options)
