"""The dtype policy: in which precision sums are kept and results are returned."""

from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike


def accumulator_dtype(*arrays: Any) -> DTypeLike:
    """Float32, or float64 as soon as one of the arrays is float64; None is none."""
    dtypes = [array.dtype for array in arrays if array is not None]
    return jnp.promote_types(jnp.result_type(*dtypes), jnp.float32)
