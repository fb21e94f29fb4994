"""Numbers with an exponent of their own: values to the last place, algebra, edges."""

import math
import re

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from softlib import _error_free
from softlib._error_free import EXACT_RANGE
from softlib.numerics import (
    ExtendedFloat,
    extended_add,
    extended_exp,
    extended_log,
    extended_multiply,
    extended_sum,
    extended_to_float,
)
from tests.compiled import f32
from tests.host import jnp
from tests.oracles import extended as oracle

ZERO = ExtendedFloat(jnp.zeros(1), jnp.full(1, -jnp.inf))


def scores(scale, count=20_000, dtype="float32", seed=0):
    x = np.random.default_rng(seed).uniform(-scale, scale, count)
    return jnp.asarray(x, dtype)


# -------------------------------------------------------------------- the exponential
@pytest.mark.parametrize("scale", [1.0, 88.0, 1e3, 1e4, EXACT_RANGE])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_the_mantissa_is_right_to_its_last_place(scale, compiled):
    """Also where a compiler fuses products with sums, as XLA does on a CPU."""
    x = scores(scale)
    call = jax.jit(extended_exp) if compiled else extended_exp
    m, n = map(np.asarray, call(x))
    exact = oracle.exp_mantissa(x, n)
    np.testing.assert_array_less(oracle.last_places(m, exact), 0.7)
    np.testing.assert_array_equal(n, np.rint(n))
    assert 0.7 < m.min() < m.max() < 1.42


@pytest.mark.parametrize("scale", [88.0, EXACT_RANGE])
def test_the_cheaper_form_is_right_to_a_last_place(scale):
    m, n = map(np.asarray, jax.jit(_error_free.near_exp)(scores(scale)))
    exact = oracle.exp_mantissa(scores(scale), n)
    np.testing.assert_array_less(oracle.last_places(m, exact), 0.9)


@pytest.mark.parametrize("call", [extended_exp, _error_free.near_exp])
def test_jit_and_eager_differ_by_the_last_bit_at_most(call):
    x = scores(4e4)
    (m, n), (m_jit, n_jit) = call(x), jax.jit(call)(x)
    np.testing.assert_array_equal(n, n_jit)
    np.testing.assert_allclose(m, m_jit, rtol=1.2e-7)


def test_float64_stays_float64():
    with jax.enable_x64():
        x = scores(100.0, dtype="float64")
        m, n = extended_exp(x)
        assert m.dtype == n.dtype == np.dtype("float64")
        # A longdouble has 11 bits more, of which n log(2) takes 8.
        exact = oracle.exp_mantissa(x, n)
        np.testing.assert_array_less(oracle.last_places(m, exact, "float64"), 1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_floats_are_widened(dtype):
    x = scores(300.0, dtype=dtype)
    wide, widened = extended_exp(x), extended_exp(x.astype(jnp.float32))
    assert wide.mantissa.dtype == np.dtype("float32")
    np.testing.assert_array_equal(wide.mantissa, widened.mantissa)


def test_infinities_are_0_and_infinity_and_beyond_the_range_is_nan():
    inf, nan = np.inf, np.nan
    x = jnp.array([-inf, inf, nan, 46_000.0, -1e9, 0.0])
    for call in (extended_exp, jax.jit(extended_exp)):
        m, n = call(x)
        np.testing.assert_array_equal(m, [0, inf, nan, nan, nan, 1])
        np.testing.assert_array_equal(n, [-inf, inf, nan, nan, nan, 0])
    np.testing.assert_array_equal(extended_to_float(extended_exp(x[:2])), [0, inf])
    np.testing.assert_array_equal(extended_log(extended_exp(x[:2])), [-inf, inf])


def test_values_of_the_data_file(repository):
    case = np.load(repository / "tests/data/two_pass_softmax_case0.npz")
    m, n = map(np.asarray, jax.jit(extended_exp)(jnp.asarray(case["in_x"])))
    present = case["in_x"] > -np.inf
    np.testing.assert_array_equal(m[~present], 0)
    np.testing.assert_array_equal(n[~present], -np.inf)
    # Not the pair: a tie in the rounding of n may be broken the other way.
    found = np.log2(m[present].astype(np.float64)) + n[present]
    given_ = np.log2(case["out_mantissa"][present]) + case["out_exponent"][present]
    np.testing.assert_allclose(found, given_, rtol=0, atol=1.2e-7)


def test_no_exponential_is_called():
    x = jnp.ones(3)
    wide = extended_exp(x)
    for made in (
        jax.make_jaxpr(extended_exp)(x),
        jax.make_jaxpr(extended_add)(wide, wide),
        jax.make_jaxpr(extended_sum)(wide),
    ):
        assert not re.search(r"= (exp|exp2|pow)\b", str(made))


# ----------------------------------------------------------------------------- algebra
def numbers(seed, count=200):
    """Of any size and sign, with zeros."""
    rng = np.random.default_rng(seed)
    m = rng.uniform(0.5, 2, count) * rng.choice([-1, 1], count)
    n = np.rint(rng.uniform(-1, 1, count) * 10 ** rng.uniform(0, 4, count))
    absent = rng.random(count) < 0.1
    return ExtendedFloat(
        jnp.asarray(np.where(absent, 0, m), jnp.float32),
        jnp.asarray(np.where(absent, -np.inf, n), jnp.float32),
    )


def relative_error(found, exact):
    """Of extended numbers against fractions; 0 by 0 is 0."""
    return [
        float(abs(f - e) / abs(e)) if e else float(abs(f))
        for f, e in zip(oracle.value(*found), exact, strict=True)
    ]


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31))
def test_sums_and_products_round_once(seed):
    a, b = numbers(seed), numbers(seed + 1)
    # Numbers of one sign: what cancels has no relative error.
    b = ExtendedFloat(jnp.abs(b.mantissa) * jnp.sign(a.mantissa), b.exponent)
    left, right = oracle.value(*a), oracle.value(*b)
    total = [x + y for x, y in zip(left, right, strict=True)]
    product = [x * y for x, y in zip(left, right, strict=True)]
    assert max(relative_error(extended_add(a, b), total)) <= 2**-24
    assert max(relative_error(extended_multiply(a, b), product)) <= 2**-24
    for x, y in zip(extended_add(a, b), extended_add(b, a), strict=True):
        np.testing.assert_array_equal(x, y)


def test_zero_is_neutral():
    a = extended_exp(jnp.array([5000.0]))
    for x, y in zip(extended_add(a, ZERO), a, strict=True):
        np.testing.assert_array_equal(x, y)
    for total in (extended_add(ZERO, ZERO), extended_multiply(ZERO, ZERO)):
        assert total.mantissa == 0
        assert total.exponent == -np.inf


def test_a_long_product_stays_in_range():
    a = extended_exp(jnp.full(1, 700.3, jnp.float32))

    @jax.jit
    def power(a):
        step = lambda total, _: (extended_multiply(total, a), None)
        return jax.lax.scan(step, a, length=999)[0]

    found = power(a)
    assert 1 <= found.mantissa[0] < 2
    exact = 1000 * np.float64(f32(700.3))
    np.testing.assert_allclose(extended_log(found), [exact], rtol=1e-7)


def rows_last(array, axis):
    axes = range(array.ndim) if axis is None else np.atleast_1d(axis)
    axes = sorted(int(a) % array.ndim for a in axes)
    array = np.moveaxis(array, axes, range(-len(axes), 0))
    return array.reshape(*array.shape[: array.ndim - len(axes)], -1)


@pytest.mark.parametrize("axis", [-1, 0, (0, 2), None])
@pytest.mark.parametrize("keepdims", [False, True])
def test_sum_over_axes_of_what_counts(axis, keepdims):
    rng = np.random.default_rng(0)
    x = f32(rng.normal(size=(3, 5, 4)) * 300)
    where = rng.random((5, 4)) < 0.5
    where[:, 0] = False

    @jax.jit
    def log_sum(x, where):
        total = extended_sum(extended_exp(x), axis, where=where, keepdims=keepdims)
        return extended_log(total)

    absent = np.where(where, np.float64(x), -np.inf)
    expected = np.logaddexp.reduce(rows_last(absent, axis), axis=-1)
    found = log_sum(np.where(where, x, f32(np.nan)), where)
    assert found.ndim == (3 if keepdims else np.ndim(expected))
    np.testing.assert_allclose(np.ravel(found), np.ravel(expected), rtol=4e-7)


def test_nothing_sums_to_0():
    total = extended_sum(extended_exp(jnp.zeros((2, 0))))
    np.testing.assert_array_equal(total.mantissa, 0)
    np.testing.assert_array_equal(total.exponent, -np.inf)
    nothing = extended_sum(extended_exp(jnp.zeros(3)), where=jnp.zeros(3, bool))
    assert extended_log(nothing) == -np.inf


def test_an_associative_scan_sums_prefixes():
    x = scores(500.0, count=64)
    found = jax.jit(
        lambda x: extended_log(jax.lax.associative_scan(extended_add, extended_exp(x)))
    )(x)
    expected = np.logaddexp.accumulate(np.asarray(x, np.float64))
    np.testing.assert_allclose(found, expected, rtol=2.5e-7)


def test_the_logarithm_undoes_the_exponential():
    """Which a single product with log(2) would not: 2^-25 of 40000 is 0.001."""
    for x in (scores(1.0), scores(100.0), scores(4e4)):
        found = jax.jit(lambda x: extended_log(extended_exp(x)))(x)
        exact = np.asarray(x, np.float64)
        unit = np.spacing(np.maximum(np.abs(np.asarray(x)), 1))
        np.testing.assert_array_less(np.abs(found - exact) / unit, 1.01)


def test_ordinary_numbers_come_back():
    x = jnp.array([-1000.0, -87.0, -1.0, 0.0, 88.5, 1000.0])
    found = jax.jit(lambda x: extended_to_float(extended_exp(x)))(x)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(found, np.exp(np.asarray(x)), rtol=1.2e-7)
    large = ExtendedFloat(jnp.array([2.0**100, 2.0**-100]), jnp.array([-180.0, 180.0]))
    np.testing.assert_array_equal(extended_to_float(large), [2.0**-80, 2.0**80])


def test_powers_of_two_are_exact():
    n = jnp.arange(-300.0, 300.0)
    found = np.asarray(jax.jit(_error_free.power_of_two)(n), np.float64)
    exact = np.exp2(np.clip(np.asarray(n, np.float64), -300, 127))
    np.testing.assert_array_equal(found, np.where(n < -126, 0, exact))
    with jax.enable_x64():
        n = jnp.arange(-1022.0, 1024.0)
        np.testing.assert_array_equal(_error_free.power_of_two(n), np.exp2(n))


# ---------------------------------------------------------- numbers in two parts
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_a_sum_and_its_error_are_the_exact_sum(compiled):
    rng = np.random.default_rng(0)
    a, b = (
        jnp.asarray(rng.normal(size=999) * 10 ** rng.uniform(-9, 9, 999), jnp.float32)
        for _ in range(2)
    )
    call = jax.jit(_error_free.exact_sum) if compiled else _error_free.exact_sum
    total, error = call(a, b)
    for x, y, s, e in zip(*map(np.asarray, (a, b, total, error)), strict=True):
        assert math.fsum([x, y]) == math.fsum([s, e])


@pytest.mark.parametrize("length", [0, 1, 2, 3, 7, 64, 1001])
def test_a_long_sum_keeps_its_error(length):
    x = np.random.default_rng(0).lognormal(0, 4, (3, length)).astype(np.float32)
    high, low = jax.jit(_error_free.sum_pair)(jnp.asarray(x))
    assert high.shape == low.shape == (3, 1)
    for row, h, e in zip(x, np.ravel(high), np.ravel(low), strict=True):
        exact = math.fsum(row)
        assert abs(math.fsum([h, e, -exact])) <= 2.0**-44 * exact


def test_quotients_and_logarithms_of_pairs():
    rng = np.random.default_rng(0)
    high = jnp.asarray(rng.uniform(0.7, 1.4, 5000), jnp.float32)
    total = jnp.asarray(10 ** rng.uniform(0, 6, 5000), jnp.float32)
    small = lambda x: x * jnp.asarray(rng.uniform(-(2**-25), 2**-25, 5000), jnp.float32)
    low, total_low = small(high), small(total)
    add = lambda x, y: np.asarray(x, np.float64) + np.asarray(y, np.float64)
    found = jax.jit(_error_free.quotient)(high, low, total, total_low)
    exact = add(high, low) / add(total, total_low)
    np.testing.assert_array_less(oracle.last_places(found, exact), 0.52)
    x = jnp.asarray(10 ** rng.uniform(-30, 6, 5000), jnp.float32)
    first, rest = jax.jit(_error_free.log1p_pair)(x, small(x))
    exact = np.log1p(np.asarray(x, np.float64))
    np.testing.assert_array_less(oracle.last_places(add(first, rest), exact), 0.6)


# ------------------------------------------------------------------------- derivatives
def test_derivatives_are_those_of_the_numbers():
    with jax.enable_x64():
        x = jnp.array([800.0, 801.5, -jnp.inf, 799.0])
        wide = lambda x: extended_log(extended_sum(extended_exp(x)))
        plain = lambda x: jax.nn.logsumexp(x)
        one, two = (jax.jit(jax.hessian(f))(x) for f in (wide, plain))
        np.testing.assert_allclose(one, two, rtol=1e-12, atol=1e-15)
        one, two = (jax.jit(jax.grad(f))(x) for f in (wide, plain))
        np.testing.assert_allclose(one, two, rtol=1e-12, atol=1e-15)
        number = lambda x: extended_to_float(
            extended_multiply(extended_exp(x), extended_exp(-x + 0.5 * x * x))
        )
        gradient = jax.jit(jax.grad(jax.grad(number)))
        exact = (1 + 0.3**2) * np.exp(0.5 * 0.3**2)
        np.testing.assert_allclose(gradient(jnp.float64(0.3)), exact, rtol=1e-13)


def test_0_has_no_gradient():
    gradient = jax.grad(lambda x: extended_to_float(extended_exp(x)).sum())
    np.testing.assert_array_equal(gradient(jnp.array([-jnp.inf, 0.0])), [0, 1])


# ------------------------------------------------------------------------------ errors
@pytest.mark.usefixtures("untyped")
def test_errors():
    wide = extended_exp(jnp.zeros((2, 3)))
    with pytest.raises(TypeError, match="extended_exp: `x` must have a floating"):
        extended_exp(jnp.zeros(2, int))
    with pytest.raises(ValueError, match="extended_sum: `axis` must hold axes of"):
        extended_sum(wide, 2)
    with pytest.raises(TypeError, match="extended_sum: `where` must have dtype bool"):
        extended_sum(wide, where=jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match="extended_sum: `where` must broadcast"):
        extended_sum(wide, where=jnp.zeros((2, 2), bool))
