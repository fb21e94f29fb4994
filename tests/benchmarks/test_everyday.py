"""The benchmark of everyday functions: its programs compute the same."""

import jax
import numpy as np
import pytest

from benchmarks import everyday


@pytest.mark.parametrize("case", everyday.CASES, ids=lambda case: case.name)
def test_all_programs_of_a_case_compute_the_same(case):
    arrays = case.arrays(*case.quick)
    first, *others = case.programs.values()
    expected = jax.tree.leaves(jax.jit(first)(*arrays))
    for program in others:
        found = jax.tree.leaves(jax.jit(program)(*arrays))
        for got, want in zip(found, expected, strict=True):
            assert (got.shape, got.dtype) == (want.shape, want.dtype)
            if case.random:
                continue
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_the_page():
    page = everyday.markdown([["loss", "8 x 16", "softlib", "1.50", "0.50", "0.1"]])
    assert "| loss | 8 x 16 | softlib | 1.50 | 0.50 | 0.1 |" in page
