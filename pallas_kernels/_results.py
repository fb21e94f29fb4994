"""Results of kernels, as shard_map wants them declared."""

from typing import Any

import jax
from jax.sharding import ManualAxisType


def result(shape: tuple[int, ...], dtype: Any, *operands: Any) -> jax.ShapeDtypeStruct:
    """A result that varies over every mesh axis over which an operand varies."""
    axes = frozenset[str]().union(
        *(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(operands))
    )
    return jax.ShapeDtypeStruct(
        shape, dtype, manual_axis_type=ManualAxisType(varying=axes)
    )
