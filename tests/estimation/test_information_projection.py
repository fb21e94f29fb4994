"""Maximum likelihood around the information projection: fits, risks, the criterion."""

import pathlib

import jax
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy import special, stats

from tests.compiled import estimation
from tests.host import jnp

CASE = pathlib.Path(__file__).parent.parent / "data" / "mle_pn_criterion_case0.npz"


def poisson(theta):
    return jnp.exp(theta).sum()


def categorical(theta):
    """Of indicators of all classes but the last."""
    return jax.nn.logsumexp(jnp.append(theta, 0.0))


def gaussian(theta):
    """Of x and x^2; without it, the normal law has theta = (mean, -1/2) / variance."""
    return -(theta[0] ** 2) / (4 * theta[1]) - jnp.log(-2 * theta[1]) / 2


def covariances(seed, size=4):
    """Of the data and of the model, positive definite, float64."""
    factors = np.random.default_rng(seed).normal(size=(2, size, 2 * size))
    return factors @ factors.swapaxes(1, 2) / (2 * size)


def test_matches_independent_vectors():
    data = np.load(CASE)
    count, cumulants = int(data["in_n"]), data["in_cumulants"]
    with jax.enable_x64():
        first = estimation.projection_risk(
            data["in_data_cov"], data["in_model_cov"], num_samples=count
        )
        np.testing.assert_allclose(first, data["out_risk_first"], rtol=1e-12)
        second = estimation.second_order_projection_risk
        np.testing.assert_allclose(
            second(cumulants, num_samples=count),
            data["out_risk_second_well_specified"],
            rtol=1e-12,
        )
        moments = np.array([1.3 * cumulants[0], 0.4])
        np.testing.assert_allclose(
            second(cumulants, num_samples=count, data_moments=moments),
            data["out_risk_second_misspecified"],
            rtol=1e-12,
        )
        np.testing.assert_allclose(
            second(np.array([1.0, 2.0, 6.0]), num_samples=count),
            data["out_exponential_second"],
            rtol=1e-12,
        )
        np.testing.assert_allclose(
            estimation.bayes_error_lower_bound(np.array([0.001, 0.02, 0.5, 3.0])),
            data["out_bayes_error_lower"],
            atol=1e-14,
        )
        for error, most in zip((0.45, 0.4), data["out_max_kl"], strict=True):
            risks = most * np.array([1 - 1e-9, 1 + 1e-9])
            accepted = estimation.pn_criterion(risks, bayes_error=error)
            np.testing.assert_array_equal(accepted, [True, False])


@pytest.mark.parametrize(("count", "exact"), [(10, 0.060279), (30, 0.0177235)])
def test_exponential_law_has_the_exact_risk_to_third_order(count, exact):
    """The rate of an exponential law: its risk has a closed form."""
    closed = special.digamma(count) - np.log(count) + 1 / (count - 1)
    np.testing.assert_allclose(closed, exact, rtol=1e-5)
    with jax.enable_x64():
        cumulants = estimation.log_partition_cumulants(
            lambda theta: -jnp.log(-theta), np.array(-1.0)
        )
        found = estimation.second_order_projection_risk(
            cumulants[1:], num_samples=count
        )
    assert 0 < closed - float(found) < 1.2 / count**3
    assert closed - 1 / (2 * count) > 0.9 / count**2


def exact_poisson_risk(count, trials, chance):
    """Of a Poisson fit to a binomial truth, summed over all totals but 0."""
    totals = np.arange(1, count * trials + 1)
    weights = stats.binom.pmf(totals, count * trials, chance)
    mean, fitted = trials * chance, totals / count
    return (weights * (mean * np.log(mean / fitted) - mean + fitted)).sum()


def test_misspecified_risk_is_exact_to_third_order():
    """A Poisson law for binomial counts: every sample mean is enumerated."""
    trials, chance = 4, 0.5
    mean, variance = trials * chance, trials * chance * (1 - chance)
    third = variance * (1 - 2 * chance)
    off_first, off_second = [], []
    with jax.enable_x64():
        cumulants = estimation.log_partition_cumulants(jnp.exp, np.array(np.log(mean)))
        np.testing.assert_allclose(cumulants, mean, rtol=1e-12)
        for count in (25, 50, 100):
            exact = exact_poisson_risk(count, trials, chance)
            first = estimation.projection_risk(
                np.full((1, 1), variance), np.full((1, 1), mean), num_samples=count
            )
            second = estimation.second_order_projection_risk(
                cumulants[1:],
                num_samples=count,
                data_moments=np.array([variance, third]),
            )
            off_first.append(abs(exact - float(first)) * count**2)
            off_second.append(abs(exact - float(second)) * count**3)
    # What is left is of the order that the expansion leaves out, and no more.
    assert np.ptp(off_first) < 0.1 * max(off_first)
    assert np.ptp(off_second) < 0.1 * max(off_second)
    assert max(off_second) < 0.1


def test_cumulants_are_those_of_the_law():
    """Of a weighted sum of indicators of a categorical law, by its moments."""
    theta, direction = np.array([0.4, -1.0, 0.7]), np.array([1.0, -2.0, 0.5])
    probs = special.softmax(np.append(theta, 0))
    values = np.append(direction, 0)
    mean = probs @ values
    moment = lambda k: probs @ (values - mean) ** k
    wanted = [mean, moment(2), moment(3), moment(4) - 3 * moment(2) ** 2]
    with jax.enable_x64():
        found = estimation.log_partition_cumulants(
            categorical, theta, direction=direction
        )
        np.testing.assert_allclose(found, wanted, rtol=1e-10)
        # A scalar has the direction 1; a Bernoulli law.
        found = estimation.log_partition_cumulants(
            jax.nn.softplus, np.array(theta[0]), order=3
        )
        chance = special.expit(theta[0])
        variance = chance * (1 - chance)
        np.testing.assert_allclose(
            found, [chance, variance, variance * (1 - 2 * chance)], rtol=1e-10
        )


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_first_order_is_a_trace(dtype):
    with jax.enable_x64(dtype == "float64"):
        arrays = [jnp.asarray(each, dtype) for each in covariances(1)]
        found = estimation.projection_risk(*arrays, num_samples=7)
        wide = [np.asarray(each, np.float64) for each in arrays]
        wanted = np.trace(np.linalg.inv(wide[1]) @ wide[0]) / 14
        assert found.dtype == (dtype if dtype == "float64" else "float32")
        tolerance = 1e-12 if dtype == "float64" else 1e-5
        np.testing.assert_allclose(found, wanted, rtol=tolerance)


def test_risk_does_not_depend_on_the_parametrisation():
    rng = np.random.default_rng(3)
    data, model = covariances(2)
    change = rng.normal(size=(5, 4, 4))
    with jax.enable_x64():
        both = [change @ each @ change.swapaxes(1, 2) for each in (data, model)]
        found = estimation.projection_risk(*both, num_samples=np.float64(9))
        wanted = estimation.projection_risk(data, model, num_samples=9)
        np.testing.assert_allclose(found, np.full(5, wanted), rtol=1e-8)
        # A truth in the family: one half per parameter and sample.
        own = estimation.projection_risk(both[1], both[1], num_samples=9)
        np.testing.assert_allclose(own, 4 / 18, rtol=1e-9)


def test_derivatives_of_the_risks():
    data, model = covariances(4, 3)
    with jax.enable_x64():
        symmetric = lambda x: (x + x.T) / 2
        risk = jax.jit(
            lambda data, model: estimation.projection_risk(
                data, symmetric(model), num_samples=5
            )
        )
        check_grads(risk, (data, model), 1, rtol=1e-6)
        second = jax.jit(
            lambda cumulants, moments: estimation.second_order_projection_risk(
                cumulants, num_samples=5, data_moments=moments
            )
        )
        check_grads(second, (np.array([1.2, 1.3, 1.1]), np.array([1.5, 0.4])), 1)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_fits_are_those_in_closed_form(dtype):
    rng = np.random.default_rng(0)
    labels = rng.choice(4, size=200, p=[0.1, 0.4, 0.3, 0.2])
    indicators = np.eye(4)[labels][:, :3].astype(dtype)
    x = rng.normal(2.0, 1.5, size=200).astype(dtype)
    powers = np.stack([x, x**2], axis=1)
    tolerance = 1e-8 if dtype == "float64" else 3e-4
    with jax.enable_x64(dtype == "float64"):
        fit = estimation.fit_exponential_family(indicators, categorical)
        shares = np.bincount(labels) / 200
        np.testing.assert_allclose(
            fit.coefficients, np.log(shares[:3] / shares[3]), rtol=tolerance
        )
        assert fit.converged
        assert fit.coefficients.dtype == dtype
        # The model's covariance of indicators is that of the data: one half each.
        np.testing.assert_allclose(fit.risk, 3 / 400 * (200 / 199), rtol=tolerance)
        np.testing.assert_allclose(
            fit.bayes_error, (1 - np.sqrt(fit.risk / 2)) / 2, rtol=tolerance
        )
        normal = estimation.fit_exponential_family(
            powers, gaussian, initial=np.array([0.0, -0.5], dtype)
        )
        variance = x.var()
        np.testing.assert_allclose(
            normal.coefficients, [x.mean() / variance, -0.5 / variance], rtol=tolerance
        )


def test_risk_of_a_fit_is_near_the_mean_divergence():
    """Poisson fits to counts that vary more, 2,000 times; the projection is known."""
    rng = np.random.default_rng(5)
    counts = rng.negative_binomial(3, 0.5, size=(2000, 40, 1)).astype(np.float32)
    fits = jax.jit(jax.vmap(lambda x: estimation.fit_exponential_family(x, poisson)))(
        counts
    )
    assert fits.converged.all()
    fitted = np.exp(fits.coefficients[:, 0])
    np.testing.assert_allclose(fitted, counts.mean((1, 2)), rtol=1e-4)
    divergences = 3 * np.log(3 / fitted) - 3 + fitted
    error = 4 * divergences.std() / 2000**0.5
    # Twice what a law of the family would have: the variance is twice the mean.
    assert abs(divergences.mean() - fits.risk.mean()) < error + 0.05 / 40
    assert abs(divergences.mean() - 2 / 80) < error + 0.05 / 40


def test_forward_derivative_of_a_fit():
    counts = np.array([[1.0], [3.0], [2.0], [2.0]])
    with jax.enable_x64():
        mean = lambda x: jnp.exp(
            estimation.fit_exponential_family(x, poisson).coefficients[0]
        )
        slope = jax.jacfwd(mean)(jnp.asarray(counts))
    np.testing.assert_allclose(slope, np.full((4, 1), 0.25), rtol=1e-5)


def test_bound_holds_for_random_laws():
    """The Bayes error of two laws is computed; the bound is below, both ways."""
    rng = np.random.default_rng(6)
    size = np.geomspace(0.01, 10, 400)[:, None]
    p, q = (special.softmax(size * rng.normal(size=(400, 5)), axis=1) for _ in "pq")
    bayes_error = np.minimum(p, q).sum(1) / 2
    for one, other in ((p, q), (q, p)):
        divergence = special.rel_entr(one, other).sum(1).astype(np.float32)
        bound = estimation.bayes_error_lower_bound(divergence)
        assert (bound <= bayes_error + 1e-6).all()
        assert (bound >= 0).all()
        # It is no trifle: where laws are near, most of the error is guaranteed.
        assert (bound > 0.9 * bayes_error)[divergence < 1e-3].all()


def test_bad_values_give_nan():
    dependent = np.random.default_rng(7).normal(size=(30, 2)).astype(np.float32)
    dependent = np.column_stack([dependent, dependent.sum(1)])
    covariance = np.cov(dependent.T).astype(np.float32)
    assert np.isnan(
        estimation.projection_risk(np.eye(3, dtype="f4"), covariance, num_samples=30)
    )
    # A log-partition that does not depend on one direction.
    flat = lambda theta: (theta[0] + theta[1]) ** 2 / 2
    fit = estimation.fit_exponential_family(dependent[:, :2], flat)
    assert np.isnan(fit.risk)
    assert not fit.converged
    assert np.isnan(fit.bayes_error)
    spoiled = np.array([[1], [2], [np.nan], [0], [1]], np.float32)
    fit = estimation.fit_exponential_family(spoiled, poisson)
    assert np.isnan(fit.coefficients).all()
    assert np.isnan(fit.risk)
    assert np.isnan(
        estimation.second_order_projection_risk(np.zeros(3, "f4"), num_samples=3)
    )
    risks = np.array([np.nan, np.inf, 0.0], np.float32)
    np.testing.assert_array_equal(estimation.pn_criterion(risks), [False, False, True])
    np.testing.assert_array_equal(
        estimation.bayes_error_lower_bound(np.array([-1.0, np.inf, 0.0], "f4")),
        [np.nan, 0, 0.5],
    )


def test_no_finite_maximum_is_not_hidden():
    """All counts are 0: the mean of the best Poisson law would be."""
    fit = estimation.fit_exponential_family(np.zeros((5, 1), np.float32), poisson)
    assert fit.coefficients[0] < -5
    assert fit.risk == 0


@pytest.mark.usefixtures("untyped")
def test_errors():
    eye, ones = jnp.eye(2), jnp.ones((4, 2))
    with pytest.raises(TypeError, match="projection_risk: `data_covariance` must have"):
        estimation.projection_risk(jnp.eye(2, dtype=int), eye, num_samples=3)
    with pytest.raises(ValueError, match="`model_covariance` must have shape"):
        estimation.projection_risk(eye, ones, num_samples=3)
    with pytest.raises(ValueError, match="`data_covariance` must have shape"):
        estimation.projection_risk(jnp.eye(3), eye, num_samples=3)
    with pytest.raises(ValueError, match="`num_samples` must be >= 1, got 0"):
        estimation.projection_risk(eye, eye, num_samples=0)
    with pytest.raises(ValueError, match="`model_cumulants` must have shape"):
        estimation.second_order_projection_risk(jnp.ones(4), num_samples=3)
    with pytest.raises(ValueError, match="`data_moments` must have shape"):
        estimation.second_order_projection_risk(
            jnp.ones(3), num_samples=3, data_moments=jnp.ones(3)
        )
    with pytest.raises(ValueError, match="at least 2 rows, got 1"):
        estimation.fit_exponential_family(ones[:1], poisson)
    with pytest.raises(ValueError, match="`statistics` must have shape"):
        estimation.fit_exponential_family(jnp.ones((2, 4, 2)), poisson)
    with pytest.raises(ValueError, match="`log_partition` must give a scalar"):
        estimation.fit_exponential_family(ones, jnp.exp)
    with pytest.raises(ValueError, match="`initial` must have shape"):
        estimation.fit_exponential_family(ones, poisson, initial=jnp.ones(3))
    with pytest.raises(ValueError, match="`order` must be at least 1, got 0"):
        estimation.log_partition_cumulants(poisson, jnp.ones(2), order=0)
    with pytest.raises(ValueError, match="`direction` must have shape"):
        estimation.log_partition_cumulants(poisson, eye, direction=jnp.ones(2))
    with pytest.raises(ValueError, match=r"`bayes_error` must be in \[0, 0.5\]"):
        estimation.pn_criterion(jnp.ones(2), bayes_error=0.6)
