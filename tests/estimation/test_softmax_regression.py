"""Softmax regression: derivatives, recovery by Gauss-Newton, the shift of labels."""

import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from jax.test_util import check_grads

from softlib.estimation import (
    SoftmaxRegression,
    fit_softmax_regression,
    in_context_label_shift,
)
from softlib.softmax import softmax
from softlib.testing import assert_close
from tests.host import jnp
from tests.oracles import softmax_regression as oracle

DATA = pathlib.Path(__file__).parent.parent / "data"
NAN = np.nan


def problem(seed=0, rows=12, features=4, size=1.0):
    """x, A and b in the simplex; float64."""
    rng = np.random.default_rng(seed)
    x, A = rng.normal(size=features) * size, rng.normal(size=(rows, features))
    return x, A, rng.dirichlet(np.ones(rows))


def loss_of(x, A, b, where=None):
    return SoftmaxRegression(A, b, where).loss(x)


def gradient_of(x, A, b, where=None):
    return SoftmaxRegression(A, b, where).gradient(x)


def hessian_of(x, A, b, where=None):
    return SoftmaxRegression(A, b, where).hessian(x)


def product_of(x, A, b, v, where=None):
    return SoftmaxRegression(A, b, where).hessian_vector_product(x, v)


def dot(a, b):
    return jnp.matmul(a, b, precision="highest")


@jax.jit
def everything(x, A, b, v, where=None):
    return (
        loss_of(x, A, b, where=where),
        gradient_of(x, A, b, where=where),
        hessian_of(x, A, b, where=where),
        product_of(x, A, b, v, where=where),
    )


def expected(x, A, b, v):
    hessian = oracle.hessian(x, A, b)
    return oracle.loss(x, A, b), oracle.gradient(x, A, b), hessian, hessian @ v


def test_vectors():
    with np.load(DATA / "softmax_regression_case0.npz") as data:
        vectors = {name: data[name] for name in data}
    with jax.enable_x64(True):
        x, A, b = (jnp.asarray(vectors[f"in_{name}"]) for name in ("x", "A", "b"))
        loss, gradient, hessian, _ = everything(x, A, b, x)
        np.testing.assert_allclose(softmax(dot(A, x)), vectors["out_f"], rtol=1e-13)
        np.testing.assert_allclose(loss, vectors["out_loss"], rtol=1e-13)
        np.testing.assert_allclose(gradient, vectors["out_grad"], atol=1e-14)
        # The vectors were made by finite differences where the formula has none.
        np.testing.assert_allclose(hessian, vectors["out_hessian"], atol=1e-8)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_loss_and_closed_forms_against_the_oracle(dtype):
    with jax.enable_x64(dtype == "float64"):
        x, A, b = (jnp.asarray(a, dtype) for a in problem())
        v = jnp.roll(x, 1)
        wide = [np.asarray(a, np.float64) for a in (x, A, b, v)]
        found = everything(x, A, b, v)
        types = jnp.promote_types(dtype, jnp.float32), jnp.dtype(dtype)
        order = [types[0], types[1], types[0], types[1]]
        for actual, exact, kind in zip(found, expected(*wide), order, strict=True):
            assert actual.dtype == kind
            assert_close(actual, exact, dtype=kind, length=12)


def test_closed_forms_are_the_derivatives_of_the_loss():
    with jax.enable_x64(True):
        x, A, b = map(jnp.asarray, problem(1))
        v = jnp.roll(x, 1)
        _, gradient, hessian, product = everything(x, A, b, v)
        derivative = jax.grad(loss_of)
        both = jax.jit(lambda x: (derivative(x, A, b), jax.jacfwd(derivative)(x, A, b)))
        by_jax = both(x)
        assert_close(gradient, by_jax[0], dtype="float64", length=12)
        assert_close(hessian, by_jax[1], dtype="float64", length=12)
        assert_close(product, dot(hessian, v), dtype="float64", length=12)
        call = jax.jit(lambda *a: everything(*a)[1:])
        check_grads(call, (x, A, b, v), order=1, modes=["rev"], rtol=1e-6)


@pytest.mark.parametrize("bad", [1e3, NAN])
def test_rows_that_do_not_count_are_not_there(bad):
    x, A, b = problem(2)
    keep = np.arange(12) % 3 != 0
    where, mask = jnp.asarray(keep), keep[:, None]
    arguments = [jnp.asarray(a, jnp.float32) for a in (x, A, b)]
    x32, A32, b32 = (np.asarray(a, np.float64) for a in arguments)
    v = np.roll(x32, 1)
    full = jnp.where(mask, A32, bad), jnp.where(keep, b32, bad)
    found = everything(arguments[0], *full, jnp.asarray(v, jnp.float32), where)
    for actual, exact in zip(
        found, expected(x32, A32[keep], b32[keep], v), strict=True
    ):
        assert_close(actual, exact, dtype="float32", length=12)
    by_data = jax.jit(jax.grad(loss_of, (1, 2)))(arguments[0], *full, where=where)
    for slope in by_data:
        assert jnp.isfinite(slope).all()
        assert not slope[~where].any()
    none = everything(
        arguments[0], *full, jnp.asarray(v, jnp.float32), jnp.zeros(12, bool)
    )
    assert not any(value.any() for value in none)


def test_hessian_of_the_loss_may_be_indefinite_and_gauss_newton_is_not():
    with jax.enable_x64(True):
        x, A, b = map(jnp.asarray, problem(0, rows=5, size=2.0))
        assert np.linalg.eigvalsh(hessian_of(x, A, b))[0] < -1e-3
        own = softmax(dot(A, x))  # the residual is 0: what is left is Gauss-Newton
        assert np.linalg.eigvalsh(hessian_of(x, A, own))[0] > -1e-15


def test_bounds_that_follow_from_the_norm_of_the_jacobian():
    with jax.enable_x64(True):
        rng = np.random.default_rng(3)
        x, y = (jnp.asarray(rng.normal(size=(200, 3)) * 3) for _ in range(2))
        A = jnp.asarray(rng.normal(size=(200, 6, 3)))
        b = jnp.asarray(rng.dirichlet(np.ones(6) * 0.3, size=200))

        @jax.jit
        @jax.vmap
        def measure(x, y, A, b):
            f, g = softmax(dot(A, x)), softmax(dot(A, y))
            gradient = gradient_of(x, A, b)
            jacobian = jnp.diag(f) - f[:, None] * f[None]
            norm = jnp.linalg.norm
            return (
                norm(jacobian, ord=2),
                norm(f - g) / (0.5 * norm(A, ord=2) * norm(x - y)),
                norm(gradient) / (0.5 * norm(A, ord=2) * norm(f - b)),
                norm(f - b),
            )

        jacobian, change, gradient, residual = measure(x, y, A, b)
        assert jacobian.max() <= 0.5 + 1e-12
        assert change.max() <= 1
        assert gradient.max() <= 1
        assert residual.max() <= np.sqrt(2)
        two = jnp.array([[1.0], [-1.0]])  # of two equal probabilities it is 1/2
        close = in_context_label_shift(
            jnp.zeros(1), two, b[0, :2], next_coefficients=jnp.full(1, 1e-3)
        )
        assert 0.999 < close.distance / close.bound <= 1


# -------------------------------------------------------------------------------- fit
def realisable(count, rows=50, features=5):
    rng = np.random.default_rng(4)
    A = rng.normal(size=(count, rows, features))
    x = rng.normal(size=(count, features))
    b = np.stack([oracle.prediction(*each) for each in zip(x, A, strict=True)])
    return A, b, x


def test_gauss_newton_recovers_twenty_of_twenty():
    A, b, x = realisable(20)
    fit: Any = jax.jit(jax.vmap(fit_softmax_regression))
    with jax.enable_x64(True):
        found = fit(jnp.asarray(A), jnp.asarray(b))
        assert found.converged.all()
        assert found.gradient_norm.max() < 2e-12
        np.testing.assert_allclose(found.coefficients, x, atol=1e-9)
        assert found.num_steps.max() <= 10
        assert found.num_steps.dtype == jnp.int32


def test_fit_of_any_target_ends_at_a_stationary_point_of_the_penalised_loss():
    with jax.enable_x64(True):
        _, A, b = map(jnp.asarray, problem(5))
        where = jnp.arange(12) != 3
        A, b = A.at[3].set(NAN), b.at[3].set(NAN)
        fit = jax.jit(lambda l2: fit_softmax_regression(A, b, l2=l2, where=where))
        for l2 in (0.0, 1e-2):
            found = fit(l2)
            x, keep = np.asarray(found.coefficients), np.asarray(where)
            rest = np.asarray(A)[keep], np.asarray(b)[keep]
            slope = oracle.gradient(x, *rest) + l2 * x
            assert found.converged
            assert np.linalg.norm(slope) < 3e-12
            assert_close(
                found.gradient_norm, np.linalg.norm(slope), dtype="f8", length=12
            )
            exact = oracle.loss(x, *rest) + l2 / 2 * x @ x
            assert_close(found.loss, exact, dtype="float64", length=12)
            curvature = oracle.hessian(x, *rest) + l2 * np.eye(4)
            assert np.linalg.eigvalsh(curvature)[0] > 0


def test_what_softmax_does_not_see_keeps_its_start():
    A, b, x = (a[0] for a in realisable(1))
    A = np.concatenate([A, np.ones((50, 1))], axis=1)  # adds t to every score
    start = jnp.array([0, 0, 0, 0, 0, 7.0], jnp.float32)
    found = jax.jit(fit_softmax_regression)(
        jnp.asarray(A, jnp.float32), jnp.asarray(b, jnp.float32), initial=start
    )
    assert found.converged
    np.testing.assert_allclose(found.coefficients, [*x, 7], atol=1e-3)


def test_fit_says_what_it_did_not_reach():
    _, A, b = (jnp.asarray(a, jnp.float32) for a in problem(5))
    fit: Any = jax.jit(fit_softmax_regression, static_argnames="max_steps")
    short = fit(A, b, max_steps=1)
    assert not short.converged
    assert short.num_steps == 1
    nan = fit(A.at[0, 0].set(NAN), b)
    assert jnp.isnan(nan.coefficients).all()
    assert not nan.converged
    zero = fit(0 * A, 0 * b)  # a flat loss is stationary
    assert zero.converged
    assert not zero.coefficients.any()


# ------------------------------------------------------------------------------- shift
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_step_of_gradient_descent_is_a_shift_of_the_labels(dtype):
    with jax.enable_x64(dtype == "float64"):
        x, A, b = (jnp.asarray(a, dtype) for a in problem(6, rows=20, size=2.0))

        @jax.jit
        def both(x, A, b, eta):
            after = x - eta * gradient_of(x, A, b)
            found = in_context_label_shift(x, A, b, next_coefficients=after)
            return found, softmax(dot(A, after)) - b, softmax(dot(A, x)) - found.target

        for eta in (1e-3, 1.0, 10.0):
            found, moved, shifted = both(x, A, b, jnp.asarray(eta, dtype))
            assert np.abs(moved - shifted).max() <= 2 * jnp.finfo(dtype).eps
            exact = np.asarray(found.target, "f8") - np.asarray(b, "f8")
            norm = np.linalg.norm(exact)
            assert_close(found.distance, norm, dtype=dtype, length=20)
            assert 0 < found.distance <= found.bound


def test_a_change_of_the_data_is_a_shift_of_the_labels():
    x, A, b = (jnp.asarray(a, jnp.float32) for a in problem(7))
    rng = np.random.default_rng(8)
    where = jnp.arange(12) != 5
    A, b = A.at[5].set(NAN), b.at[5].set(NAN)
    change = jnp.asarray(rng.normal(size=A.shape) * 0.1, jnp.float32)
    call: Any = jax.jit(in_context_label_shift)
    options: list[dict[str, Any]] = [{}, {"next_coefficients": 2 * x}]
    for more in options:
        found = call(x, A, b, next_design=A + change, where=where, **more)
        after = more.get("next_coefficients", x)
        moved = softmax(dot(A + change, after), where=where) - b
        shifted = softmax(dot(A, x), where=where) - found.target
        keep = np.asarray(where)
        np.testing.assert_allclose(moved[keep], shifted[keep], atol=3e-7)
        assert found.target[5] == 0
        assert 0 < found.distance <= found.bound
    still = jax.jit(
        jax.grad(
            lambda x, y: call(x, A, b, next_coefficients=y, where=where).target[0],
            (0, 1),
        )
    )(x, x)
    assert_close(still[0], -still[1], dtype="float32", length=12)
    assert jnp.isfinite(still[0]).all()


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: loss_of(jnp.zeros(2), jnp.zeros((3, 4)), jnp.zeros(3)),
            ValueError,
            r"`coefficients` must have shape \(4,\)",
        ),
        (
            lambda: gradient_of(jnp.zeros(2), jnp.zeros((3, 2)), jnp.zeros(3, int)),
            TypeError,
            "SoftmaxRegression.gradient: `target` must have a floating dtype",
        ),
        (
            lambda: hessian_of(jnp.zeros(2), jnp.zeros((1, 3, 2)), jnp.zeros(3)),
            ValueError,
            "`design` must have shape .*vmap",
        ),
        (
            lambda: fit_softmax_regression(jnp.zeros((3, 2)), jnp.zeros(3), l2=-1),
            ValueError,
            "`l2` must be >= 0, got -1",
        ),
        (
            lambda: fit_softmax_regression(
                jnp.zeros((3, 2)), jnp.zeros(3), max_steps=0
            ),
            ValueError,
            "`max_steps` must be at least 1",
        ),
        (
            lambda: in_context_label_shift(
                jnp.zeros(2), jnp.zeros((3, 2)), jnp.zeros(3)
            ),
            ValueError,
            "`next_coefficients` or `next_design` must be given",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
