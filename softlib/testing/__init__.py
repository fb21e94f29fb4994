"""Comparisons and checks for tests of softlib, and of code built on it.

- `assert_close`: a result against its oracle, within a bound that follows from the
  arithmetic.
- `check_transformations`: one function through every transformation of JAX.
- `check_mask`: a mask of one's own, by looking at every pair.
- `TRANSFORMATIONS`: the names of these checks.
"""

from ._assert_close import assert_close as assert_close
from ._check_mask import check_mask as check_mask
from ._transformations import (
    TRANSFORMATIONS as TRANSFORMATIONS,
    check_transformations as check_transformations,
)

__all__ = ["TRANSFORMATIONS", "assert_close", "check_mask", "check_transformations"]
