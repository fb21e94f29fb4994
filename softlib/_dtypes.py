"""The dtype policy: in which precision sums are kept and results are returned.

It holds whatever `jax_numpy_dtype_promotion` says. Under "strict" JAX asks for explicit
casts, so a function casts what it mixes to one of these dtypes.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def common_dtype(*operands: Any) -> DTypeLike:
    """The dtype that holds all of the arrays or dtypes; None is none of them."""
    given = [operand for operand in operands if operand is not None]
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*given)


def promoted(*operands: Any) -> tuple[Any, ...]:
    """Arrays in the dtype that holds all of them; a Python number stays what it is."""
    return cast(common_dtype(*operands), *operands)


def cast(dtype: DTypeLike, *operands: Any) -> tuple[Any, ...]:
    """Arrays in this dtype; a Python number stays what it is, it takes any."""
    number = lambda x: isinstance(x, int | float)
    return tuple(x if number(x) else jnp.asarray(x, dtype) for x in operands)


def accumulator_dtype(*operands: Any) -> DTypeLike:
    """Float32, or float64 as soon as one of the arrays or dtypes is; None is none."""
    given = [operand for operand in operands if operand is not None]
    dtypes = [getattr(operand, "dtype", operand) for operand in given]
    return common_dtype(*dtypes, jnp.float32)
