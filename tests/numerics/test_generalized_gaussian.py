"""Generalized Gaussians: SciPy as the oracle, vectors, derivatives, edges, errors."""

import functools
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
import scipy.stats
from jax.test_util import check_grads

import softlib
from softlib.testing import assert_close
from tests.compiled import numerics
from tests.host import jnp

DATA = (
    pathlib.Path(__file__).parent.parent / "data/generalized_gaussian_priors_case0.npz"
)
SHAPES = (0.3, 0.7, 1.0, 2.0, 8.0)


def test_matches_independent_vectors():
    with jax.enable_x64(), np.load(DATA) as data:
        check = functools.partial(assert_close, dtype="float64", length=400)
        x = jnp.asarray(data["in_x"])
        fit = numerics.generalized_gaussian_fit(x)
        check(fit.shape, data["out_shape"], c=16)
        check(fit.scale, data["out_scale"])
        law: Any = {"shape": fit.shape, "scale": fit.scale}
        log_prob = numerics.generalized_gaussian_log_prob(x, **law)
        check(log_prob, data["out_logpdf"])
        check(fit.negative_log_likelihood, -data["out_logpdf"].mean())
        law = {"shape": jnp.asarray(data["in_true_shape"]), "scale": jnp.asarray(0.02)}
        u = jnp.array([0.01, 0.25, 0.5, 0.9])
        check(numerics.generalized_gaussian_quantile(u, **law), data["out_ppf_at"])
        mapped = numerics.reshape_distribution(x, shape=1.0, scale=0.02)
        check(mapped, data["out_shape_map_to_1"])
        rate = functools.partial(
            softlib.losses.generalized_gaussian_rate, shape=fit.shape, epsilon=1e-3
        )
        # The vector is of the sum over the weights; the rate is their mean.
        check(x.size * jax.jit(jax.grad(rate))(x), data["out_rate_grad"])


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_densities_and_quantiles_are_those_of_scipy(dtype):
    tails = [1e-6, 1e-3, 0.1, 0.4999, 0.5, 0.51, 0.8, 0.999]
    with jax.enable_x64(dtype == "float64"):
        u = jnp.asarray(tails, dtype)
        x = jnp.asarray([-3.0, -0.2, 0.0, 1e-3, 1.5], dtype)
        for nu in SHAPES:
            law: Any = {"shape": jnp.float32(nu), "scale": jnp.float32(0.5)}
            exact: Any = scipy.stats.gennorm(float(law["shape"]), scale=0.5)
            found = numerics.generalized_gaussian_log_prob(x, **law)
            assert found.dtype == jnp.promote_types(dtype, jnp.float32)
            wanted = exact.logpdf(np.asarray(x, np.float64))
            assert_close(found, wanted, dtype=found.dtype, length=4)
            found = numerics.generalized_gaussian_quantile(u, **law)
            wanted = exact.ppf(np.asarray(u, np.float64))
            rtol = 1e-11 if dtype == "float64" else 3e-5
            np.testing.assert_allclose(found, wanted, rtol, atol=1e-12)


def test_the_quantile_inverts_the_distribution_of_draws():
    """The share of draws below a quantile is its probability, within four errors."""
    u = jnp.array([0.05, 0.3, 0.9])
    draws = np.asarray(jax.random.generalized_normal(jax.random.key(0), 0.7, (20_000,)))
    found = numerics.generalized_gaussian_quantile(u, shape=0.7, scale=1.0)
    shares = (draws[:, None] <= np.asarray(found)).mean(0)
    errors = np.sqrt(np.asarray(u * (1 - u)) / draws.size)
    assert (np.abs(shares - np.asarray(u)) < 4 * errors).all()


@pytest.mark.parametrize("nu", SHAPES)
def test_the_fit_finds_the_shape_and_the_cost_is_near_the_entropy(nu):
    """Of the quantiles at equal distances, which are better than draws."""
    u = (np.arange(4000) + 0.5) / 4000
    x = scipy.stats.gennorm.ppf(u, nu, scale=3.0)
    fit = numerics.generalized_gaussian_fit(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(fit.shape, nu, rtol=0.04)
    entropy = scipy.stats.gennorm.entropy(float(fit.shape), scale=float(fit.scale))
    np.testing.assert_allclose(fit.entropy, entropy, rtol=1e-5)
    assert abs(float(fit.negative_log_likelihood - fit.entropy)) < 0.03


# ---------------------------------------------------------------------------- promises
def test_the_nearer_end_where_no_shape_fits_and_zeros():
    fit = numerics.generalized_gaussian_fit
    assert fit(jnp.array([1.0, -1.0])).shape == 10
    np.testing.assert_allclose(fit(jnp.eye(1, 200_000)).shape, 0.1, rtol=1e-6)
    none = jnp.asarray(False)
    for found in (fit(jnp.zeros(3)), fit(jnp.ones(3), where=none)):
        np.testing.assert_array_equal(found, [2, 0, -np.inf, -np.inf])
    dirty = jnp.array([0.5, -2.0, jnp.nan, 1.0])
    kept = fit(dirty, where=~jnp.isnan(dirty))
    np.testing.assert_allclose(kept, fit(dirty[jnp.array([0, 1, 3])]), rtol=1e-6)
    large = fit(1e30 * jnp.array([0.5, -2.0, 1.0]))
    np.testing.assert_allclose(large.shape, kept.shape, rtol=1e-5)


def test_quantiles_at_and_beyond_the_ends():
    u = jnp.array([0.0, 1.0, -0.1, 1.1, jnp.nan])
    found = numerics.generalized_gaussian_quantile(u, shape=0.7, scale=1.0)
    np.testing.assert_array_equal(found, [-np.inf, np.inf, np.nan, np.nan, np.nan])
    # In the lower tail small probabilities are exact.
    low = numerics.generalized_gaussian_quantile(
        jnp.array([1e-30]), shape=1.0, scale=1.0
    )
    np.testing.assert_allclose(low, np.log(2e-30), rtol=1e-5)


def test_derivatives_are_those_of_differences():
    with jax.enable_x64():
        x, nu, a = jnp.array([-0.7, 0.2, 1.3]), jnp.asarray(0.8), jnp.asarray(0.6)

        def run(x: Any, nu: Any, a: Any) -> Any:
            law = {"shape": nu, "scale": a}
            u = jax.nn.sigmoid(x)
            return (
                numerics.generalized_gaussian_log_prob(x, **law),
                numerics.generalized_gaussian_quantile(u, **law),
                numerics.generalized_gaussian_fit(x),
            )

        check_grads(jax.jit(run), (x, nu, a), order=1)
        half: Any = jnp.asarray(0.5)
        quantile = lambda u, nu: numerics.generalized_gaussian_quantile(
            u, shape=nu, scale=1.0
        )
        slope, by_shape = jax.jit(jax.grad(quantile, (0, 1)))(half, nu)
        np.testing.assert_allclose(slope, 1 / scipy.stats.gennorm.pdf(0, 0.8))
        assert by_shape == 0


def test_the_map_keeps_the_order_and_lowers_the_entropy():
    """Rounded weights cost fewer bits the smaller their shape, at one variance."""
    x = np.random.default_rng(0).normal(size=3000)
    bits = []
    for nu in (2.0, 1.0, 0.5):
        unit = float(scipy.stats.gennorm.std(nu))
        mapped = numerics.reshape_distribution(
            jnp.asarray(x, jnp.float32), shape=nu, scale=1 / unit
        )
        np.testing.assert_array_equal(np.argsort(mapped), np.argsort(x))
        shares = np.unique(np.round(np.asarray(mapped) / 0.1), return_counts=True)[1]
        bits.append(-(shares / x.size) @ np.log2(shares / x.size))
    assert bits[0] > bits[1] + 0.05
    assert bits[1] > bits[2] + 0.3
    half = numerics.reshape_distribution(
        jnp.asarray(x, jnp.float32), shape=1.0, scale=1.0, strength=0.0
    )
    np.testing.assert_allclose(half, x, rtol=1e-6)


def test_weights_are_drawn_with_the_variance_and_the_shape():
    for mode, fan in (("fan_in", 300), ("fan_out", 100), ("fan_avg", 200)):
        init = softlib.nn.generalized_gaussian_init(shape=0.8, scale=2.0, mode=mode)
        kernel = init(jax.random.key(0), (3, 100, 100 // 3), jnp.bfloat16)
        assert kernel.dtype == jnp.bfloat16
        if mode == "fan_in":
            fit = numerics.generalized_gaussian_fit(kernel)
            np.testing.assert_allclose(fit.shape, 0.8, atol=0.06)
            variance = float((kernel.astype(jnp.float32) ** 2).mean())
            np.testing.assert_allclose(variance * fan, 2.0, rtol=0.1)
    with pytest.raises(ValueError, match=r"at least 2 dimensions, got \(3,\)"):
        softlib.nn.generalized_gaussian_init()(jax.random.key(0), (3,), jnp.float32)


def test_the_rate_of_a_tree_and_of_zeros():
    rate = softlib.losses.generalized_gaussian_rate
    tree = {"a": jnp.array([0.25, 0.0]), "b": jnp.array([[1.0]], jnp.bfloat16)}
    value, slope = jax.value_and_grad(
        lambda t: rate(t, shape=0.5, epsilon=jnp.float32(0.0))
    )(tree)
    np.testing.assert_allclose(value, 0.5)
    np.testing.assert_allclose(slope["a"], [1 / 3, 0], rtol=1e-6)
    assert rate({}, shape=1.0) == 0


@pytest.mark.usefixtures("untyped")
def test_errors_name_the_argument():
    x = jnp.ones(2)
    with pytest.raises(
        ValueError, match=r"^generalized_gaussian_quantile: `shape` must"
    ):
        numerics.generalized_gaussian_quantile(x, shape=0.0, scale=1.0)
    with pytest.raises(TypeError, match=r"^generalized_gaussian_fit: `x` must have"):
        numerics.generalized_gaussian_fit(jnp.ones(2, int))
    with pytest.raises(ValueError, match=r"`strength` must be in \[0, 1\], got 2"):
        numerics.reshape_distribution(x, shape=1.0, scale=1.0, strength=2.0)
    with pytest.raises(TypeError, match=r"^generalized_gaussian_rate: `params` must"):
        softlib.losses.generalized_gaussian_rate([jnp.ones(2, int)], shape=1.0)
    init: Any = softlib.nn.generalized_gaussian_init
    with pytest.raises(ValueError, match=r"^generalized_gaussian_init: `mode` must be"):
        init(mode="fan")
