"""Polynomials for exp: certified, shortest, and exact to the last digits."""

import math
from fractions import Fraction

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from softlib.attention._polynomial.exp_polynomial import (
    BASES,
    LARGEST_BOUND,
    exp_polynomial,
    exp_polynomial_error,
    taylor_factors_by_row,
)
from tests.host import jnp
from tests.oracles import polynomial_attention as oracle


def relative_error(coefficients, bound):
    x = np.linspace(-bound, bound, 20001)
    values = np.polynomial.polynomial.polyval(x, coefficients)
    return np.abs(values / np.exp(x) - 1).max()


@pytest.mark.parametrize(
    ("bound", "basis", "degrees"),
    [
        (1.0, "taylor", (4, 5, 6)),
        (1.0, "chebyshev", (3, 4, 5)),
        (3.375, "taylor", (12, 13, 15)),
        (3.375, "chebyshev", (8, 9, 10)),
    ],
)
def test_degrees(bound, basis, degrees):
    for rtol, degree in zip((1e-1, 1e-2, 1e-3), degrees, strict=True):
        assert exp_polynomial(bound, rtol, basis=basis).shape == (degree + 1,)


@hypothesis.given(
    bound=st.floats(1e-3, 17.5),
    rtol=st.floats(1e-12, 0.99),
    basis=st.sampled_from(BASES),
)
def test_the_least_degree_that_is_certified(bound, rtol, basis):
    rounding = math.exp(2 * bound) * 2.0**-52
    hypothesis.assume(rtol > rounding)
    coefficients = exp_polynomial(bound, rtol, basis=basis)
    degree = len(coefficients) - 1
    certified = exp_polynomial_error(bound, degree, basis=basis)
    assert certified <= rtol
    if degree:
        assert exp_polynomial_error(bound, degree - 1, basis=basis) > rtol
    assert relative_error(coefficients, bound) <= certified + 4 * rounding


def exact_tail(bound, degree, basis):
    """Without e^bound, a fraction: the certificate of which the float is a bound."""
    x, terms = Fraction(bound), 60
    if basis == "taylor":
        return x ** (degree + 1) / math.factorial(degree + 1)
    return 2 * sum(
        (x / 2) ** (2 * j + i) / (math.factorial(j) * math.factorial(i + j))
        for i in range(degree + 1, degree + terms)
        for j in range(terms)
    )


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("bound", [0.125, 1.0, 7.5])
@pytest.mark.parametrize("degree", [0, 1, 6, 20])
def test_a_certificate_is_an_upper_bound_and_tight(bound, degree, basis):
    exact = float(exact_tail(bound, degree, basis)) * math.exp(bound)
    found = exp_polynomial_error(bound, degree, basis=basis)
    assert exact <= found <= exact * (1 + 1e-11)


def test_certificates_of_extreme_bounds_are_floats():
    for basis in BASES:
        assert exp_polynomial_error(1e4, 3, basis=basis) == math.inf
        assert 0 < exp_polynomial_error(1e-200, 3, basis=basis) < 1e-300
        assert 0 < exp_polynomial_error(500.0, 1500, basis=basis) < math.inf


@pytest.mark.parametrize("bound", [0.3, 3.0, 9.0])
def test_chebyshev_coefficients_are_those_of_the_series(bound):
    coefficients = exp_polynomial(bound, 1e-3)
    degree = len(coefficients) - 1
    # The conversion of the oracle loses digits as 2.4^degree.
    y = np.polynomial.chebyshev.cheb2poly(oracle.series(bound, degree))
    expected = y / bound ** np.arange(degree + 1)
    scale = np.exp(bound) / bound ** np.arange(degree + 1)
    np.testing.assert_array_less(
        np.abs(coefficients - expected) / scale, 1e-15 * 2.5**degree
    )


def test_taylor_coefficients_are_inverse_factorials():
    found = exp_polynomial(2.0, 1e-4, basis="taylor")
    expected = [1 / math.factorial(k) for k in range(len(found))]
    np.testing.assert_array_equal(found, expected)


def test_a_small_bound_leaves_the_taylor_polynomial():
    found = exp_polynomial(1e-4, 1e-14)
    expected = [1 / math.factorial(k) for k in range(len(found))]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("degree", [0, 3, 9, 24])
def test_polynomials_of_an_array_of_bounds(degree, dtype):
    bounds = [0.0, 1e-3, 1.0, 3.4, 8.0, LARGEST_BOUND]
    with jax.enable_x64(dtype == "float64"):
        rows = jnp.asarray([bounds], dtype)
        found = jax.jit(taylor_factors_by_row, static_argnums=1)(rows, degree)
        assert found.dtype == dtype
    assert found.shape == (1, degree + 1, len(bounds))
    eps = np.finfo(dtype).eps
    factorials = [math.factorial(k) for k in range(degree + 1)]
    for bound, row in zip(bounds, np.asarray(found[0], np.float64).T, strict=True):
        if bound == 0:
            np.testing.assert_allclose(row, 1, rtol=2 * eps)
            continue
        x = np.linspace(-bound, bound, 101)
        values = np.polynomial.polynomial.polyval(x, row / factorials)
        expected = oracle.polynomial("chebyshev", degree, bound)(x, None)
        assert np.abs(values - expected).max() < 20 * eps * np.exp(bound)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("function", "arguments", "error", "message"),
    [
        (exp_polynomial, (0.0, 0.1), ValueError, "`bound` must be positive"),
        (exp_polynomial, (math.nan, 0.1), ValueError, "`bound` must be positive"),
        (exp_polynomial, (jnp.ones(()), 0.1), TypeError, "`bound` must be a Python"),
        (exp_polynomial, (18.5, 0.1), ValueError, "`bound` must be at most 18, .*18.5"),
        (exp_polynomial, (1.0, 0), ValueError, "`rtol` must be positive"),
        (exp_polynomial, (1.0, 1.0), ValueError, "`rtol` must be below 1, got 1.0"),
        (exp_polynomial, (9.0, 1e-9), ValueError, "at least 1.5e-08 .*9.0, .*1e-09"),
        (exp_polynomial, (1.0, "1"), TypeError, "`rtol` must be a Python number"),
        (exp_polynomial_error, (-1.0, 2), ValueError, "`bound` must be positive"),
        (exp_polynomial_error, (1.0, -1), ValueError, "`degree` must be non-negative"),
        (exp_polynomial_error, (1.0, 2.0), TypeError, "`degree` must be a Python int"),
    ],
)
def test_errors_name_the_argument(function, arguments, error, message):
    with pytest.raises(error, match=f"{function.__name__}: .*{message}"):
        function(*arguments)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("call", [exp_polynomial, exp_polynomial_error])
def test_unknown_basis(call):
    with pytest.raises(ValueError, match=r"`basis` must be one of .*got 'legendre'"):
        call(1.0, {exp_polynomial: 0.1}.get(call, 3), basis="legendre")
