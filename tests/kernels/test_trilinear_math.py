"""Integer arithmetic of the kernels for pairs of keys."""

import numpy as np
import pytest

from pallas_kernels.tpu import trilinear_math
from tests.host import jnp


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 12])
def test_quotient_is_that_of_a_division(size):
    """By a shift for powers of two, by comparisons for the others."""
    count = 7
    x = np.arange(count * size, dtype=np.int32)
    found = trilinear_math.quotient(jnp.asarray(x), size, count)
    np.testing.assert_array_equal(found, x // size)
