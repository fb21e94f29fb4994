"""Ids of classes, tokens or groups, of any integer dtype, told apart by their range."""

import jax.numpy as jnp
from jaxtyping import Array, Int, Integer


def labels_in_range(
    labels: Integer[Array, "*shape"], count: int
) -> Int[Array, "*shape"]:
    """The labels as int32, -1 where they are outside [0, count)."""
    if jnp.iinfo(labels.dtype).max < count:
        labels = labels.astype(jnp.int32)  # a narrow type cannot be compared with count
    valid = (labels >= 0) & (labels < count)
    return jnp.where(valid, labels, -1).astype(jnp.int32)
