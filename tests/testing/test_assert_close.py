"""`assert_close` accepts rounding and nothing else, and says where and how much."""

import numpy as np
import pytest

from softlib.testing import assert_close
from tests.host import jnp


def test_accepts_errors_within_the_bound_and_rejects_those_beyond():
    oracle = np.array([[1.0, -3.0], [0.5, 2.0]])
    tolerance = 4 * 2.0**-23 * 10 * 3  # c * eps * sqrt(length) * max|oracle|
    for factor, accepted in ((0.99, True), (1.01, False)):
        actual = oracle + np.array([[0, 0], [factor * tolerance, 0]])
        if accepted:
            assert_close(actual, oracle, dtype=jnp.float32, length=100)
        else:
            with pytest.raises(AssertionError, match=r"index \(1, 0\), 1\.01 times"):
                assert_close(actual, oracle, dtype=jnp.float32, length=100)


def test_message_counts_the_wrong_elements():
    with pytest.raises(AssertionError, match=r"error 2 at index \(2\).*2 of 3 elem"):
        assert_close([0.0, 1.0, 2.0], np.zeros(3), dtype="float32", length=1)


def test_tolerance_does_not_fall_below_that_of_one():
    assert_close(1e-7, 0.0, dtype="float32", length=1)
    with pytest.raises(AssertionError, match="times the tolerance"):
        assert_close(1e-6, 0.0, dtype="float32", length=1)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_reads_every_dtype(dtype):
    third = jnp.asarray(1 / 3, dtype)
    assert_close(third, np.float64(1 / 3), dtype=dtype, length=1)
    with pytest.raises(AssertionError, match=jnp.dtype(dtype).name):
        assert_close(2 * third, np.float64(1 / 3), dtype=dtype, length=1)


def test_infinities_and_nans_must_stand_in_the_same_places():
    special = np.array([np.inf, -np.inf, np.nan, 1.0])
    assert_close(special, special, dtype="float32", length=1)
    for wrong in ([-np.inf, np.inf, 1.0, np.nan], [1e30, -np.inf, np.nan, 1.0]):
        with pytest.raises(AssertionError, match=r"error inf at index \(0\)"):
            assert_close(wrong, special, dtype="float32", length=1)
    with pytest.raises(AssertionError, match="error inf"):
        assert_close([np.nan], [0.0], dtype="float32", length=1)


def test_an_infinite_oracle_does_not_widen_the_tolerance():
    with pytest.raises(AssertionError, match=r"index \(1\)"):
        assert_close([np.inf, 1.1], [np.inf, 1.0], dtype="float32", length=1)


def test_nothing_is_broadcast():
    with pytest.raises(AssertionError, match=r"\(1,\) and oracle \(2,\)"):
        assert_close(np.zeros(1), np.zeros(2), dtype="float32", length=1)


def test_empty_arrays_are_close():
    assert_close(np.zeros((0, 3)), np.zeros((0, 3)), dtype="float32", length=0)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtype": "int32", "length": 1}, TypeError, "`dtype`.*floating.*int32"),
        ({"dtype": "float32", "length": -1}, ValueError, "`length`.*got -1"),
        ({"dtype": "float32", "length": 1, "c": -2.0}, ValueError, "`c`.*got -2"),
    ],
)
def test_error_names_argument_condition_and_value(options, error, message):
    with pytest.raises(error, match=message):
        assert_close(0.0, 0.0, **options)
