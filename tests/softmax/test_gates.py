"""Dense-to-sparse gates, cuts and schedules: vectors, redundancy, limits, errors."""

import pathlib
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

DATA = pathlib.Path(__file__).parent.parent / "data"
INF, NAN = jnp.inf, jnp.nan
softmax = computed(library.softmax)
dense_to_sparse_gate = computed(library.dense_to_sparse_gate)
sparsify_gates = computed(library.sparsify_gates)
temperature_schedule = library.temperature_schedule


@pytest.fixture(scope="module")
def vectors():
    with np.load(DATA / "dense_to_sparse_moe_case0.npz") as data:
        return {name: data[name] for name in data if data[name].dtype.kind != "U"}


def gate_of(beta1, beta0, tau, x, activation=None):
    scores = jnp.dot(x, beta1.T, precision="highest")
    return dense_to_sparse_gate(
        scores, temperature=tau, bias=beta0, activation=activation
    )


def test_vectors(vectors):
    with jax.enable_x64(True):
        names = ("in_beta1", "in_beta0", "in_tau", "in_x")
        beta1, beta0, tau, x = (vectors[name] for name in names)
        for activation, name in (
            (jax.nn.sigmoid, "out_gate"),
            (None, "out_gate_identity"),
        ):
            gate = jax.jit(gate_of, static_argnums=4)(beta1, beta0, tau, x, activation)
            np.testing.assert_allclose(gate, vectors[name], rtol=1e-13)


def test_gradients_of_a_mixture_are_those_of_the_vectors_and_of_its_redundancy(vectors):
    with jax.enable_x64(True):
        of = vectors.__getitem__
        x, y = of("in_x"), of("in_y")
        mean = x @ of("in_a").T + of("in_b")[None]
        residual = (y[:, None] - mean) / of("in_sigma")[None]
        log_normal = -0.5 * residual**2 - np.log(of("in_sigma"))[None]

        def loss(beta1, beta0, tau, activation):
            gate = gate_of(beta1, beta0, tau, x, activation)
            return jax.nn.logsumexp(jnp.log(gate) + log_normal, axis=-1).mean()

        grad = jax.jit(jax.grad(loss, (0, 1, 2)), static_argnums=3)
        point = of("in_beta1"), of("in_beta0"), of("in_tau")
        found = grad(*point, jax.nn.sigmoid)
        tau_slope = float(vectors["out_mean_loglik_grad_tau"])
        np.testing.assert_allclose(found[2], tau_slope, rtol=1e-7)
        by_beta1 = vectors["out_mean_loglik_grad_beta1"]
        np.testing.assert_allclose(found[0], by_beta1, atol=1e-8)
        # A common factor of all three changes the plain gate nowhere.
        along = lambda slopes: sum(
            float((p * s).sum()) for p, s in zip(point, slopes, strict=True)
        )
        assert abs(along(grad(*point, None))) < 1e-12
        assert abs(along(found)) > 1e-3


def test_limits_of_the_temperature():
    x = f32([[0.0, 1.0, 3.0], [2.0, 2.0, 0.0]])
    assert_close(
        dense_to_sparse_gate(x, temperature=1e6),
        np.full((2, 3), 1 / 3),
        dtype="f4",
        length=3,
        c=64,
    )
    cold = [[0, 0, 1], [0.5, 0.5, 0]]
    for tau in (1e-4, 1e-30, np.array(1e-37, np.float32)):
        np.testing.assert_array_equal(dense_to_sparse_gate(x, temperature=tau), cold)
    by_row = dense_to_sparse_gate(x, temperature=f32([1e-4, 1.0]))
    np.testing.assert_array_equal(by_row[0], cold[0])
    assert_close(by_row[1], softmax(x[1]), dtype="float32", length=3)
    slopes = jax.jit(
        jax.grad(lambda x, t: dense_to_sparse_gate(x, temperature=t)[0, 1], (0, 1))
    )
    for tau in (1e-37, 1e-20, 1e-3):
        for gradient in slopes(f32(1e4) * x, f32(tau)):
            assert not np.any(gradient)  # saturated, not NaN


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bias_inside_and_outside_the_temperature(scaled, dtype):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 5)).astype(jnp.dtype(dtype))
    x[1, 2], x[2] = -INF, NAN
    where = np.array([True, True, False, True])[:, None]
    bias = np.asarray(rng.normal(size=5) * 3, x.dtype)
    gate = jax.jit(
        lambda x, t: dense_to_sparse_gate(
            x,
            temperature=t,
            bias=bias,
            bias_scaled_by_temperature=scaled,
            activation=jnp.tanh,
            where=where,
        )
    )(x, f32(0.3))
    wide, b = np.asarray(x, np.float64), np.asarray(bias, np.float64)
    z = (np.tanh(wide) + b) / 0.3 if scaled else np.tanh(wide) / 0.3 + b
    z[1, 2] = z[2] = -np.inf
    assert gate.dtype == dtype
    assert_close(gate, [oracle.softmax(row) for row in z], dtype=dtype, length=5, c=16)


def test_nan_and_inf_make_their_row_nan_even_through_a_bounded_activation():
    x = f32([[INF, 0.0], [NAN, 0.0], [1.0, 0.0]])
    gate = dense_to_sparse_gate(x, temperature=1.0, activation=jax.nn.sigmoid)
    assert np.isnan(gate[:2]).all()
    assert np.isfinite(gate[2]).all()
    assert np.isnan(
        dense_to_sparse_gate(x[2:], temperature=np.array(0, np.float32))
    ).all()


def test_derivatives_by_scores_bias_and_temperature():
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        x, bias = rng.normal(size=(2, 3)), rng.normal(size=3)
        call = jax.jit(
            lambda x, b, t: dense_to_sparse_gate(
                x, temperature=t, bias=b, activation=jnp.tanh
            )
        )
        check_grads(
            call, (x, bias, np.array([0.5, 2.0])), order=2, modes=["rev"], rtol=1e-5
        )


# ------------------------------------------------------------------------------ cuts
def test_cut_keeps_what_is_large_enough_and_at_least_the_largest():
    gates = f32([[0.5, 0.3, 0.2], [0.4, 0.3, 0.3], [0.2, 0.4, 0.4], [0, 0, 0]])
    call = sparsify_gates
    found = call(gates, threshold=0.3)
    expected = [[0.625, 0.375, 0], [0.4, 0.3, 0.3], [0, 0.5, 0.5], [0, 0, 0]]
    assert_close(found, expected, dtype="float32", length=3)
    found = call(gates, threshold=1.0)
    np.testing.assert_array_equal(found, [[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 0]])
    found = call(gates, top_k=2)
    expected = [[0.625, 0.375, 0], [4 / 7, 3 / 7, 0], [0, 0.5, 0.5], [0, 0, 0]]
    assert_close(found, expected, dtype="float32", length=3)
    both = call(gates, top_k=2, threshold=0.35)
    expected = [[1, 0, 0], [1, 0, 0], [0, 0.5, 0.5], [0, 0, 0]]
    assert_close(both, expected, dtype="float32", length=3)
    np.testing.assert_array_equal(call(gates, threshold=0.0)[1], gates[1])
    by_row = jax.jit(lambda t: sparsify_gates(gates, threshold=t, renormalize=False))(
        f32([0.4, 0.0, 0.3, 0.1])
    )
    expected = [[0.5, 0, 0], [0.4, 0.3, 0.3], [0, 0.4, 0.4], [0, 0, 0]]
    np.testing.assert_array_equal(by_row, np.asarray(expected, "f4"))
    turned = call(gates.T, threshold=0.3, axis=0)
    np.testing.assert_array_equal(turned, call(gates, threshold=0.3).T)


def test_cut_of_masked_and_nan_gates_and_its_gradient():
    gates = f32([[NAN, 0.5, 0.25, 0.1], [NAN, 0.5, 0.3, 0.2], [0.4, 0.3, 0.2, 0.1]])
    where = np.array([[False, True, True, True], [True] * 4, [True] * 4])
    call = lambda g: sparsify_gates(g, threshold=0.2, where=where)
    found = call(gates)
    assert_close(found[0], [0, 2 / 3, 1 / 3, 0], dtype="float32", length=4)
    assert np.isnan(found[1]).all()
    assert sparsify_gates(gates[2:].astype("bfloat16"), top_k=9).dtype == "bfloat16"
    total = lambda g: call(g)[np.array([0, 2]), 1].sum()
    slopes = np.asarray(jax.jit(jax.grad(total))(gates))
    assert np.isfinite(slopes[[0, 2]]).all()
    assert_close(slopes[0], [0, 4 / 9, -8 / 9, 0], dtype="float32", length=4)
    assert slopes[2, 3] == 0
    for shape in ((0, 3), (2, 0)):
        assert sparsify_gates(np.zeros(shape, "f4"), threshold=0.5).shape == shape


# -------------------------------------------------------------------------- schedules
@pytest.mark.parametrize(
    ("kind", "middle"), [("exponential", np.sqrt(2 * 0.1)), ("linear", 1.05)]
)
def test_schedule_goes_from_the_first_to_the_last_and_stays(kind, middle):
    schedule: Any = temperature_schedule(2.0, 0.1, num_steps=10, kind=kind)
    values = np.asarray(jax.jit(schedule)(np.array([-3, 0, 5, 10, 11, 1_000_000])))
    assert values.dtype == jnp.float32
    assert_close(values, [2, 2, middle, 0.1, 0.1, 0.1], dtype="float32", length=1)
    np.testing.assert_array_equal(values[-3:], f32(0.1))
    steps = np.diff(jax.jit(schedule)(np.arange(11)))
    assert (steps < 0).all()
    assert schedule(3).shape == ()


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: dense_to_sparse_gate(jnp.zeros(3), temperature=0.0),
            ValueError,
            "`temperature`",
        ),
        (
            lambda: dense_to_sparse_gate(
                jnp.zeros(3), temperature=1.0, bias=jnp.zeros(2)
            ),
            ValueError,
            "`bias` must broadcast",
        ),
        (
            lambda: dense_to_sparse_gate(
                jnp.zeros(3), temperature=1.0, activation=jnp.sum
            ),
            ValueError,
            r"`activation\(x\)` must have shape",
        ),
        (lambda: sparsify_gates(jnp.zeros(3)), ValueError, "`threshold` or `top_k`"),
        (
            lambda: sparsify_gates(jnp.zeros(3), threshold=2),
            ValueError,
            r"`threshold` must be in \[0, 1\], got 2",
        ),
        (lambda: sparsify_gates(jnp.zeros(3), top_k=0), ValueError, "`top_k` must be"),
        (
            lambda: temperature_schedule(1.0, 0.0, num_steps=3),
            ValueError,
            "temperature_schedule: `final` must be positive",
        ),
        (
            lambda: temperature_schedule(1.0, 0.5, num_steps=3, kind="cosine"),  # type: ignore
            ValueError,
            "`kind` must be one of",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
