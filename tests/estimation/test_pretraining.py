"""Factor models and mixtures of unlabelled data: estimates, and what they are worth."""

import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from scipy import special, stats

from softlib import losses
from softlib.estimation import (
    FactorModel,
    GaussianMixture,
    factor_features,
    fit_factor_model,
    gaussian_mixture_log_joint,
    gaussian_mixture_step,
)
from softlib.testing import check_transformations
from tests.compiled import estimation
from tests.host import jnp

DATA = pathlib.Path(__file__).parent.parent / "data"
CASE = DATA / "unsupervised_pretraining_case0.npz"
made: Any = GaussianMixture  # of arrays of NumPy, too


def mixture(seed, components=3, features=4):
    rng = np.random.default_rng(seed)
    return made(
        np.log(rng.dirichlet(np.ones(components))),
        rng.normal(size=(components, features)),
        rng.uniform(0.5, 2, size=components),
    )


def log_joint(x, m):
    """By SciPy, component by component."""
    parts = [
        logw + stats.norm.logpdf(x, mean, np.sqrt(var)).sum(-1)
        for logw, mean, var in zip(*m, strict=True)
    ]
    return np.stack(parts, -1)


def test_factor_model_matches_independent_vectors():
    data = np.load(CASE)
    with jax.enable_x64():
        model = estimation.fit_factor_model(data["in_x"], int(data["in_rank"]))
        np.testing.assert_allclose(model.mean, data["out_mean"], rtol=1e-12)
        outer = np.asarray(model.loading @ model.loading.T)
        np.testing.assert_allclose(outer, data["out_loading_outer"], atol=1e-12)
        np.testing.assert_allclose(model.noise, data["out_noise"], rtol=1e-11)
        np.testing.assert_allclose(model.log_likelihood, data["out_loglik"], rtol=1e-11)
        features = np.asarray(estimation.factor_features(model, data["in_x"][:8]))
        np.testing.assert_allclose(
            features @ features.T, data["out_posterior_gram"], rtol=1e-10
        )


def test_mixture_and_contrastive_match_independent_vectors():
    data = np.load(CASE)
    with jax.enable_x64():
        start = made(np.full(3, -np.log(3)), data["in_gmm_mu"], data["in_gmm_var"])
        step = estimation.gaussian_mixture_step(data["in_x"], start)
        np.testing.assert_allclose(
            step.log_likelihood.mean(), data["out_gmm_loglik"], rtol=1e-12
        )
        found = step.mixture
        np.testing.assert_allclose(found.log_weight, data["out_gmm_logpi"], rtol=1e-11)
        np.testing.assert_allclose(found.mean, data["out_gmm_mu"], atol=1e-12)
        np.testing.assert_allclose(found.variance, data["out_gmm_var"], rtol=1e-11)
        rows, columns = (jnp.asarray(data[f"in_z{side}"]) for side in "ab")
        loss = losses.info_nce_loss(
            rows, columns, temperature=jnp.asarray(data["in_tau"])
        )
        np.testing.assert_allclose(loss.row, data["out_info_nce"], rtol=1e-12)


def density(x, mean, loading, noise):
    covariance = loading @ loading.T + noise * np.eye(len(mean))
    return stats.multivariate_normal.logpdf(x, mean, covariance).mean()


def test_no_other_factor_model_is_likelier():
    rng = np.random.default_rng(0)
    fit = jax.jit(fit_factor_model, static_argnums=1)
    with jax.enable_x64():
        for rank in (1, 2, 4):
            x = rng.normal(size=(30, 5)) @ rng.normal(size=(5, 5)) + 3
            model = fit(jnp.asarray(x), rank)
            best = density(x, *map(np.asarray, model[:3]))
            np.testing.assert_allclose(model.log_likelihood, best, rtol=1e-10)
            for size in (1e-3, 0.1, 1.0):
                mean, loading = (
                    each + size * rng.normal(size=np.shape(each)) for each in model[:2]
                )
                noise = model.noise * np.exp(size * rng.normal())
                assert density(x, mean, loading, noise) < best
            # Any rotation of the factors is the same model.
            turned = np.linalg.qr(rng.normal(size=(rank, rank)))[0]
            other = model._replace(loading=model.loading @ turned)
            np.testing.assert_allclose(
                estimation.factor_features(other, x),
                np.asarray(estimation.factor_features(model, x)) @ turned,
                atol=1e-10,
            )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_narrow_samples_are_summed_in_float32(dtype):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(9, 4)) + 2, dtype)
    model = estimation.fit_factor_model(x, 2)
    with jax.enable_x64():
        wide = estimation.fit_factor_model(np.asarray(x, np.float64), 2)
    for own, other in zip(model, wide, strict=True):
        assert own.dtype == jnp.float32
        np.testing.assert_allclose(abs(own), abs(other), atol=2e-5)


def test_examples_that_do_not_count_may_hold_anything():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(12, 4))
    where = np.arange(12) % 3 > 0
    poisoned = np.where(where[:, None], x, np.nan)
    with jax.enable_x64():
        model = estimation.fit_factor_model(poisoned, 2, where=where)
        wanted = estimation.fit_factor_model(x[where], 2)
        np.testing.assert_allclose(abs(model.loading), abs(wanted.loading), atol=1e-12)
        np.testing.assert_allclose(model.log_likelihood, wanted.log_likelihood)
        step = estimation.gaussian_mixture_step(poisoned, mixture(3), where=where)
        wanted = estimation.gaussian_mixture_step(x[where], mixture(3))
        for own, other in zip(step.mixture, wanted.mixture, strict=True):
            np.testing.assert_allclose(own, other, rtol=1e-10)
        np.testing.assert_array_equal(step.log_likelihood[~where], 0)
        # No example at all.
        none = np.zeros(12, bool)
        model = estimation.fit_factor_model(poisoned, 2, where=none)
        np.testing.assert_array_equal(model.loading, 0)
        np.testing.assert_array_equal(estimation.factor_features(model, x), 0)
        step = estimation.gaussian_mixture_step(poisoned, mixture(3), where=none)
        for own, other in zip(step.mixture, mixture(3), strict=True):
            np.testing.assert_allclose(own, other, rtol=1e-12)


def test_log_joint_oracle():
    x = np.random.default_rng(4).normal(size=(2, 5, 4))
    with jax.enable_x64():
        found = estimation.gaussian_mixture_log_joint(x, mixture(4))
        np.testing.assert_allclose(found, log_joint(x, mixture(4)), rtol=1e-12)
    # Far from 0 no digit is lost to squares that cancel.
    far = mixture(4)._replace(mean=(mixture(4).mean + 3000).astype("f4"))
    x = (x + 3000).astype("f4")
    far = made(*(np.asarray(each, "f4") for each in far))
    found = estimation.gaussian_mixture_log_joint(x, far)
    wide = made(*(np.asarray(each, float) for each in far))
    np.testing.assert_allclose(found, log_joint(x.astype(float), wide), rtol=1e-5)


def test_no_step_lowers_the_likelihood():
    """Random starts, a component that is empty and variances at the bound too."""
    rng = np.random.default_rng(5)
    with jax.enable_x64():
        for seed in range(8):
            x = rng.normal(size=(20, 4)) * rng.uniform(0.1, 3, size=(20, 1))
            start = mixture(seed)
            if seed % 2:
                start.mean[2] = 1e4
            fit = estimation.fit_gaussian_mixture(
                x, start, min_variance=0.3, max_steps=30, tolerance=1e-9
            )
            assert (np.diff(fit.history) >= -1e-12).all()
            wanted = special.logsumexp(log_joint(x, fit.mixture), axis=-1).mean()
            np.testing.assert_allclose(fit.log_likelihood, wanted, rtol=1e-10)
            assert (fit.mixture.variance >= 0.3).all()
            np.testing.assert_allclose(np.exp(fit.mixture.log_weight).sum(), 1)
            if seed % 2:
                assert fit.mixture.log_weight[2] == -np.inf
                np.testing.assert_array_equal(fit.mixture.mean[2], start.mean[2])


def test_a_bad_example_makes_a_fit_nan():
    x = np.random.default_rng(6).normal(size=(20, 4)).astype("f4")
    x[3, 1] = np.nan
    start = made(*(np.asarray(each, "f4") for each in mixture(6)))
    fit = estimation.fit_gaussian_mixture(x, start)
    assert np.isnan(fit.mixture.mean).all()
    assert not fit.converged


def test_transformations():
    rng = np.random.default_rng(7)
    x = rng.normal(size=(8, 3)).astype("f4")
    loading = rng.normal(size=(3, 2)).astype("f4")

    def features(x, mean, loading, noise):
        model = FactorModel(mean, loading, noise, noise)
        start = GaussianMixture(noise * mean[:2], loading.T, jnp.exp(mean[:2]))
        both = factor_features(model, x), gaussian_mixture_log_joint(x, start)
        return jnp.concatenate(both, -1)

    check_transformations(
        features, x, x[0], loading, jnp.float32(0.7), skip={}, rows=(0,)
    )


def test_features_of_unlabelled_data_halve_the_error_of_few_labels():
    """The setting of the sheet: 60 features of 4 factors, 5000 examples, 25 labels."""
    errors = np.array([few_labels(seed) for seed in range(20)])
    pretrained, ridge, least_norm = errors.mean(0)
    assert pretrained < 0.8 * ridge < 0.8 * 1.3 * least_norm
    np.testing.assert_allclose(
        [pretrained, ridge, least_norm], [0.026, 0.042, 0.050], rtol=0.3
    )
    assert (errors[:, 0] < errors[:, 1]).sum() >= 15


def few_labels(seed):
    """Test errors over the variance: pretrained, the best ridge, the least norm."""
    rng = np.random.default_rng(seed)
    loading = rng.normal(size=(60, 4))
    truth = rng.normal(size=4)

    def draw(count):
        h = rng.normal(size=(count, 4))
        x = h @ loading.T + rng.normal(size=(count, 60))
        return x.astype("f4"), h @ truth + 0.1 * rng.normal(size=count)

    (hidden, _), (x, y), (new, goal) = draw(5000), draw(25), draw(2000)
    model = estimation.fit_factor_model(hidden, 4)
    of = lambda x: np.asarray(estimation.factor_features(model, x), float)
    weight = np.linalg.lstsq(of(x), y, rcond=None)[0]
    error = lambda said: ((said - goal) ** 2).mean() / goal.var()
    ridges = [
        error(new @ np.linalg.solve(x.T @ x + l2 * np.eye(60), x.T @ y))
        for l2 in 10.0 ** np.arange(-3, 4)
    ]
    plain = np.linalg.lstsq(x.astype(float), y, rcond=None)[0]
    return error(of(new) @ weight), min(ridges), error(new @ plain)


@pytest.mark.usefixtures("untyped")
def test_errors():
    x = jnp.ones((4, 3))
    with pytest.raises(TypeError, match="fit_factor_model: `x` must have a floating"):
        fit_factor_model(x.astype(int), 1)
    with pytest.raises(ValueError, match="`rank` must be finite and below 3, got 3"):
        fit_factor_model(x, 3)
    with pytest.raises(ValueError, match="at least rank \\+ 2 = 4 rows, got 3"):
        fit_factor_model(x[:3], 2)
    model = fit_factor_model(x, 1)
    with pytest.raises(ValueError, match=r"`x` must have shape \(4, 3\)"):
        factor_features(model, x[:, :2])
    start = GaussianMixture(jnp.zeros(2), jnp.ones((2, 3)), jnp.ones(2))
    with pytest.raises(TypeError, match="`mixture` must be a GaussianMixture"):
        gaussian_mixture_step(x, tuple(start))  # pyrefly: ignore[bad-argument-type]
    with pytest.raises(ValueError, match=r"`mixture.mean` must have shape \(2, 2\)"):
        gaussian_mixture_log_joint(x[:, :2], start)
    with pytest.raises(ValueError, match=r"`mixture.variance` must have shape \(2,\)"):
        gaussian_mixture_step(x, start._replace(variance=jnp.ones(3)))
    with pytest.raises(ValueError, match="`min_variance` must be positive"):
        gaussian_mixture_step(x, start, min_variance=0.0)
