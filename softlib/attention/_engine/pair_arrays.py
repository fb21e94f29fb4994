"""Boolean arrays and biases over pairs of queries and keys, as kernels take them."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from . import large_steps
from .stream import BackwardOperands
from .tiles import Operands, Options

NOTE = "; the gradient of `bias`, where it is used, is that of plain JAX"


def is_matrix(x: Any) -> bool:
    """Whether an array over pairs varies over both axes of a pair."""
    return 1 not in x.shape[2:]


def stored(operands: Operands) -> tuple[Array | None, Array | None]:
    """The boolean array and the bias, in the dtypes that kernels read.

    Matrices are large, so their numbers are small; others are of 32 bits.
    """

    def cast(x: Array | None, matrix: Any, other: Any) -> Array | None:
        return None if x is None else x.astype(matrix if is_matrix(x) else other)

    bias = operands.bias
    return (
        cast(operands.dense, jnp.int8, jnp.int32),
        cast(bias, None if bias is None else bias.dtype, jnp.float32),
    )


def bias_gradient(options: Options, given: BackwardOperands) -> Array | None:
    """The gradient of the bias, by plain JAX in large steps; None without a bias.

    Its tiles may be shared by batch entries and heads, which kernels compute apart
    from each other: here they are added up in a fixed order. A compiled program has it
    only if it is used.
    """
    if given.operands.bias is None:
        return None
    return large_steps.backward(options, given, 1).bias
