"""Result types of kernels, as `shard_map` requires them."""

from typing import Any

import jax
from jax.sharding import ManualAxisType


def result(shape: tuple[int, ...], dtype: Any, *operands: Any) -> jax.ShapeDtypeStruct:
    """The type of a result that varies over every mesh axis of an operand."""
    axes = frozenset[str]().union(
        *(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(operands))
    )
    return jax.ShapeDtypeStruct(
        shape, dtype, manual_axis_type=ManualAxisType(varying=axes)
    )
