"""The one reduction of the library."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Num

from ._array_arguments import array_arguments
from ._checks import require_axes, require_boolean, require_broadcastable
from ._dtypes import accumulator_dtype


@array_arguments(as_given=("values",))
def masked_mean(
    values: Num[Array, "*shape"] | Bool[Array, "*shape"],
    where: Bool[Array, "..."] | None = None,
    *,
    axis: int | tuple[int, ...] | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Float[Array, "..."]:
    r"""Mean of the values that count: $\sum_i w_i x_i / \max(1, \sum_i w_i)$.

    Reduces per-example losses to the number that is trained on. An empty selection
    gives 0 with gradient 0, not 0/0, so a batch that is all padding does no harm.

    Args:
        values: Numbers or booleans (the mean of booleans is an accuracy).
        where: True for the entries that count; broadcasts to `values`. Entries where it
            is False may hold anything, NaN included: neither the mean nor the gradient
            sees them. None counts all.
        axis: Static; the axes to reduce, None for all.
        axis_name: Static; names of mapped axes (`jax.shard_map`, `jax.vmap`) to reduce
            over as well. Sum and count are both summed over them, so shards with
            different numbers of valid entries weigh by their entries.

    Returns:
        The mean, float32 (float64 for float64 values). 0 where nothing counts.

    Raises:
        TypeError: `where` is not boolean, or `values` is complex.
        ValueError: `where` does not broadcast to the shape of `values`, or `axis` is
            not one of its axes.

    Derivatives: forward and reverse mode, any order; `where` has none.
    Cost: one pass over `values`; nothing but `where` is kept for the backward pass.

    Example:
        >>> losses = jnp.array([1.0, 3.0, jnp.nan])
        >>> print(softlib.masked_mean(losses, jnp.array([True, True, False])))
        2.0
        >>> print(softlib.masked_mean(losses, jnp.zeros(3, bool)))
        0.0
    """
    function = "masked_mean"
    values = jnp.asarray(values)
    if jnp.issubdtype(values.dtype, jnp.complexfloating):
        raise TypeError(
            f"{function}: `values` must be real numbers or booleans, "
            f"got {values.dtype}."
        )
    require_axes(function, "axis", axis, values.ndim)
    dtype = accumulator_dtype(values)
    if where is None:
        where = jnp.ones((), bool)
    where = jnp.asarray(where)
    require_boolean(function, where=where)
    require_broadcastable(
        function, "where", where, values.shape, "the shape of `values`"
    )
    where = jnp.broadcast_to(where, values.shape)
    total = jnp.where(where, values.astype(dtype), 0).sum(axis)
    count = where.sum(axis, dtype=jnp.int32)  # exact beyond 2**24, unlike float32
    if axis_name is not None:
        total, count = lax.psum((total, count), axis_name)
    return total / jnp.maximum(count, 1).astype(dtype)
