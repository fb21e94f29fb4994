"""Multi-class logistic regression: the optimum, its certificates, and what has none."""

import jax
import numpy as np
import pytest
from scipy import optimize, special

from softlib.estimation import fit_logistic_regression
from tests.host import jnp

fits = jax.jit(
    fit_logistic_regression, static_argnames=("num_classes", "max_steps", "tolerance")
)


def problem(seed, count=80, classes=4, features=3):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, features))
    scores = x @ rng.normal(size=(features, classes)) + rng.gumbel(
        size=(count, classes)
    )
    return x, scores.argmax(1)


def cost(flat, x, labels, classes, l2):
    weight, bias = np.split(flat, [classes * x.shape[1]])
    weight = weight.reshape(classes, -1)
    z = x @ weight.T + bias
    loss = (special.logsumexp(z, axis=1) - z[np.arange(len(x)), labels]).mean()
    return loss + l2 / 2 * (weight**2).sum()


def minimum(x, labels, classes, l2):
    """By a quasi-Newton method of SciPy, in redundant coordinates."""
    start = np.zeros(classes * (x.shape[1] + 1))
    found = optimize.minimize(
        cost, start, (x, labels, classes, l2), method="BFGS", options={"gtol": 1e-8}
    )
    weight, bias = np.split(found.x, [classes * x.shape[1]])
    weight = weight.reshape(classes, -1)
    return weight - weight.mean(0), bias - bias.mean(), found.fun


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_is_the_minimum_that_scipy_finds(dtype):
    x, labels = problem(0)
    loose = 1e-4 if dtype == "float64" else 2e-3  # as near as SciPy's differences come
    with jax.enable_x64(dtype == "float64"):
        for l2 in (0.05, 0.0):
            weight, bias, value = minimum(x, labels, 4, l2)
            fit = fits(x.astype(dtype), labels, num_classes=4, l2=l2)
            assert fit.weight.dtype == dtype
            assert fit.converged
            np.testing.assert_allclose(fit.weight, weight, atol=loose)
            np.testing.assert_allclose(fit.bias, bias, atol=loose)
            np.testing.assert_allclose(fit.loss, value, rtol=1e-6)
            # No worse than what SciPy found.
            flat = np.concatenate([np.ravel(fit.weight), fit.bias]).astype(float)
            assert cost(flat, x, labels, 4, l2) <= value + 1e-6
            np.testing.assert_allclose(fit.weight.sum(0), 0, atol=1e-5)


def test_random_optima_keep_what_optima_must():
    """Mean probabilities are the shares of the classes; the penalty bounds weights."""
    with jax.enable_x64():
        for seed in range(6):
            x, labels = problem(seed, 40)
            l2 = 10.0 ** -(seed % 3)
            fit = fits(x, labels, num_classes=4, l2=l2)
            assert fit.converged
            probs = special.softmax(x @ fit.weight.T + fit.bias[None], axis=1)
            shares = np.bincount(labels, minlength=4) / 40
            np.testing.assert_allclose(probs.mean(0), shares, atol=1e-9)
            assert fit.loss <= np.log(4)
            assert l2 / 2 * (fit.weight**2).sum() <= fit.loss
            residual = probs - np.eye(4)[labels]
            slope = residual.T @ x / 40 + l2 * fit.weight
            np.testing.assert_allclose(slope, 0, atol=1e-9)


def test_units_and_origin_of_features_do_not_matter_without_a_penalty():
    x, labels = problem(1)
    with jax.enable_x64():
        fit = fits(x, labels, num_classes=4)
        scale, shift = np.array([1e6, 1e-4, 3.0]), np.array([5e6, 1.0, -300.0])
        other = fits(x * scale + shift, labels, num_classes=4)
        assert other.converged
        np.testing.assert_allclose(other.loss, fit.loss, rtol=1e-10)
        np.testing.assert_allclose(other.weight * scale[None], fit.weight, rtol=1e-5)


def test_two_classes_are_the_usual_logistic_regression():
    x, labels = problem(2, classes=2)

    def usual(w):
        margins = (2 * labels - 1) * (x @ w[:-1] + w[-1])
        return np.logaddexp(0, -margins).mean() + 0.1 / 4 * (w[:-1] ** 2).sum()

    wanted = optimize.minimize(usual, np.zeros(4), options={"gtol": 1e-8})
    with jax.enable_x64():
        fit = fits(x, labels, num_classes=2, l2=0.1)
    np.testing.assert_allclose(fit.loss, wanted.fun, rtol=1e-9)
    np.testing.assert_allclose(fit.weight[1] - fit.weight[0], wanted.x[:3], atol=1e-5)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_problems_without_a_minimum_end_defined(dtype):
    with jax.enable_x64(dtype == "float64"):
        # Separable, and more features than examples.
        x, labels = problem(3, 5, 4, 9)
        fit = fits(x.astype(dtype), labels, num_classes=4)
        assert np.isfinite(fit.weight).all()
        scores = x @ np.asarray(fit.weight, float).T + np.asarray(fit.bias)
        np.testing.assert_array_equal(scores.argmax(1), labels)
        assert fit.loss < 1e-4
        # Two equal columns and a constant one: many minima, with a penalty one.
        x, labels = problem(4)
        x = np.column_stack([x, x[:, :1], np.full(80, 3.0)]).astype(dtype)
        fit = fits(x, labels, num_classes=4)
        np.testing.assert_allclose(
            fit.loss, fits(x[:, :3], labels, num_classes=4).loss, rtol=1e-5
        )
        np.testing.assert_array_equal(fit.weight[:, 4], 0)
        # A class without examples.
        fit = fits(x[:, :3], labels, num_classes=5)
        probs = special.softmax(x[:, :3] @ fit.weight.T + fit.bias[None], axis=1)
        assert probs[:, 4].max() < 1e-3
        assert np.isfinite(fit.bias).all()


def test_examples_that_do_not_count_may_hold_anything():
    x, labels = problem(5, 30)
    where = np.arange(30) % 3 > 0
    with jax.enable_x64():
        wanted = fits(x[where], labels[where], num_classes=4, l2=0.1)
        poisoned = np.where(where[:, None], x, np.nan), np.where(where, labels, -3)
        found = fits(*poisoned, num_classes=4, l2=0.1, where=where)
        np.testing.assert_allclose(found.weight, wanted.weight, rtol=1e-7)
        np.testing.assert_allclose(found.loss, wanted.loss, rtol=1e-12)
        none = fits(*poisoned, num_classes=4, where=np.zeros(30, bool))
        np.testing.assert_array_equal(none.weight, 0)
        np.testing.assert_array_equal(none.bias, 0)
        assert none.loss == 0


def test_a_single_class_and_bad_values():
    x = jnp.ones((3, 2))
    fit = fits(x, jnp.zeros(3, int), num_classes=1)
    np.testing.assert_array_equal(fit.weight, np.zeros((1, 2)))
    assert fit.loss == 0
    assert fit.converged
    for bad in (
        fits(x, jnp.asarray([0, 1, 2]), num_classes=2),
        fits(x.at[0, 0].set(np.nan), jnp.asarray([0, 1, 1]), num_classes=2),
    ):
        assert np.isnan(bad.weight).all()
        assert np.isnan(bad.loss)
        assert not bad.converged


def test_batches_and_forward_mode():
    x, labels = problem(6, 24, 3, 2)
    with jax.enable_x64():
        of = lambda l2: fits(x, labels, num_classes=3, l2=l2, max_steps=60)
        many = jax.vmap(of)(jnp.asarray([0.1, 1.0]))
        for i, l2 in enumerate((0.1, 1.0)):
            np.testing.assert_allclose(many.weight[i], of(l2).weight, atol=1e-9)
        _, slope = jax.jvp(of, (jnp.asarray(0.1),), (jnp.asarray(1.0),))
        wanted = (of(0.1 + 1e-5).weight - of(0.1 - 1e-5).weight) / 2e-5
        np.testing.assert_allclose(slope.weight, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("untyped")
def test_errors():
    x, labels = jnp.ones((4, 2)), jnp.zeros(4, int)
    fit = fit_logistic_regression
    with pytest.raises(TypeError, match="fit_logistic_regression: `x` must have"):
        fit(labels[:, None], labels, num_classes=2)
    with pytest.raises(TypeError, match="`labels` must have an integer"):
        fit(x, x[:, 0], num_classes=2)
    with pytest.raises(ValueError, match=r"`labels` must have shape \(4,\)"):
        fit(x, labels[:2], num_classes=2)
    with pytest.raises(ValueError, match="`num_classes` must be at least 1, got 0"):
        fit(x, labels, num_classes=0)
    with pytest.raises(ValueError, match="`l2` must be >= 0, got -1"):
        fit(x, labels, num_classes=2, l2=-1.0)
    with pytest.raises(ValueError, match="`tolerance` must be positive"):
        fit(x, labels, num_classes=2, tolerance=0.0)
    with pytest.raises(ValueError, match=r"`where` must have shape \(4,\)"):
        fit(x, labels, num_classes=2, where=jnp.ones(3, bool))
