"""Gaussian mixtures of experts: vectors, redundancy, EM and Newton, rates."""

import functools
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from jax.test_util import check_grads

from softlib.estimation import (
    ExpertGate,
    GaussianExperts,
    draw_gaussian_experts,
    fit_gaussian_experts,
    gauge_fixed_experts,
)
from softlib.testing import assert_close
from tests.host import jnp
from tests.oracles import gaussian_experts as oracle

DATA = pathlib.Path(__file__).parent.parent / "data"
NAN, INF = jnp.nan, jnp.inf
SIGMOID = ExpertGate(activation=jax.nn.sigmoid)
TANH = ExpertGate(activation=jnp.tanh)


def log_gate_of(x, experts, *gate):
    return experts.log_gate(x, *gate)


def log_prob_of(x, y, experts, *gate):
    return experts.log_prob(x, y, *gate)


def responsibilities_of(x, y, experts, *gate):
    return experts.responsibilities(x, y, *gate)


def m_step_of(x, y, responsibilities, experts, **options):
    return experts.m_step(x, y, responsibilities, **options)


def hellinger_of(first, second, x, points, *gate):
    return first.hellinger_distance(second, x, points, *gate)


def load(name):
    with np.load(DATA / name) as data:
        return {key: data[key] for key in data if data[key].dtype.kind == "f"}


def experts_of(vectors, tau=None):
    names = ("in_beta1", "in_beta0", "in_a", "in_b", "in_sigma")
    experts = GaussianExperts(*(jnp.asarray(vectors[name]) for name in names))
    return experts if tau is None else experts._replace(temperature=jnp.asarray(tau))


@functools.partial(jax.jit, static_argnums=3)
def measure(x, y, experts, gate=ExpertGate()):
    return (
        jnp.exp(log_gate_of(x, experts, gate)),
        log_prob_of(x, y, experts, gate),
        responsibilities_of(x, y, experts, gate),
    )


@functools.partial(jax.jit, static_argnums=3)
def slopes(x, y, experts, gate):
    mean = lambda experts: log_prob_of(x, y, experts, gate).mean()
    return jax.grad(mean)(experts)


def test_vectors_of_the_dense_to_sparse_gate():
    vectors = load("dense_to_sparse_moe_case0.npz")
    with jax.enable_x64(True):
        x, y = jnp.asarray(vectors["in_x"]), jnp.asarray(vectors["in_y"])
        experts = experts_of(vectors, vectors["in_tau"])
        found, plain = measure(x, y, experts, SIGMOID), measure(x, y, experts)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-14)
        for actual, name in zip(
            (*found, plain[0]),
            ("out_gate", "out_loglik", "out_responsibilities", "out_gate_identity"),
            strict=True,
        ):
            close(actual, vectors[name])
        new = jax.jit(m_step_of)(x, y, found[2], experts)
        close(new.mean_weight, vectors["out_mstep_a"])
        close(new.mean_bias, vectors["out_mstep_b"])
        close(new.scale, vectors["out_mstep_sigma"])
        gradient = slopes(x, y, experts, SIGMOID)
        by_tau = vectors["out_mean_loglik_grad_tau"]
        close(gradient.temperature, by_tau, rtol=1e-7)
        by_weight = vectors["out_mean_loglik_grad_beta1"]
        close(gradient.gate_weight, by_weight, atol=1e-8)


def test_vectors_of_the_top_k_gate():
    vectors = load("topk_moe_gating_case0.npz")
    with jax.enable_x64(True):
        x, y = jnp.asarray(vectors["in_x"]), jnp.asarray(vectors["in_y"])
        experts = experts_of(vectors)
        found = measure(x, y, experts, ExpertGate(top_k=2))
        np.testing.assert_allclose(found[0], vectors["out_gate_paper"], atol=1e-14)
        np.testing.assert_allclose(found[1], vectors["out_log_density"], rtol=1e-12)
        both = measure(x, y, experts, ExpertGate(top_k=2, bias_in="both"))[0]
        expected = vectors["out_gate_bias_in_selection"]
        np.testing.assert_allclose(both, expected, atol=1e-14)
        assert ((found[2] > 0).sum(-1) <= 2).all()


def problem(n=30, features=2, count=4, seed=0):
    rng = np.random.default_rng(seed)
    experts = [
        rng.normal(size=(count, features)),
        rng.normal(size=count),
        rng.normal(size=(count, features)),
        rng.normal(size=count),
        rng.uniform(0.3, 1, count),
        np.array(0.6),
    ]
    x = rng.normal(size=(n, features))
    return x, x[:, 0] + rng.normal(size=n), experts


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"top_k": 2, "bias_in": "selection"}, "float32"),
        ({"top_k": 2, "bias_in": "selection"}, "bfloat16"),
        ({"activation": np.tanh, "scaled": False}, "float32"),
        (
            {"top_k": 3, "bias_in": "both", "activation": np.tanh, "scaled": False},
            "float32",
        ),
    ],
)
def test_gate_density_and_responsibilities_against_the_oracle(options, dtype):
    x, y, experts = (
        jax.tree.map(lambda a: jnp.asarray(a, dtype), each) for each in problem(5)
    )
    known = dict(options)
    if "activation" in known:
        known["activation"] = jnp.tanh
    scaled = known.pop("scaled", True)
    gate = ExpertGate(**known, bias_scaled_by_temperature=scaled)
    found = measure(x, y, GaussianExperts(*experts), gate)
    shares = [oracle.gate_of(row, experts, **options) for row in np.asarray(x)]
    expected = (
        np.stack(shares),
        oracle.log_density(x, y, experts, **options),
        oracle.responsibilities(x, y, experts, **options),
    )
    for actual, exact in zip(found, expected, strict=True):
        assert actual.dtype == jnp.float32
        # A squared distance in scales multiplies its rounding.
        assert_close(actual, exact, dtype="float32", length=4, c=16)


def test_derivatives_by_all_parameters_and_far_from_all_experts():
    top = ExpertGate(top_k=2)
    with jax.enable_x64(True):
        x, y, experts = jax.tree.map(jnp.asarray, problem(3))

        @jax.jit
        def both(x, y, *fields):
            experts = GaussianExperts(*fields)
            density = log_prob_of
            return density(x, y, experts, TANH), density(x, y, experts, top)

        check_grads(both, (x, y, *experts), order=1, modes=["rev"], rtol=1e-5)
    x, y, experts = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), problem(5))
    far = y.at[0].set(1e6)
    assert measure(x, far, GaussianExperts(*experts), top)[1][0] < -1e10
    gradient = slopes(x, far, GaussianExperts(*experts), top)
    assert all(jnp.isfinite(each).all() for each in gradient)


def test_bad_values_make_their_own_rows_nan():
    x, y, experts = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), problem(5))
    experts, gate = GaussianExperts(*experts), ExpertGate(top_k=2)
    good = measure(x, y, experts, gate)
    found = measure(x.at[1, 0].set(NAN), y.at[3].set(NAN), experts, gate)
    for actual, expected in zip(found[1:], good[1:], strict=True):
        actual, expected = np.asarray(actual), np.asarray(expected)
        assert np.isnan(actual[[1, 3]]).reshape(2, -1).any(-1).all()
        np.testing.assert_array_equal(actual[[0, 2, 4]], expected[[0, 2, 4]])
    for field in ("scale", "temperature"):
        bad = experts._replace(**{field: -getattr(experts, field)})
        assert np.isnan(measure(x, y, bad, gate)[1]).all()


def test_shapes_and_dtypes():
    x, y, experts = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), problem(6))
    experts = GaussianExperts(*experts)._replace(temperature=1.0)
    shapes = lambda *a: [each.shape for each in jax.eval_shape(measure, *a)]
    assert shapes(x[:0], y[:0], experts) == [(0, 4), (0,), (0, 4)]
    assert shapes(x[0], y[0], experts) == [(4,), (), (4,)]
    boxed = x.reshape(2, 3, 2), y.reshape(2, 3), experts
    assert shapes(*boxed) == [(2, 3, 4), (2, 3), (2, 3, 4)]
    with jax.enable_x64(True):
        single = jax.eval_shape(measure, x, y, experts)
        assert {each.dtype for each in single} == {jnp.dtype("float32")}
        wide = jax.eval_shape(measure, x.astype("float64"), y, experts)
        assert {each.dtype for each in wide} == {jnp.dtype("float64")}


def test_a_common_factor_changes_the_plain_gate_nowhere():
    vectors = load("dense_to_sparse_moe_case0.npz")
    with jax.enable_x64(True):
        x, y = jnp.asarray(vectors["in_x"]), jnp.asarray(vectors["in_y"])
        experts = experts_of(vectors, vectors["in_tau"])
        names = ("gate_weight", "gate_bias", "temperature")
        larger = experts._replace(**{n: 7 * getattr(experts, n) for n in names})
        before, after = (measure(x, y, e)[1] for e in (experts, larger))
        np.testing.assert_allclose(before, after, rtol=1e-13)

        def along(gate):
            gradient = slopes(x, y, experts, gate)
            return sum(
                float((getattr(experts, n) * getattr(gradient, n)).sum()) for n in names
            )

        assert abs(along(ExpertGate())) < 1e-12
        assert abs(along(SIGMOID)) > 1e-3


def test_limits_of_the_temperature():
    scores = jnp.array([[0.0], [1.0], [3.0], [3.0]])
    none, one = jnp.zeros(4), jnp.ones(4)
    call = jax.jit(
        lambda tau: jnp.exp(
            log_gate_of(
                jnp.ones(1), GaussianExperts(scores, none, scores, none, one, tau)
            )
        )
    )
    assert_close(call(jnp.float32(1e6)), [0.25] * 4, dtype="float32", length=4, c=16)
    for tau in (1e-4, 1e-30):
        np.testing.assert_array_equal(call(jnp.float32(tau)), [0, 0, 0.5, 0.5])


# ----------------------------------------------------------------------------- M-step
def test_m_step_of_what_counts_and_of_an_expert_without_examples():
    x, y, experts = problem(40)
    shares = np.random.default_rng(1).dirichlet(np.ones(3), 40)
    keep = np.arange(40) % 4 != 0
    slope, intercept, scale = oracle.m_step(x[keep], y[keep], shares[keep])
    shares = np.pad(shares, ((0, 0), (0, 1)))  # the last has nothing
    for array in (x, y, shares):
        array[~keep] = NAN
    x, y, shares = (jnp.asarray(a, jnp.float32) for a in (x, y, shares))
    before = GaussianExperts(*(jnp.asarray(each, jnp.float32) for each in experts))
    step: Any = jax.jit(m_step_of)
    new = step(x, y, shares, before, where=jnp.asarray(keep))
    for actual, expected, old in zip(
        new[2:5], (slope, intercept, scale), before[2:5], strict=True
    ):
        assert_close(actual[:3], expected, dtype="float32", length=40, c=16)
        np.testing.assert_array_equal(actual[3], old[3])
    np.testing.assert_array_equal(new.gate_weight, before.gate_weight)


def test_m_step_leaves_the_directions_that_are_not_determined():
    x = jnp.repeat(jnp.arange(6.0)[:, None], 2, axis=1)  # only the sum of the slopes
    y = 1 + 4 * x[:, 0]
    none, one = jnp.zeros(1), jnp.ones(1)
    old = GaussianExperts(x[:1], none, jnp.array([[3.0, -1.0]]), none, one)
    step: Any = jax.jit(m_step_of)
    new = step(x, y, jnp.ones((6, 1)), old, where=jnp.ones(6, bool))
    np.testing.assert_allclose(new.mean_weight, [[4.0, 0.0]], atol=1e-4)
    single = step(x, y, jnp.ones((6, 1)), old, where=jnp.arange(6) == 2)
    np.testing.assert_array_equal(single.mean_weight, old.mean_weight)
    np.testing.assert_allclose(single.scale, 0, atol=1e-6)


# -------------------------------------------------------------------------------- fits
def sample(key, n, experts, gate, width=3.0):
    keys = jax.random.split(key, 3)
    shape = (n, experts.mean_weight.shape[-1])
    x = jax.random.uniform(keys[0], shape, experts.scale.dtype, -width, width)
    chosen = jax.random.categorical(keys[1], log_gate_of(x, experts, gate))
    mean = (experts.mean_weight[chosen] * x).sum(-1) + experts.mean_bias[chosen]
    noise = jax.random.normal(keys[2], (n,), mean.dtype)
    return x, mean + experts.scale[chosen] * noise


def two_experts(tau):
    return GaussianExperts(
        jnp.array([[2.0], [0.0]]),
        jnp.array([0.3, 0.0]),
        jnp.array([[-1.5], [1.5]]),
        jnp.array([0.5, -0.5]),
        jnp.array([0.4, 0.3]),
        jnp.asarray(tau),
    )


def test_em_never_falls_and_ends_where_newton_ends():
    with jax.enable_x64(True):
        true = two_experts(0.3)
        start = true._replace(
            gate_weight=true.gate_weight + 0.1,
            mean_weight=true.mean_weight * 0.8,
            scale=jnp.ones(2),
            temperature=jnp.asarray(0.4),
        )
        alike = jax.tree.map(jnp.zeros_like, start)  # nothing tells its experts apart
        alike = alike._replace(scale=start.scale, temperature=start.temperature)
        wrong = start._replace(scale=-start.scale)
        starts = jax.tree.map(lambda *a: jnp.stack(a), wrong, start, alike)
        rng = np.random.default_rng(0)
        x = rng.uniform(-6, 6, (300, 1))
        known = [np.asarray(each) for each in true]
        shares = [oracle.gate_of(row, known, activation=np.tanh) for row in x]
        first = rng.uniform(size=300) < np.array(shares)[:, 0]
        mean = np.where(first, -1.5 * x[:, 0] + 0.5, 1.5 * x[:, 0] - 0.5)
        y = mean + np.where(first, 0.4, 0.3) * rng.normal(size=300)
        keep = np.arange(300) % 10 != 0

        @jax.jit
        def run(x, y, where):
            options: dict[str, Any] = {"learn_temperature": True, "where": where}
            fit = functools.partial(fit_gaussian_experts, max_steps=200, **options)
            return fit(x, y, starts, TANH), fit(x, y, start, TANH, method="newton")

        given = np.where(keep[:, None], x, NAN), np.where(keep, y, NAN), keep
        em, newton = jax.tree.map(np.asarray, run(*map(jnp.asarray, given)))
        x, y = x[keep], y[keep]
        at_truth = oracle.log_density(x, y, known, activation=np.tanh).mean()
        for found in (em, newton):
            assert found.converged
            assert found.gradient_norm < 1.5e-8
            assert (np.diff(found.history) >= -1e-12).all()
            assert found.history[-1] == found.log_likelihood
            assert found.history[0] < found.history[-1] - 0.1
            density = oracle.log_density(x, y, found.experts, activation=np.tanh)
            assert_close(found.log_likelihood, density.mean(), dtype="f8", length=300)
            assert found.log_likelihood > at_truth
        fixed = [gauge_fixed_experts(f.experts, TANH) for f in (em, newton)]
        for one, two in zip(*fixed, strict=True):
            np.testing.assert_allclose(one, two, atol=1e-4)
        assert np.isnan(em.starts[0])
        assert em.starts[1] == em.log_likelihood > em.starts[2]


def three_experts():
    return GaussianExperts(
        jnp.array([[2.0, 0.0], [-1.0, 2.0], [-1.0, -2.0]]),
        jnp.zeros(3),
        jnp.array([[2.0, 0.0], [0.0, -2.0], [1.0, 1.0]]),
        jnp.array([3.0, 0.0, -3.0]),
        jnp.full(3, 0.3),
        jnp.float32(0.3),
    )


@pytest.mark.slow
def test_twenty_starts_in_one_run():
    true = three_experts()

    @jax.jit
    def run(keys, error):
        x, y = sample(keys[0], 150, true, ExpertGate())
        where = jnp.arange(150) % 5 != 0
        at_truth = log_prob_of(x, y, true)
        x, y = jnp.where(where[:, None], x, NAN), jnp.where(where, y, NAN)
        y = y.at[1].add(error)
        starts = draw_gaussian_experts(keys[1], x, y, 3, num_starts=20, where=where)
        options: dict[str, Any] = {"max_steps": 40, "min_scale": 0.3}
        fit = fit_gaussian_experts(x, y, starts, where=where, **options)
        return fit, at_truth.mean(where=where)

    keys = jax.random.split(jax.random.key(1))
    nan, _ = run(keys, jnp.float32(NAN))
    assert jnp.isnan(nan.log_likelihood)
    assert jnp.isnan(nan.experts.mean_weight).all()
    assert not nan.converged
    found, at_truth = run(keys, jnp.float32(0))
    assert found.starts.shape == (20,)
    assert found.log_likelihood == found.starts.max() > found.starts.min()
    assert found.log_likelihood > at_truth
    assert found.experts.scale.shape == (3,)
    assert found.experts.scale.min() == np.float32(0.3)
    order = np.argsort(-found.experts.mean_bias)
    np.testing.assert_allclose(found.experts.mean_bias[order], [3, 0, -3], atol=0.3)
    assert (jnp.diff(found.history) >= -1e-5).all()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["em", "newton"])
def test_fit_with_a_top_k_gate(method):
    true, gate = three_experts(), ExpertGate(top_k=2)
    x, y = sample(jax.random.key(3), 300, true, gate)
    start = true._replace(
        gate_weight=true.gate_weight + jnp.array([[0.2, -0.1], [0.1, 0.1], [0.0, 0.2]]),
        mean_bias=true.mean_bias + 0.5,
        scale=jnp.ones(3),
    )
    fit: Any = jax.jit(fit_gaussian_experts, static_argnames=("gate", "method"))
    found = fit(x, y, start, gate=gate, method=method)
    assert (jnp.diff(found.history) >= -1e-5).all()
    assert found.log_likelihood > found.history[0] + 0.5
    np.testing.assert_allclose(found.experts.mean_bias, true.mean_bias, atol=0.2)
    before, after = (log_gate_of(x, e, gate) > -INF for e in (start, found.experts))
    if method == "em":  # only where the expert was not responsible
        assert (before != after).mean() < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("method", ["em", "newton"])
def test_least_scale_holds_where_an_expert_fits_exactly(method):
    x = jnp.linspace(-1, 1, 40)[:, None]
    y = jnp.abs(x[:, 0])  # two lines without noise
    start = GaussianExperts(
        jnp.array([[-3.0], [3.0]]),
        jnp.zeros(2),
        jnp.array([[-0.8], [0.8]]),
        jnp.zeros(2),
        jnp.full(2, 0.3),
    )

    def run(x, y):
        options: dict[str, Any] = {"min_scale": 0.05, "max_steps": 60}
        return fit_gaussian_experts(x, y, start, method=method, **options)

    found = jax.jit(run)(x, y)
    np.testing.assert_array_equal(found.experts.scale, np.float32(0.05))
    np.testing.assert_allclose(found.experts.mean_weight[:, 0], [-1, 1], atol=0.02)
    assert (jnp.diff(found.history) >= -1e-5).all()
    assert found.gradient_norm < 1e-2  # without the slopes by the scales


@pytest.mark.slow
def test_temperature_is_learned_with_an_activation_and_not_without():
    """The paper's claim: n^(-1/2), against no polynomial rate."""
    sizes, true = (400, 1600, 4800), two_experts(0.3)

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def errors(keys, n, gate):
        def one(key):
            data_key, *keys = jax.random.split(key, 4)
            x, y = sample(jax.random.fold_in(data_key, n), n, true, gate, 6.0)
            noise = [jax.random.normal(k, (2,)) * 0.1 for k in keys[:2]]
            # Of a plain gate a common factor is not seen.
            factor = jnp.where(jax.random.bernoulli(keys[2], shape=()), 1.5, 1 / 1.5)
            start = true._replace(
                gate_weight=true.gate_weight * factor,
                gate_bias=true.gate_bias * factor + noise[0],
                mean_bias=true.mean_bias + noise[1],
                temperature=true.temperature * factor,
            )
            fit = fit_gaussian_experts(
                x,
                y,
                start,
                gate,
                method="newton",
                learn_temperature=True,
                max_steps=100,
            )
            found, points = fit.experts, jnp.linspace(-15, 15, 200)
            apart = hellinger_of(true, found, x[:30], points, gate)
            return jnp.abs(found.temperature - true.temperature), apart.mean()

        return jax.vmap(one)(keys)

    with jax.enable_x64(True):
        true = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), true)
        rates = {}
        for name, gate, count in (("plain", ExpertGate(), 8), ("activated", TANH, 32)):
            keys = jax.random.split(jax.random.key(0), count)
            both = [errors(keys, n, gate) for n in sizes]
            medians = np.log([[np.median(each) for each in pair] for pair in both])
            rates[name] = np.polyfit(np.log(sizes), medians, 1)[0]
    assert -0.8 < rates["activated"][0] < -0.35
    assert rates["plain"][0] > -0.3
    for _, density in rates.values():  # the densities converge in either case
        assert -0.75 < density < -0.3


# --------------------------------------------------------------------------- distance
def test_hellinger_distance_of_normal_densities():
    with jax.enable_x64(True):
        none, one, slope = jnp.zeros(1), jnp.ones(1), jnp.array([[1.0]])
        first = GaussianExperts(slope, none, 0 * slope, none, one)
        second = GaussianExperts(slope, none, slope, none, 2 * one)
        x, points = jnp.array([[0.0], [1.0], [3.0]]), jnp.linspace(-25, 30, 400)
        call: Any = jax.jit(hellinger_of)
        found = call(first, second, x, points)
        overlap = np.sqrt(4 / 5) * np.exp(-np.array([0.0, 1, 9]) / 20)
        np.testing.assert_allclose(found, np.sqrt(1 - overlap), atol=1e-9)
        np.testing.assert_array_equal(call(first, first, x, points), 0)
        swapped = call(second, first, x, points)
        np.testing.assert_allclose(found, swapped, atol=1e-14)
        slope_of = jax.jit(jax.grad(lambda e: call(first, e, x, points).sum()))
        assert all(jnp.isfinite(each).all() for each in slope_of(first)[:5])


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ExpertGate(top_k=0), ValueError, "ExpertGate: `top_k` must be"),
        (
            lambda: ExpertGate(bias_in="none"),  # type: ignore
            ValueError,
            "`bias_in` must be one of",
        ),
        (
            lambda: log_gate_of(jnp.zeros(3), two_experts(1.0)),
            ValueError,
            r"`gate_weight` must have shape \(2, 3\)",
        ),
        (
            lambda: log_prob_of(jnp.zeros((4, 1)), jnp.zeros(3), two_experts(1.0)),
            ValueError,
            r"`y` must have shape \(4,\)",
        ),
        (
            lambda: m_step_of(
                jnp.zeros((4, 1)), jnp.zeros(4), jnp.zeros((4, 3)), two_experts(1.0)
            ),
            ValueError,
            r"`responsibilities` must have shape \(4, 2\)",
        ),
        (
            lambda: draw_gaussian_experts(
                jax.random.key(0), jnp.zeros((2, 1)), jnp.zeros(2), 3
            ),
            ValueError,
            "`num_experts` must be at most the number of examples, 2, got 3",
        ),
        (
            lambda: fit_gaussian_experts(
                jnp.zeros((4, 1)),
                jnp.zeros(4),
                two_experts(1.0),
                method="sgd",  # type: ignore
            ),
            ValueError,
            "`method` must be one of 'em', 'newton'",
        ),
        (
            lambda: fit_gaussian_experts(
                jnp.zeros((4, 1), int), jnp.zeros(4), two_experts(1.0)
            ),
            TypeError,
            "`x` must have a floating dtype",
        ),
        (
            lambda: fit_gaussian_experts(
                jnp.zeros((4, 1)), jnp.zeros(4), two_experts(1.0), min_scale=0
            ),
            ValueError,
            "`min_scale` must be positive",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
