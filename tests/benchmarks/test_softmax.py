"""The benchmark of softmax: its programs compute the same, and its page says it."""

import jax
import numpy as np
import pytest

from benchmarks import softmax
from tests.host import jnp


@pytest.mark.parametrize("case", softmax.CASES, ids=lambda case: case.name)
def test_all_programs_of_a_case_compute_the_same(case):
    x = jax.random.normal(jax.random.key(0), (8, 64))
    expected = jax.jit(case.programs["jax.nn"])(x)
    for program in case.programs.values():
        np.testing.assert_allclose(jax.jit(program)(x), expected, rtol=1e-5)
    assert case.limit in softmax.LIMITS


def test_a_donated_argument_is_followed_by_its_result():
    call = softmax.compiled(lambda x: x + 1, jnp.zeros((2, 3)), donated=True)
    first, second = jnp.array(call()), call()
    np.testing.assert_array_equal(second, first + 1)


def test_the_page():
    line = softmax.Line((8, 16), "softmax", "softlib", 1.5, "0.50 (0.40-0.60)", 0.25)
    page = softmax.markdown([line])
    assert "| 8 x 16 | softmax | softlib | 1.50 | 0.50 (0.40-0.60) | 0.25 |" in page
