"""Cauchy-Schwarz divergences against sums over all pairs, and what they promise."""

import contextlib
import functools
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from softlib import information
from softlib.testing import assert_close, check_transformations
from tests.host import jnp
from tests.oracles import cauchy_schwarz as oracle

DATA = pathlib.Path(__file__).parent.parent / "data"
SIGMA = {"bandwidth_x": 1.3, "bandwidth_y": 0.7, "bandwidth_t": 0.9}
N = 7


def samples(dtype="float32", count=N, seed=0):
    random = np.random.default_rng([seed, count])
    draw = lambda d: random.normal(size=(count, d))
    x = draw(3)
    y = x[:, :1] + 0.3 * draw(1)
    found = {"x": x, "y": y, "y_hat": y + 0.4 * draw(1), "t": x[:, :2] + draw(2)}
    return {name: jnp.asarray(array, dtype) for name, array in found.items()}


def every_number(x, y, y_hat, t, beta=0.3, **options) -> dict[str, Any]:
    """Each public function of (x, y, y_hat, t), by name."""

    def pick(*names: str) -> dict[str, Any]:
        return {f"bandwidth_{n}": SIGMA[f"bandwidth_{n}"] for n in names}

    two = {
        f"{name}_{side}": option
        for name, option in options.items()
        for side in "pq"
        if name in ("weights", "where")
    }
    chunk = {"row_chunk": options.get("row_chunk")}
    mutual = functools.partial(
        information.cauchy_schwarz_mutual_information, x, t, **pick("x", "t"), **options
    )
    return {
        "divergence": information.cauchy_schwarz_divergence(
            y, y_hat, bandwidth=SIGMA["bandwidth_y"], **two, **chunk
        ),
        "information": mutual(),
        "normalized": mutual(normalized=True),
        "conditional": information.conditional_cauchy_schwarz_divergence(
            x, y, y_hat, **pick("x", "y"), **options
        ),
        "symmetric": information.conditional_cauchy_schwarz_divergence(
            x, y, y_hat, symmetric=True, **pick("x", "y"), **options
        ),
        "bottleneck": information.cs_information_bottleneck_loss(
            x, y, y_hat, t, beta=beta, symmetric=False, **SIGMA, **options
        ),
    }


def expected(x, y, y_hat, t, w, beta=0.3):
    sx, sy, st_ = SIGMA["bandwidth_x"], SIGMA["bandwidth_y"], SIGMA["bandwidth_t"]
    conditional = oracle.conditional(x, y, y_hat, sx, sy, w)
    mutual = oracle.information(x, t, sx, st_, w)
    return {
        "divergence": oracle.divergence(y, y_hat, sy, w, w),
        "information": mutual,
        "normalized": oracle.normalized_information(x, t, sx, st_, w),
        "conditional": conditional,
        "symmetric": oracle.conditional(x, y, y_hat, sx, sy, w, symmetric=True),
        "bottleneck": conditional + beta * mutual,
    }


NUMBERS = (
    "divergence",
    "information",
    "normalized",
    "conditional",
    "symmetric",
    "bottleneck",
)
run = jax.jit(every_number)


def bottleneck(arrays, **options):
    """What is differentiated most: it has all parts but the marginal divergence."""
    return information.cs_information_bottleneck_loss(
        **arrays, beta=0.3, normalized=True, **SIGMA, **options
    )


differentiated = jax.jit(jax.value_and_grad(bottleneck), static_argnames=("row_chunk",))


# ----------------------------------------------------------------------------- oracles
@pytest.mark.parametrize(
    ("dtype", "weighted"),
    [
        ("float64", True),
        ("float32", False),
        ("bfloat16", True),
        pytest.param("float64", False, marks=pytest.mark.slow),
        pytest.param("float32", True, marks=pytest.mark.slow),
        pytest.param("float16", True, marks=pytest.mark.slow),
    ],
)
def test_matches_sums_over_all_pairs(dtype, weighted):
    with jax.enable_x64() if dtype == "float64" else contextlib.nullcontext():
        given = samples(dtype)
        options: dict[str, Any] = {}
        if weighted:
            options["weights"] = jnp.linspace(0.0, 2.0, N, dtype=dtype)
            options["where"] = jnp.arange(N) != 3
        w = oracle.normalised(N, **options)
        wanted = expected(**{n: np.float64(a) for n, a in given.items()}, w=w)
        found = run(**given, **options)
        for name in NUMBERS:
            computed = jnp.promote_types(dtype, jnp.float32)
            assert found[name].dtype == computed
            assert found[name].shape == ()
            assert_close(found[name], wanted[name], dtype=computed, length=N**2)


@pytest.mark.parametrize(
    "row_chunk", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, N, 50))]
)
def test_chunks_of_rows_change_nothing(row_chunk):
    given = samples()
    whole, parts = differentiated(given), differentiated(given, row_chunk=row_chunk)
    for one, two in zip(*map(jax.tree.leaves, (whole, parts)), strict=True):
        assert_close(one, two, dtype=jnp.float32, length=N**2)


def test_chunks_of_rows_hold_no_kernel_matrix():
    n = 2048
    shapes = [jax.ShapeDtypeStruct((n, d), jnp.float32) for d in (3, 1, 1, 2)]
    loss = functools.partial(
        information.cs_information_bottleneck_loss, beta=0.1, **SIGMA
    )
    temporary = {}
    for chunk in (None, 64):
        step = jax.grad(functools.partial(loss, row_chunk=chunk), argnums=(2, 3))
        found = jax.jit(step).lower(*shapes).compile().memory_analysis()
        assert found is not None
        temporary[chunk] = found.temp_size_in_bytes
    assert temporary[64] < 4 * n**2 // 2 < 4 * n**2 < temporary[None]


def test_matches_independent_vectors():
    with jax.enable_x64():
        data = np.load(DATA / "cauchy_schwarz_ib_case0.npz")
        x, y, y_hat, t, sx, sy = (
            jnp.asarray(data[f"in_{n}"])
            for n in ("x", "y", "y_hat", "t", "sigma_x", "sigma_y")
        )
        mutual = functools.partial(
            information.cauchy_schwarz_mutual_information,
            x,
            bandwidth_x=sx,
            bandwidth_t=sx,
        )
        conditional = lambda y_hat: information.conditional_cauchy_schwarz_divergence(
            x, y, y_hat, bandwidth_x=sx, bandwidth_y=sy, symmetric=False
        )
        divergence = information.cauchy_schwarz_divergence

        @jax.jit
        def numbers(y_hat, t):
            value, of_y_hat = jax.value_and_grad(conditional)(y_hat)
            between, of_t = jax.value_and_grad(mutual)(t)
            return {
                "cs_divergence": divergence(y, y_hat, bandwidth=sy),
                "cs_qmi": between,
                "cs_qmi_normalized": mutual(t, normalized=True),
                "conditional": value,
            }, {"grad_y_hat": of_y_hat, "grad_t": of_t}

        values, gradients = numbers(y_hat, t)
        for name, found in values.items():
            np.testing.assert_allclose(found, data[f"out_{name}"], rtol=1e-12)
        # The vectors' gradients are central differences.
        for name, found in gradients.items():
            np.testing.assert_allclose(found, data[f"out_{name}"], atol=2e-9)


def test_divergence_of_gaussians_is_that_of_the_formula():
    """E k(a, b) = sigma / sqrt(v) exp(-(m1 - m2)^2 / 2v), v the sum of variances."""
    random = np.random.default_rng(0)
    m, s, sigma, n = (0.0, 0.7), (1.0, 1.5), 1.0, 2000
    p, q = (
        jnp.asarray(random.normal(m[i], s[i], (n, 1)), jnp.float32) for i in range(2)
    )

    def log_mean(i, j):
        v = sigma**2 + s[i] ** 2 + s[j] ** 2
        return -0.5 * np.log(v) - (m[i] - m[j]) ** 2 / (2 * v)

    wanted = log_mean(0, 0) + log_mean(1, 1) - 2 * log_mean(0, 1)
    found = jax.jit(information.cauchy_schwarz_divergence)(p, q, bandwidth=sigma)
    np.testing.assert_allclose(found, wanted, rtol=0.15)


# ------------------------------------------------------------------------------ algebra
@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), count=st.sampled_from([1, 2, 9]))
def test_bounds_and_symmetries(seed, count):
    """Cauchy-Schwarz; nothing moves with the order, the origin or a rotation."""
    given = samples(count=count, seed=seed)
    found = run(**given)
    slack = 2e-6
    for name in ("divergence", "information", "normalized", "symmetric"):
        assert found[name] >= -slack, name
    random = np.random.default_rng(seed)
    order = random.permutation(count)
    turned, _ = np.linalg.qr(random.normal(size=(3, 3)))
    moved = {n: np.asarray(a)[order] + 5 for n, a in given.items()}
    moved["x"] = moved["x"] @ np.float32(turned)
    again = run(**{n: jnp.asarray(a) for n, a in moved.items()})
    for name in NUMBERS:
        np.testing.assert_allclose(again[name], found[name], atol=1e-4)


def test_equal_predictions_cost_nothing():
    """Those with a minimum there have no slope either; the paper's estimate has one."""
    given = samples()
    x, y = given["x"], given["y"]
    found = run(**{**given, "y_hat": y})
    for name in ("divergence", "conditional", "symmetric"):
        np.testing.assert_allclose(found[name], 0, atol=1e-6)

    @jax.jit
    def slopes(y_hat):
        conditional = lambda y_hat, symmetric: (
            information.conditional_cauchy_schwarz_divergence(
                x, y, y_hat, bandwidth_x=1.0, bandwidth_y=1.0, symmetric=symmetric
            )
        )
        divergence = information.cauchy_schwarz_divergence
        return (
            jax.grad(lambda q: divergence(y, q, bandwidth=1.0))(y_hat),
            jax.grad(conditional)(y_hat, True),
            jax.grad(conditional)(y_hat, False),
        )

    *none, of_the_paper = slopes(y)
    np.testing.assert_allclose(none, 0, atol=1e-6)
    lower = information.conditional_cauchy_schwarz_divergence(
        x,
        y,
        y - 0.1 * of_the_paper,
        bandwidth_x=1.0,
        bandwidth_y=1.0,
        symmetric=False,
    )
    assert lower < -1e-5


def test_information_of_independent_variables_falls_with_their_number():
    """And grows with the dependence."""
    random = np.random.default_rng(0)
    mutual = jax.jit(information.cauchy_schwarz_mutual_information)

    def of(n, strength):
        x = random.normal(size=(n, 1))
        t = strength * x + np.sqrt(1 - strength**2) * random.normal(size=(n, 1))
        arrays = (jnp.asarray(a, jnp.float32) for a in (x, t))
        return float(mutual(*arrays, bandwidth_x=0.5, bandwidth_t=0.5))

    few, many = of(30, 0.0), of(1000, 0.0)
    assert 0 <= many < few / 4
    assert many < 0.01 < of(1000, 0.5) < of(1000, 0.9)


def test_normalized_information_of_a_variable_with_itself_is_one():
    x = samples()["x"]
    mutual = information.cauchy_schwarz_mutual_information
    sigma = {"bandwidth_x": 1.0, "bandwidth_t": 1.0}
    found = jax.jit(lambda x: mutual(x, x, normalized=True, **sigma))(x)
    np.testing.assert_allclose(found, 1, rtol=1e-5)


# --------------------------------------------------------------------- masks and edges
def test_dropped_samples_are_not_there_even_if_nan():
    given, keep = samples(), jnp.arange(N) % 3 != 1
    spoilt = {n: jnp.where(keep[:, None], a, jnp.nan) for n, a in given.items()}
    value, slopes = differentiated(spoilt, where=keep)
    keep = np.asarray(keep)
    few = {n: jnp.asarray(np.asarray(a)[keep]) for n, a in given.items()}
    wanted, wanted_slopes = differentiated(few)
    numbers = run(**few)
    for name, number in run(**spoilt, where=jnp.asarray(keep)).items():
        assert_close(number, numbers[name], dtype=jnp.float32, length=N**2)
    assert_close(value, wanted, dtype=jnp.float32, length=N**2)
    for name, slope in jax.device_get(slopes).items():
        np.testing.assert_array_equal(slope[~keep], 0)
        of_kept = slope[keep]
        assert_close(of_kept, wanted_slopes[name], dtype=jnp.float32, length=N**2)


def test_a_weight_of_zero_drops_and_equal_weights_change_nothing():
    given = samples()
    weights = jnp.where(jnp.arange(N) == 2, 0.0, 3.0)
    found = run(**given, weights=weights)
    for name, wanted in run(**given, where=jnp.arange(N) != 2).items():
        assert_close(found[name], wanted, dtype=jnp.float32, length=N**2)
    slope = jax.jit(jax.grad(lambda w: bottleneck(given, weights=w)))(weights)
    assert jnp.isfinite(slope).all()
    assert slope[2] != 0  # or a weight that is learned would never leave 0


def test_a_sample_without_weight_may_hold_anything():
    given = samples()
    weights = jnp.where(jnp.arange(N) == 2, 0.0, 1.0)
    wanted = run(**given, weights=weights)
    broken = {name: array.at[2].set(jnp.nan) for name, array in given.items()}
    for name, found in run(**broken, weights=weights).items():
        assert_close(found, wanted[name], dtype=jnp.float32, length=N**2)


def test_no_sample_gives_zero_with_gradient_zero():
    given = {n: a.at[0].set(jnp.nan) for n, a in samples().items()}
    nothing = jnp.zeros(N, bool)
    found = (differentiated(given, where=nothing), run(**given, where=nothing))
    for leaf in jax.tree.leaves(found):
        np.testing.assert_array_equal(leaf, 0)


def test_one_sample_and_constant_variables_give_zero_with_finite_gradients():
    one = {"where": jnp.arange(N) == 4}
    _, slopes = differentiated(samples(), **one)
    found = run(**samples(), **one)
    np.testing.assert_allclose(found["information"], 0, atol=1e-6)
    assert found["normalized"] == 0
    given = samples()
    given["t"] = jnp.ones_like(given["t"])
    np.testing.assert_allclose(run(**given)["normalized"], 0, atol=1e-6)
    _, more = differentiated(given)
    assert all(jnp.isfinite(s).all() for s in jax.tree.leaves((slopes, more)))


def test_kernels_that_underflow_are_still_finite_and_saturate_at_log_n():
    """d^2 / 2 = 5000: e^-5000 is 0 in float64 too, but its logarithm is a number."""
    x = 100.0 * jnp.arange(5.0)[:, None]
    mutual = information.cauchy_schwarz_mutual_information
    found, slope = jax.jit(
        jax.value_and_grad(lambda t: mutual(x, t, bandwidth_x=1.0, bandwidth_t=1.0))
    )(x)
    np.testing.assert_allclose(found, np.log(5), rtol=1e-6)
    np.testing.assert_array_equal(slope, 0)
    far = jax.jit(jax.value_and_grad(information.cauchy_schwarz_divergence))
    value, slope = far(x, x + 10_000, bandwidth=1.0)
    np.testing.assert_allclose(value, (10_000 - 400) ** 2, rtol=1e-4)
    assert jnp.isfinite(slope).all()


def test_an_offset_of_all_points_costs_no_digits():
    """|a|^2 + |b|^2 - 2 ab of points near 4096 has an error of 1 in float32."""
    x = samples()["x"]
    near = jnp.round(x * 64) / 64  # exact beside 4096
    for function in (
        lambda x: information.cauchy_schwarz_mutual_information(
            x, x, bandwidth_x=1.0, bandwidth_t=1.0
        ),
        information.median_bandwidth,
    ):
        found, wanted = jax.jit(function)(near + 4096), jax.jit(function)(near)
        assert_close(found, wanted, dtype="float32", length=N)


# ---------------------------------------------------------------------------- bandwidth
def test_median_bandwidth_is_that_of_pairs():
    bandwidth = jax.jit(information.median_bandwidth)
    for count in (2, 5, 6):
        given = samples("float32", count)["x"]
        squares = [
            ((a - b) ** 2).sum()
            for i, a in enumerate(np.asarray(given, np.float64))
            for b in np.asarray(given, np.float64)[:i]
        ]
        wanted = np.sqrt(np.median(squares) / 2)
        found = bandwidth(given)
        assert_close(found, wanted, dtype=jnp.float32, length=3)
        padded = jnp.concatenate([given, jnp.full((3, 3), jnp.nan)])
        again = bandwidth(padded, where=jnp.arange(count + 3) < count)
        assert_close(again, wanted, dtype=jnp.float32, length=3)
        assert jnp.isnan(bandwidth(padded))


def test_median_bandwidth_is_one_without_a_distance_and_has_no_slope():
    for points in (jnp.zeros((1, 2)), jnp.ones((4, 2))):
        assert jax.jit(information.median_bandwidth)(points) == 1
    slope = jax.jit(jax.grad(information.median_bandwidth))(samples()["x"])
    np.testing.assert_array_equal(slope, 0)


# -------------------------------------------------------------------------- transforms
@pytest.mark.slow  # plain JAX, without a derivative rule
def test_everything_is_differentiable_forward_and_twice():
    """Also in bandwidths, beta and weights; samples are one set, not rows."""
    given = samples()

    def total(x, y, y_hat, t, sigma, beta, weights):
        bandwidths = dict(zip(SIGMA, sigma, strict=True))
        loss = information.cs_information_bottleneck_loss(
            x, y, y_hat, t, beta=beta, weights=weights, **bandwidths
        )
        other = information.cauchy_schwarz_divergence(x, x + t[:, :1], bandwidth=beta)
        return (loss + other)[None]

    check_transformations(
        total,
        *given.values(),
        jnp.asarray(list(SIGMA.values())),
        jnp.float32(0.4),
        jnp.linspace(0.5, 1.5, N),
        rows=(),
        skip={
            "shard_map": "an estimate is one number of the whole set",
            "sharded_jit": "an estimate is one number of the whole set",
        },
    )


# ------------------------------------------------------------------------------- errors
GOOD = {"x": jnp.ones((4, 2)), "t": jnp.ones((4, 1))}


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": jnp.ones(4)}, ValueError, r"`x` must have shape \(N, d\).*\(4,\).*None"),
        (
            {"x": jnp.ones((0, 2))},
            ValueError,
            r"`x` must have shape.*\(0, 2\)",
        ),
        ({"x": jnp.ones((4, 2), int)}, TypeError, "`x` must have a floating dtype"),
        (
            {"t": jnp.ones((3, 1))},
            ValueError,
            r"`t` must have shape \(4, 1\)",
        ),
        ({"bandwidth_x": 0.0}, ValueError, "`bandwidth_x` must be positive.*got 0"),
        ({"bandwidth_t": jnp.ones(2)}, ValueError, "`bandwidth_t` must be a number"),
        ({"where": jnp.ones(3, bool)}, ValueError, r"`where` must have shape \(4,\)"),
        ({"where": jnp.ones(4)}, TypeError, "`where` must have dtype bool"),
        ({"weights": jnp.ones(4, int)}, TypeError, "`weights` must have a floating"),
        ({"row_chunk": 0}, ValueError, "`row_chunk` must be at least 1, got 0"),
    ],
)
def test_errors_name_argument_and_condition(change, error, message):
    arguments: dict[str, Any] = {"bandwidth_x": 1.0, "bandwidth_t": 1.0, **GOOD}
    with pytest.raises(error, match=f"^cauchy_schwarz_mutual_information: {message}"):
        information.cauchy_schwarz_mutual_information(**{**arguments, **change})


@pytest.mark.usefixtures("untyped")
def test_errors_of_the_other_functions():
    x, y = jnp.ones((4, 2)), jnp.ones((4, 1))
    with pytest.raises(ValueError, match=r"`samples_q` must have shape \(4, 2\)"):
        information.cauchy_schwarz_divergence(x, y, bandwidth=1.0)
    sigma = {"bandwidth_x": 1.0, "bandwidth_y": 1.0}
    with pytest.raises(ValueError, match=r"`y_hat` must have shape \(4, 1\)"):
        information.conditional_cauchy_schwarz_divergence(x, y, x, **sigma)
    with pytest.raises(ValueError, match="`beta` must be >= 0, got -1"):
        information.cs_information_bottleneck_loss(
            x, y, y, y, beta=-1, bandwidth_t=1.0, **sigma
        )
    with pytest.raises(ValueError, match=r"median_bandwidth: `x` must have shape"):
        information.median_bandwidth(jnp.ones(4))
