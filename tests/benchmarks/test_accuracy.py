"""The accuracy benchmark: its exact forms, its measure of errors, its page."""

import jax
import numpy as np
import pytest

from benchmarks import accuracy
from benchmarks.accuracy import Decade, Function, Results
from tests.host import jnp


@pytest.mark.parametrize("name", accuracy.FUNCTIONS)
def test_the_exact_form_is_that_of_the_function(name):
    function = accuracy.FUNCTIONS[name]
    x = accuracy.scores(0, 6, "float32")
    exact = function.exact(np.asarray(x).astype(accuracy.LONG))
    found = jax.jit(function.programs["softlib"])(x)
    atol = float(4e-6 * np.abs(exact).max())
    np.testing.assert_allclose(found, np.float64(exact), atol=atol)


def test_the_losses_of_optax_are_the_logarithm_of_the_softmax():
    x = accuracy.scores(0, 6, "float32")
    expected = jax.nn.log_softmax(x)
    found = jax.jit(accuracy.optax_log_softmax)(x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_scores_are_of_the_size_that_the_table_says():
    x = np.abs(np.asarray(accuracy.scores(3, 5, "float32")))
    assert x.min() >= 1e3
    assert x.max() <= 1e4
    assert np.asarray(accuracy.scores(-6, 5, "bfloat16")).dtype == jnp.bfloat16


def test_errors_are_in_units_of_the_last_place():
    exact = np.array([1.0, 1.5, 0.75, 1e-44], accuracy.LONG)
    found = jnp.array([1 + 2.0**-23, 1.5, 0.75 - 3 * 2.0**-24, 0.0])
    error = accuracy.last_places(found, exact, "float32")
    np.testing.assert_array_equal(error, [1, 0, 3])  # the last is not normal
    found = jnp.array([1 + 2.0**-7, 1.5, 0.75, 0.0], jnp.bfloat16)
    error = accuracy.last_places(found, exact, "bfloat16")
    np.testing.assert_array_equal(error, [1, 0, 0])


def test_a_missing_peer_is_a_reason():
    function = Function(accuracy.log_softmax, {"softlib": abs}, "no_such_function")
    found = dict(accuracy.programs(function))
    if isinstance(found["PyTorch"], str):  # else the name is looked up when called
        assert "not installed" in found["PyTorch"]


def decades():
    return [
        Decade(name, program, dtype, low, 2.0 ** (low + 1), 0.25)
        for name in accuracy.DRAWN
        for program in ("jax.nn", "softlib compensated")
        for dtype in accuracy.DTYPES
        for low in (0, 1, 2)
    ]


def test_the_page_names_the_worst_decade_and_who_is_missing():
    results = Results(
        decades(), {"softmax": {"jax.nn": "1.0"}}, {"PyTorch": "not installed: torch"}
    )
    page = accuracy.markdown(results)
    assert "| jax.nn | 8 | 1e2 | 0.25 | 8 | 1e2 | 0.25 | 1.0 |" in page
    assert "| softlib compensated | 8 | 1e2 | 0.25 | 8 | 1e2 | 0.25 | - |" in page
    assert "- PyTorch: not installed: torch." in page


def test_a_picture_is_drawn(tmp_path):
    accuracy.draw(decades(), tmp_path / "a" / "picture.png")
    assert (tmp_path / "a" / "picture.png").stat().st_size > 10_000
