"""Fourier densities: bins, logarithms, distribution functions, draws, roughness."""

import functools
import pathlib

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from softlib.nn import FourierDensity
from softlib.testing import assert_close, check_transformations
from tests import operations
from tests.compiled import method, metrics
from tests.host import jnp
from tests.oracles import fourier_density as oracle

LOGITS, CROSS_ENTROPY, LOG_PROB, CDF, PENALTY = (
    method(FourierDensity, name)
    for name in ("logits", "cross_entropy", "log_prob", "cdf", "smoothness_penalty")
)
DATA = pathlib.Path(__file__).parent.parent / "data"


def draw(rows=3, frequencies=4, dtype="float32", seed=0):
    random = np.random.default_rng(seed)
    return jnp.asarray(random.normal(size=(rows, 2 * (frequencies + 1))), dtype)


def densities(a, x):
    """One row per row of coefficients."""
    return jnp.exp(LOG_PROB(a[:, None], x))


# ----------------------------------------------------------------------------- oracles
def test_matches_independent_vectors():
    with jax.enable_x64():
        data = np.load(DATA / "fourier_head_case0.npz")
        a, labels = jnp.asarray(data["in_params"]), jnp.asarray(data["in_labels"])
        bins, x = int(data["in_num_bins"]), jnp.asarray(data["in_x"])
        close = functools.partial(assert_close, dtype="float64", length=30)
        close(densities(a, x), data["out_density"])
        close(LOGITS(a, bins), data["out_logits"])
        raw = PENALTY(a, normalize=False)
        close(raw, data["out_penalty_raw"])
        close(PENALTY(a), data["out_penalty_normalized"])
        pmf = jax.nn.softmax(LOGITS(a, bins))
        close(metrics.smoothness_metric(pmf), data["out_smoothness"])

        @jax.jit
        def loss(a):
            log_p = jax.nn.log_softmax(LOGITS(a, bins))
            return -jnp.take_along_axis(log_p, labels[:, None], 1).sum()

        # These slopes came from differences.
        wanted = data["out_grad_params_ce"]
        np.testing.assert_allclose(jax.grad(loss)(a), wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("frequencies", "bins"), [(0, 1), (1, 2), (5, 18), (9, 7), (3, 4), (4, 4)]
)
def test_matches_oracle(frequencies, bins, dtype):
    with jax.enable_x64():
        a = draw(3, frequencies, dtype)
        wide = jnp.promote_types(dtype, jnp.float32)
        rows = np.asarray(a, np.float64)
        close = functools.partial(assert_close, dtype=wide, length=2 * frequencies + 2)
        y = oracle.bins(rows, bins)
        logits = LOGITS(a, bins)
        assert logits.dtype == wide
        # A logarithm magnifies what a small probability lost.
        close(jnp.exp(logits), y + 1e-5)
        labels = np.arange(3) % bins
        loss = CROSS_ENTROPY(a, jnp.asarray(labels), num_bins=bins)
        close(jnp.exp(-loss), y[np.arange(3), labels])
        x = np.linspace(-1, 1, 7)
        points = jnp.asarray(x, wide)
        of = lambda f: np.array([[f(row, float(p)) for p in points] for row in rows])
        close(densities(a, points), of(oracle.density))
        close(CDF(a[:, None], points), of(oracle.distribution))
        for normalize in (True, False):
            wanted = [oracle.penalty(row, normalize=normalize) for row in rows]
            found = PENALTY(a, normalize=normalize)
            assert found.dtype == wide
            # Terms grow with the square of the frequency.
            close(found, wanted)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("bins", [1, 2, 3, 8, 17])
def test_smoothness_metric_matches_oracle(bins, dtype):
    with jax.enable_x64():
        p = np.random.default_rng(0).dirichlet(np.ones(bins), 2)
        p = jnp.asarray(p, dtype)
        found = metrics.smoothness_metric(p, max_sigma=9)
        assert found.dtype == jnp.promote_types(dtype, jnp.float32)
        wanted = [oracle.smoothness(row, 9) for row in np.asarray(p, np.float64)]
        assert_close(found, wanted, dtype=found.dtype, length=bins)


# ---------------------------------------------------------------------------- promises
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 7, 30]))
def test_a_density_is_positive_and_integrates_to_one(seed, frequencies):
    with jax.enable_x64():
        a = draw(2, frequencies, "float64", seed)
        x = jnp.linspace(-1, 1, 201)
        f = densities(a, x)
        assert (f >= 0).all()
        # Periodic: the trapezoid rule is exact for fewer waves than points.
        np.testing.assert_allclose(f[:, :-1].sum(1) * 0.01, 1, atol=1e-12)
        cdf = CDF(a[:, None], x)
        assert (jnp.diff(cdf, axis=1) >= -1e-14).all()
        np.testing.assert_allclose(cdf[:, 0], 0, atol=1e-14)
        np.testing.assert_allclose(cdf[:, -1], 1, atol=1e-14)


@pytest.mark.parametrize("frequencies", [1, 3, 6])
def test_squares_do_not_fall_below_zero_where_autocorrelations_do(frequencies):
    """In float32, near a root: all coefficients 1."""
    a = jnp.concatenate([jnp.ones(frequencies + 1), jnp.zeros(frequencies + 1)])
    root = 2 / (frequencies + 1)
    x = jnp.float32(root) + jnp.linspace(-1e-3, 1e-3, 101)
    x = x[x <= 1]
    f = jnp.exp(LOG_PROB(a[None], x))
    assert (f >= 0).all()
    assert f.min() < 1e-6


def test_no_frequencies_are_uniform():
    a = jnp.array([[0.3, -2.0]])
    np.testing.assert_allclose(densities(a, jnp.linspace(-1, 1, 5)), 0.5, rtol=1e-6)
    np.testing.assert_allclose(
        CROSS_ENTROPY(a, jnp.array([3]), num_bins=7), np.log(7), rtol=1e-6
    )
    assert PENALTY(a) == 0
    np.testing.assert_allclose(CDF(a, jnp.array([0.5])), 0.75)


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1e18])
def test_a_common_complex_factor_does_not_matter(size):
    a, x = draw(), jnp.linspace(-1, 1, 9)
    real, imaginary = jnp.split(a, 2, axis=-1)
    c, s = size * np.cos(2.0), size * np.sin(2.0)
    turned = jnp.concatenate([c * real - s * imaginary, s * real + c * imaginary], -1)
    close = functools.partial(assert_close, dtype="float32", length=10)
    close(densities(turned, x), densities(a, x))
    close(LOGITS(turned, 6), LOGITS(a, 6), c=16)
    close(PENALTY(turned), PENALTY(a))
    gradient = jax.grad(lambda a: LOGITS(a, 6)[:, 0].sum())(turned)
    assert np.isfinite(gradient).all()


def test_the_penalty_without_normalization_can_be_shrunk_away():
    a = draw()
    raw = functools.partial(PENALTY, normalize=False)
    np.testing.assert_allclose(raw(0.1 * a), 1e-4 * raw(a), rtol=1e-5)


def test_the_penalty_is_four_times_the_integral_of_the_squared_slope():
    with jax.enable_x64():
        a = draw(1, 5, "float64")[0]
        slope = jax.vmap(jax.grad(lambda x: jnp.exp(LOG_PROB(a, x))))
        x = jnp.linspace(-1, 1, 401)[:-1]
        integral = jnp.square(slope(x)).sum() * 2 / 400
        assert_close(PENALTY(a), 4 * integral, dtype="float64", length=400)


@pytest.mark.parametrize("shift", [0.3, -1.1])
def test_turning_each_coefficient_moves_the_density_around_the_circle(shift):
    a, x = draw(), jnp.linspace(-0.99, 0.99, 12)
    real, imaginary = np.split(np.asarray(a), 2, axis=-1)
    moved = (real + 1j * imaginary) * np.exp(-1j * np.pi * np.arange(5) * shift)
    moved = jnp.asarray(np.concatenate([moved.real, moved.imag], -1), jnp.float32)
    origin = (x - shift + 1) % 2 - 1
    assert_close(densities(moved, x), densities(a, origin), dtype="float32", length=10)


def test_probabilities_of_bins_are_the_density_times_their_width():
    """With fewer frequencies than bins, whose waves then sum to 0."""
    a, bins = draw(3, 6), 7
    centres = -1 + (2 * jnp.arange(bins) + 1) / bins
    y = jnp.exp(LOGITS(a, bins)) - 1e-5
    np.testing.assert_allclose(y.sum(1), 1, rtol=1e-5)
    assert_close(y, densities(a, centres) * 2 / bins, dtype="float32", length=14)


def test_the_floor_spreads_its_share_evenly():
    a, bins, eps = draw(1, 3), 20, 1e-2
    p = jax.nn.softmax(LOGITS(a, bins, epsilon=eps))
    y = oracle.bins(np.float64(a), bins)
    assert_close(p, (y + eps) / (1 + bins * eps), dtype="float32", length=bins)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_values_and_slopes_are_finite_at_roots(dtype):
    """1 + exp(i pi x) is 0 at x = 1; 1 - i exp(i pi x) at -1/2, the middle of a bin."""
    with jax.enable_x64():
        at_end = jnp.asarray([[1.0, 1, 0, 0]], dtype)
        in_bin = jnp.asarray([[1.0, 0, 0, -1]], dtype)  # 2 bins: centres -1/2 and 1/2
        zero = jnp.zeros(1, int)
        for a, run in (
            (at_end, lambda a: LOG_PROB(a, jnp.ones(1, dtype)).sum()),
            (in_bin, lambda a: LOGITS(a, 2).sum()),
            (in_bin, lambda a: CROSS_ENTROPY(a, zero, num_bins=2).sum()),
        ):
            value, gradient = jax.value_and_grad(run)(a)
            assert np.isfinite(value)
            assert np.isfinite(gradient).all()
        p = jnp.exp(LOGITS(in_bin, 2))[0]
        np.testing.assert_allclose(jnp.sort(p), [1e-5, 1 + 1e-5], atol=1e-6)


def test_coefficients_of_zero_are_uniform_without_a_gradient():
    a = jnp.zeros((1, 8))
    logits, gradient = jax.value_and_grad(lambda a: LOGITS(a, 5)[0, 1])(a)
    np.testing.assert_allclose(logits, np.log(0.2 + 1e-5), rtol=1e-6)
    np.testing.assert_array_equal(gradient, 0)


def test_outside_of_the_interval_there_is_nothing():
    a, x = draw(1)[0], jnp.array([-1.5, 1.5, jnp.nan])
    log_f = LOG_PROB(a, x)
    np.testing.assert_array_equal(log_f, [-np.inf, -np.inf, np.nan])
    np.testing.assert_array_equal(CDF(a, x), [0, 1, np.nan])
    slope = jax.grad(lambda a: LOG_PROB(a, x[:1]).sum())(a)
    np.testing.assert_array_equal(slope, 0)


def test_rows_that_do_not_count_and_labels_outside():
    a = draw(4).at[1].set(jnp.nan)
    labels, where = jnp.array([0, -3, 9, -1]), jnp.array([True, False, True, True])

    @jax.jit
    def run(a):
        loss = CROSS_ENTROPY(a, labels, num_bins=9, where=where)
        return loss.sum(), loss

    gradient, loss = jax.grad(run, has_aux=True)(a)
    np.testing.assert_array_equal(np.isnan(loss), [0, 0, 1, 1])
    assert loss[1] == 0
    np.testing.assert_array_equal(gradient[1:], 0)
    assert (gradient[0] != 0).any()


def test_cross_entropy_of_a_row_has_no_array_of_bins():
    loss = lambda a, y: CROSS_ENTROPY(a, y, num_bins=1000)
    text = str(operations.make_jaxpr(loss)(draw(), jnp.zeros(3, int)))
    assert "[3,1000]" not in text
    assert "[3,5]" in text


@pytest.mark.parametrize("frequencies", [1, 8])
def test_draws_have_the_distribution(frequencies):
    """Kolmogorov's distance: above 1.95 / sqrt(n) once in a thousand."""
    a, count = draw(2, frequencies), 20_000
    draws = lambda key, a, shape=None: FourierDensity(a).sample(key, shape)
    sample = jax.jit(draws, static_argnums=2)
    x = sample(jax.random.key(0), a, (count, 2))
    assert (jnp.abs(x) <= 1).all()
    for row in range(2):
        u = np.sort(CDF(a[row][None], x[:, row]))
        empirical = (np.arange(count) + 0.5) / count
        assert np.abs(u - empirical).max() < 1.95 / count**0.5
    other = np.sort(CDF(a[1][None], x[:, 0]))
    assert np.abs(other - empirical).max() > 0.02
    assert sample(jax.random.key(0), a).shape == (2,)
    again = sample(jax.random.key(0), a, (count, 2))
    np.testing.assert_array_equal(x, again)


def test_smoothness_is_zero_for_uniform_with_finite_slopes_and_orders_distributions():
    uniform = jnp.full((1, 50), 0.02)
    assert metrics.smoothness_metric(uniform)[0] < 1e-6
    slope = jax.grad(lambda p: metrics.smoothness_metric(p).sum())(uniform)
    assert np.isfinite(slope).all()
    x = jnp.linspace(-1, 1, 50)
    bell = jnp.exp(-0.5 * (x / 0.2) ** 2)
    bell = bell / bell.sum()
    jagged = bell * (1 + 0.5 * (-1.0) ** jnp.arange(50))
    assert 2 * metrics.smoothness_metric(bell) < metrics.smoothness_metric(jagged)


# --------------------------------------------------------------------------- transforms
@pytest.mark.slow  # plain JAX, without a derivative rule
@pytest.mark.parametrize("name", ["logits", "loss", "density", "cdf", "penalty"])
def test_under_every_transformation(name):
    a, labels = draw(8, 2), jnp.arange(8) % 5
    x, where = jnp.linspace(-0.9, 0.8, 8), jnp.arange(8) != 3
    function, others, rows = {
        "logits": (lambda a: LOGITS(a, 5), (), (0,)),
        "loss": (
            lambda a, y, w: CROSS_ENTROPY(a, y, num_bins=5, where=w),
            (labels, where),
            (0, 1, 2),
        ),
        "density": (LOG_PROB, (x,), (0, 1)),
        "cdf": (CDF, (x,), (0, 1)),
        "penalty": (PENALTY, (), (0,)),
    }[name]
    check_transformations(function, a, *others, rows=rows)


# ------------------------------------------------------------------------------- errors
A = jnp.ones((3, 4))


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: LOGITS(A[:, 1:], 5), ValueError, r"n \+ 1 real.*\(3, 3\)"),
        (lambda: LOGITS(A.astype(int), 5), TypeError, "`coefficients`"),
        (lambda: LOGITS(A, 0), ValueError, "`num_bins` must be at least 1"),
        (lambda: LOGITS(A, 5, epsilon=0), ValueError, "`epsilon` must be"),
        (
            lambda: CROSS_ENTROPY(A, jnp.zeros(3), num_bins=4),
            TypeError,
            "`labels` must have an integer",
        ),
        (
            lambda: CROSS_ENTROPY(A, jnp.zeros(2, int), num_bins=4),
            ValueError,
            "`labels` must have shape",
        ),
        (lambda: LOG_PROB(A, jnp.ones(2)), ValueError, "`x` must broad"),
        (lambda: CDF(A, jnp.ones(3, int)), TypeError, "`x` must have a"),
        (
            lambda: FourierDensity(A).sample(jax.random.key(0), (2,)),
            ValueError,
            r"`shape` must be one to which the rows \(3,\) broadcast, got \(2,\)",
        ),
        (
            lambda: metrics.smoothness_metric(jnp.ones(3), max_sigma=0),
            ValueError,
            "`max_sigma` must be at least 1",
        ),
        (lambda: metrics.smoothness_metric(jnp.ones((3, 0))), ValueError, "one bin"),
    ],
)
def test_wrong_arguments_are_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
