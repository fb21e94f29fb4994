"""Floats of few bits: vectors, formats of ml_dtypes, every code, bounds, errors."""

import pathlib
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from softlib.quantize import FloatFormat
from tests.host import jnp

DATA = (
    pathlib.Path(__file__).parent.parent / "data/generalized_gaussian_priors_case0.npz"
)
LAYOUTS = [(1, 2), (2, 5), (3, 4), (4, 3), (5, 2), (7, 0)]


def codes_of(layout: tuple[int, int]) -> np.ndarray:
    return np.arange(2 ** (1 + sum(layout)), dtype=np.uint8)


def test_matches_independent_vectors():
    with jax.enable_x64(), np.load(DATA) as data:
        found = FloatFormat(4, 3, 7).round(jnp.asarray(data["in_x"]))
        np.testing.assert_array_equal(found, data["out_round_e4m3_bias7"])


@pytest.mark.parametrize(
    ("name", "layout", "bias"),
    [("float8_e4m3fnuz", (4, 3), 8), ("float8_e5m2fnuz", (5, 2), 16)],
)
def test_codes_are_those_of_ml_dtypes(name, layout, bias):
    dtype = getattr(ml_dtypes, name)
    own = FloatFormat(layout[0], layout[1], bias)
    wanted = codes_of(layout).view(dtype).astype(np.float32)
    np.testing.assert_array_equal(own.decode(jnp.asarray(codes_of(layout))), wanted)
    x = np.random.default_rng(0).normal(size=2000) * 10.0 ** np.arange(-6, 4).repeat(
        200
    )
    x = x[np.abs(x) < own.largest].astype(np.float32)
    codes = own.encode(jnp.asarray(x))
    expected = x.astype(dtype).view(np.uint8)
    np.testing.assert_array_equal(codes, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_number_is_its_own_nearest(layout):
    own = FloatFormat(*layout)
    codes = jnp.asarray(codes_of(layout))
    numbers = own.decode(codes)
    np.testing.assert_array_equal(own.encode(numbers), codes)
    np.testing.assert_array_equal(own.round(numbers), numbers)
    assert np.nanmax(numbers) == own.largest
    assert np.isnan(numbers).sum() == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rounding_is_to_the_nearest_within_its_bounds(layout):
    own = FloatFormat(*layout)
    numbers = np.asarray(own.decode(jnp.asarray(codes_of(layout))), np.float64)
    numbers = np.sort(numbers[~np.isnan(numbers)])
    random = np.random.default_rng(0)
    x = random.normal(size=500) * np.exp2(random.uniform(-12, 8, 500))
    x = np.clip(x, -own.largest, own.largest).astype(np.float32)
    found = np.asarray(own.round(jnp.asarray(x)), np.float64)
    nearest = np.abs(x[:, None] - numbers).min(1)
    np.testing.assert_array_equal(np.abs(found - x), nearest)
    bound = np.maximum(own.relative_error * np.abs(x), own.subnormal_error)
    assert (nearest <= bound).all()
    np.testing.assert_array_equal(own.decode(own.encode(jnp.asarray(x))), found)


# ---------------------------------------------------------------------------- promises
def test_ties_go_to_even_and_what_is_too_large_saturates():
    own = FloatFormat(4, 3)
    x = jnp.array([1 + 1 / 16, 1 + 3 / 16, -1e9, jnp.inf, jnp.nan, 0.0])
    wanted = [1, 1.25, -480, 480, np.nan, 0]
    np.testing.assert_array_equal(own.round(x), wanted)
    np.testing.assert_array_equal(own.decode(own.encode(x)), wanted)
    assert own.encode(jnp.array([-1e-9]))[0] == 0
    assert own.round(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_a_code_that_the_format_has_not_is_nan():
    assert jnp.isnan(FloatFormat(2, 1).decode(jnp.array([200], jnp.uint8))[0])


def test_programs_batches_and_derivatives():
    own = FloatFormat(3, 4)
    x = jnp.linspace(-3.0, 3.0, 12).reshape(3, 4)
    np.testing.assert_array_equal(jax.jit(jax.vmap(own.encode))(x), own.encode(x))
    np.testing.assert_array_equal(jax.grad(lambda x: own.round(x).sum())(x), 0 * x)


@pytest.mark.usefixtures("untyped")
def test_errors_name_the_field():
    make: Any = FloatFormat
    with pytest.raises(
        ValueError, match=r"^FloatFormat: `mantissa_bits` .* got 4 beside 4"
    ):
        make(4, 4)
    with pytest.raises(ValueError, match=r"`exponent_bits` must be at least 1, got 0"):
        make(0, 3)
    with pytest.raises(ValueError, match=r"`bias` must keep all .* float32, got 130"):
        make(7, 0, 130)
    with pytest.raises(TypeError, match=r"^FloatFormat: `x` must have a floating"):
        make(4, 3).round(jnp.array([1]))
