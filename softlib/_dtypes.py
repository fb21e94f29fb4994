"""The dtype policy: the precision of sums and results.

It does not depend on `jax_numpy_dtype_promotion`. Under "strict" JAX asks for explicit
casts, so functions cast operands to one of these dtypes.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def common_dtype(*operands: Any) -> jnp.dtype:
    """The dtype that holds all of the arrays or dtypes; None is left out."""
    given = [operand for operand in operands if operand is not None]
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*given)


def promoted(*operands: Any) -> tuple[Any, ...]:
    """Arrays cast to the dtype that holds all of them; Python numbers are kept."""
    return cast(common_dtype(*operands), *operands)


def cast(dtype: DTypeLike, *operands: Any) -> tuple[Any, ...]:
    """Arrays cast to this dtype; Python numbers are kept."""
    number = lambda x: isinstance(x, int | float)
    return tuple(x if number(x) else jnp.asarray(x, dtype) for x in operands)


def accumulator_dtype(*operands: Any) -> jnp.dtype:
    """Float64 if one of the arrays or dtypes is, else float32; None is left out."""
    given = [operand for operand in operands if operand is not None]
    dtypes = [getattr(operand, "dtype", operand) for operand in given]
    return common_dtype(*dtypes, jnp.float32)
