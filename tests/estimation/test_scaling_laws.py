"""Lines through logarithms: their numbers, intervals and what is left out."""

import pathlib

import jax
import numpy as np
import pytest
import scipy.stats

from softlib.estimation import fit_log_linear, fit_power_law
from tests.host import jnp

DATA = pathlib.Path(__file__).parent.parent / "data"
RNG = np.random.default_rng(0)


def by_normal_equations(x, y, level):
    """Slopes, intercept and their Student intervals, of logarithms (n, k)."""
    design = np.concatenate([x, np.ones((len(x), 1))], 1)
    inverse = np.linalg.inv(design.T @ design)
    found = inverse @ design.T @ y
    residual = y - design @ found
    freedom = len(y) - design.shape[1]
    error = np.sqrt(np.diag(inverse) * (residual**2).sum() / freedom)
    far = scipy.stats.t.ppf((1 + level) / 2, freedom) * error
    r_squared = 1 - (residual**2).sum() / ((y - y.mean()) ** 2).sum()
    return found, np.stack([found - far, found + far], 1), r_squared


def test_vectors():
    case = np.load(DATA / "speculative_scaling_laws_case0.npz")
    with jax.enable_x64():
        fit = fit_log_linear(
            jnp.asarray(case["in_tokens"], float), jnp.asarray(case["in_metric"])
        )
        found = fit.slope, fit.intercept, fit.r_squared
        np.testing.assert_allclose(
            found, case["out_fit_slope_intercept_r2"], rtol=1e-10
        )


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize(("points", "columns"), [(20, 1), (4, 1), (3, 1), (40, 3)])
def test_numbers_and_intervals_oracle(dtype, points, columns):
    with jax.enable_x64(dtype == "float64"):
        x = jnp.asarray(10 ** RNG.uniform(1, 6, (points, columns)), dtype)
        y = jnp.asarray(RNG.normal(size=points), dtype)
        given = np.asarray(x, np.float64), np.asarray(y, np.float64)
        level = 0.9 if columns > 1 else 0.95
        fit = jax.jit(lambda x, y: fit_log_linear(x, y, level=level))(x, y)
        found, ends, r_squared = by_normal_equations(
            np.log10(given[0]), given[1], level
        )
        rtol = 1e-9 if dtype == "float64" else 1e-3
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol / 10)
        close(fit.slope, found[:-1])
        close(fit.intercept, found[-1])
        close(fit.slope_interval, ends[:-1])
        close(fit.intercept_interval, ends[-1])
        close(fit.r_squared, r_squared)
        assert fit.slope.dtype == ("float64" if dtype == "float64" else "float32")
        # The same with factors for errors.
        law = jax.jit(fit_power_law)(x, jnp.exp(y))
        given = np.asarray(x, np.float64), np.asarray(jnp.exp(y), np.float64)
        found, ends, _ = by_normal_equations(np.log(given[0]), np.log(given[1]), 0.95)
        close(law.exponent, found[:-1])
        close(law.factor, np.exp(found[-1]))
        close(law.exponent_interval, ends[:-1])
        close(np.log(law.factor_interval), ends[-1])


def test_one_column_may_be_an_axis_less():
    x, y = 10 ** RNG.uniform(1, 6, 9), RNG.normal(size=9)
    flat = fit_log_linear(jnp.asarray(x, "float32"), jnp.asarray(y, "float32"))
    column = fit_log_linear(
        jnp.asarray(x[:, None], "float32"), jnp.asarray(y, "float32")
    )
    assert flat.slope.shape == ()
    assert flat.slope_interval.shape == (2,)
    np.testing.assert_array_equal(flat.slope, column.slope[0])
    np.testing.assert_array_equal(flat.slope_interval, column.slope_interval[0])


def test_points_that_do_not_count_may_hold_anything():
    x = jnp.array([10.0, jnp.nan, 100.0, -1.0, 1e3, 1e5])
    y = jnp.array([1.0, 3.0, 2.5, jnp.inf, 2.9, 5.2])
    where = jnp.array([True, False, True, False, True, True])
    for fit in (fit_log_linear, fit_power_law):
        ours, wanted = fit(x, y, where=where), fit(x[where], y[where])
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ours, wanted
        )
        gradient = jax.grad(lambda x, fit=fit: fit(x, y, where=where)[0])(x)
        assert np.isfinite(gradient).all()
        assert (gradient[~where] == 0).all()


def test_what_the_points_do_not_determine_is_nan():
    one = fit_log_linear(jnp.array([5.0]), jnp.array([1.0]))
    assert all(np.isnan(value).all() for value in one)
    constant = fit_log_linear(jnp.full(6, 7.3), jnp.arange(6.0))
    assert all(np.isnan(value).all() for value in constant)
    twice = jnp.asarray(10 ** RNG.uniform(1, 6, 8), jnp.float32)
    equal = fit_log_linear(jnp.stack([twice, twice], 1), jnp.arange(8.0))
    assert np.isnan(equal.slope).all()
    two = fit_log_linear(jnp.array([10.0, 100.0]), jnp.array([1.0, 3.0]))
    np.testing.assert_allclose([two.slope, two.intercept], [2, -1], atol=1e-5)
    assert np.isnan(two.slope_interval).all()
    negative = fit_log_linear(jnp.array([10.0, -1.0, 20.0]), jnp.ones(3))
    assert np.isnan(negative.slope)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("x", "y", "options", "error", "message"),
    [
        (jnp.ones(3, int), jnp.ones(3), {}, TypeError, "`x` must have a floating"),
        (jnp.ones(3), jnp.ones(2), {}, ValueError, "`y` must have shape"),
        (jnp.ones((3, 1, 1)), jnp.ones(3), {}, ValueError, r"`x` must be \(n,\)"),
        (jnp.ones(3), jnp.ones(3), {"level": 1}, ValueError, "`level` must be in"),
    ],
)
def test_what_cannot_be_is_refused(x, y, options, error, message):
    for fit in (fit_log_linear, fit_power_law):
        with pytest.raises(error, match=f"{fit.__name__}: {message}"):
            fit(x, y, **options)
