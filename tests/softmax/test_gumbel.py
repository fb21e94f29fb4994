"""Gumbel-softmax: frequencies, limits, hard draws, and the density of the Concrete."""

from typing import Any

import jax
import numpy as np
import pytest
from jax.test_util import check_grads

from softlib import softmax as library
from softlib.testing import assert_close
from tests.compiled import computed, f32
from tests.host import jnp
from tests.oracles import gates as oracle

KEY = jax.random.key(0)
INF, NAN = jnp.inf, jnp.nan
softmax = computed(library.softmax)
gumbel_softmax = computed(library.gumbel_softmax)
straight_through_one_hot = computed(library.straight_through_one_hot)
concrete_log_prob = computed(library.concrete_log_prob)
concrete_score = computed(library.concrete_score)


@computed
def draw(key, logits, temperature=1.0, where=None, hard=False, axis=-1):
    options: Any = {"temperature": temperature, "hard": hard, "where": where}
    return gumbel_softmax(key, logits, axis, **options)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_is_softmax_of_the_perturbed_logits_with_wide_noise(dtype):
    with jax.enable_x64(dtype == "float64"):
        logits = np.random.default_rng(0).normal(size=(5, 4)).astype(jnp.dtype(dtype))
        wide = jnp.promote_types(dtype, jnp.float32)
        noise = computed(jax.random.gumbel)(KEY, (5, 4), wide).astype(float)
        y = draw(KEY, logits, np.asarray(0.7, wide))
        assert y.dtype == dtype
        z = (np.asarray(logits, np.float64) + noise) / 0.7
        expected = np.array([oracle.softmax(row) for row in z])
        assert_close(y, expected, dtype=dtype, length=4)


@pytest.mark.parametrize("temperature", [1e-3, 1.0, 1e7])
def test_largest_entry_is_a_draw_from_softmax_at_any_temperature(temperature):
    logits = f32([1.0, 0.0, -INF, -1.0])
    rows = np.tile(logits, (20_000, 1))
    hard = draw(KEY, rows, temperature, hard=True)
    assert set(np.unique(hard)) == {0, 1}
    np.testing.assert_array_equal(hard.sum(-1), 1)
    np.testing.assert_allclose(hard.mean(0), softmax(logits), atol=0.015)


def test_temperature_sets_how_far_a_draw_is_from_one_hot():
    logits = np.tile(f32([0.0, 1.0, 2.0]), (100, 1))
    high = np.array(1e8, np.float32)
    np.testing.assert_allclose(draw(KEY, logits, high), 1 / 3, rtol=1e-6)
    for tiny in (1e-6, 1e-30, 1e-37):
        y = draw(KEY, logits, np.array(tiny, np.float32))
        np.testing.assert_array_equal(y, draw(KEY, logits, hard=True))
    by_row = draw(KEY, logits, np.linspace(0.1, 1, 100, dtype=np.float32))
    np.testing.assert_allclose(by_row[-1], draw(KEY, logits)[-1], rtol=1e-6)


def test_no_temperature_makes_a_nan():
    logits = f32([[1e4, -1e4, 0.0, -INF], [0.0, 0, 0, 0]])
    slopes = jax.jit(jax.grad(lambda z, t: draw(KEY, z, t)[..., 0].sum(), (0, 1)))
    for temperature in (1e-36, 1e-20, 1e-3, 1e20):
        for gradient in slopes(logits, f32(temperature)):
            assert np.isfinite(gradient).all()
    assert np.isnan(draw(KEY, logits, np.array(-1, np.float32))).all()


def test_hard_draw_has_the_gradient_of_the_soft_one():
    logits = np.asarray(np.random.default_rng(1).normal(size=(3, 4)), np.float32)
    weights = np.arange(4.0, dtype=np.float32)[None]
    where = np.array([True, True, False, True])
    slopes = jax.jit(
        jax.grad(
            lambda z, t, hard: (weights * draw(KEY, z, t, where, hard)).sum(), (0, 1)
        ),
        static_argnums=2,
    )
    of_hard, of_soft = (jax.device_get(slopes(logits, 0.5, h)) for h in (True, False))
    for hard, soft in zip(of_hard, of_soft, strict=True):
        assert_close(hard, soft, dtype="float32", length=4)
    assert not of_hard[0][:, 2].any()
    assert of_hard[0].any()


@pytest.mark.parametrize("hard", [False, True])
def test_rows_and_entries_that_do_not_count(hard):
    x = f32([[NAN, 1.0, 2.0], [-INF] * 3, [NAN] * 3, [NAN, 0, 1], [INF, 0, 1]])
    where = np.array([[False, True, True]] * 2 + [[False] * 3] + [[True] * 3] * 2)
    y = draw(KEY, x, 1.0, where, hard)
    assert y[0, 0] == 0
    assert_close(y[0].sum(), 1, dtype="float32", length=3)
    assert not y[1:3].any()
    assert np.isnan(y[3:]).all()
    slopes = jax.jit(jax.grad(lambda x: draw(KEY, x, 1.0, where[:3], hard)[:, 1].sum()))
    assert np.isfinite(slopes(x[:3])).all()


def test_axis_and_empty_shapes():
    x = np.asarray(np.random.default_rng(2).normal(size=(3, 4)), np.float32)
    for hard in (True, False):
        assert_close(
            draw(KEY, x, axis=0, hard=hard).sum(0), np.ones(4), dtype="f4", length=3
        )
        for shape in ((0, 3), (2, 0)):
            assert gumbel_softmax(KEY, np.zeros(shape, "f4"), hard=hard).shape == shape


def test_straight_through_is_one_hot_forward_and_the_identity_backward():
    probs = f32([[0.1, 0.6, 0.3], [0.4, 0.4, 0.2], [0, 0, 0], [NAN, 0, 1]])
    hot = straight_through_one_hot(probs)
    np.testing.assert_array_equal(hot[:3], [[0, 1, 0], [1, 0, 0], [0, 0, 0]])
    assert np.isnan(hot[3]).all()
    given = straight_through_one_hot(probs[:3], np.array([2, -1, 3]))
    np.testing.assert_array_equal(given[0], [0, 0, 1])
    assert np.isnan(given[1:]).all()
    first = straight_through_one_hot(probs[:3], np.array([0, 1, 2]), axis=0)
    np.testing.assert_array_equal(first, np.eye(3))
    cotangent = np.arange(6.0, dtype=np.float32).reshape(2, 3)
    _, pull = jax.vjp(straight_through_one_hot, probs[:2])
    np.testing.assert_array_equal(pull(cotangent)[0], cotangent)
    assert straight_through_one_hot(np.zeros((2, 0), np.float32)).shape == (2, 0)


# --------------------------------------------------------------------------- density
def simplex_point(seed=3, shape=(3, 4)):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=shape)
    return np.log(softmax(rng.normal(size=shape))), logits


def test_density_is_that_of_the_perturbed_logits():
    with jax.enable_x64(True):
        log_x, logits = simplex_point()
        for temperature in (0.3, 2.0):
            found = concrete_log_prob(log_x, logits, temperature=temperature)
            expected = oracle.concrete_log_prob(log_x, logits, temperature)
            np.testing.assert_allclose(found, expected, atol=1e-6)


def test_density_integrates_to_one():
    x = (np.arange(4000) + 0.5) / 4000
    log_x = f32(np.log(np.stack([x, 1 - x], -1)))
    logits = np.tile(f32([0.5, -0.3]), (4000, 1))
    density = np.exp(
        concrete_log_prob(log_x, logits, temperature=np.array(0.8, np.float32))
    )
    np.testing.assert_allclose(density.mean(), 1, atol=2e-3)


def test_score_is_the_gradient_and_logits_have_no_scale():
    with jax.enable_x64(True):
        log_x, logits = simplex_point()
        logits[1, 2], log_x[1, 2] = -np.inf, np.nan
        tau = np.array([0.5, 1.0, 3.0])
        call = jax.jit(lambda x, z, t: concrete_log_prob(x, z, temperature=t).sum())
        slopes = jax.jit(jax.grad(call, (0, 1)))
        by_x, by_z = jax.device_get(slopes(log_x, logits, tau))
        score = concrete_score(log_x, logits, temperature=tau)
        np.testing.assert_allclose(by_x, score, atol=1e-12)
        assert score[1, 2] == 0
        np.testing.assert_allclose(by_z.sum(-1), 0, atol=1e-12)
        shifted = concrete_log_prob(log_x, logits + 7, temperature=tau)
        np.testing.assert_allclose(
            shifted, concrete_log_prob(log_x, logits, temperature=tau), atol=1e-12
        )
        function = jax.jit(lambda x, z, t: concrete_log_prob(x, z, temperature=t))
        arguments = log_x[::2], logits[::2], tau[::2]
        check_grads(function, arguments, order=2, modes=["rev"], rtol=1e-5)


def test_density_near_a_vertex_and_of_rows_that_lack_entries():
    log_x = f32([[0, -300.0, -400.0], [0.0, -INF, 0], [0.0, 1, 2], [NAN] * 3])
    logits = f32([[1.0, 0, 0], [0.0, 0, 0], [0.0, -INF, -INF], [-INF] * 3])
    density = concrete_log_prob(log_x, logits, temperature=0.5)
    score = concrete_score(log_x, logits, temperature=0.5)
    assert np.isfinite(density[0])
    assert np.isfinite(score[0]).all()
    assert np.isnan(density[1])
    assert np.isnan(score[1]).all()
    np.testing.assert_allclose(density[2:], 0, atol=1e-6)
    np.testing.assert_allclose(score[2:], [[-1, 0, 0], [0, 0, 0]], atol=1e-6)
    assert concrete_log_prob(log_x.T, logits.T, temperature=0.5, axis=0).shape == (4,)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: gumbel_softmax(KEY, jnp.zeros(3, int)),
            TypeError,
            "`logits` must have",
        ),
        (
            lambda: gumbel_softmax(KEY, jnp.zeros(3), temperature=0),
            ValueError,
            "gumbel_softmax: `temperature` must be positive and finite, got 0",
        ),
        (
            lambda: gumbel_softmax(KEY, jnp.zeros(3), temperature=jnp.ones(2)),
            ValueError,
            "`temperature` must broadcast to shape",
        ),
        (
            lambda: straight_through_one_hot(jnp.zeros((2, 3)), jnp.zeros(3, int)),
            ValueError,
            r"`index` must have shape \(2,\)",
        ),
        (
            lambda: concrete_log_prob(jnp.zeros(3), jnp.zeros(2), temperature=1.0),
            ValueError,
            r"`logits` must have shape \(3,\)",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
