"""The greatest entries of rows, without a full sort."""

from jax import lax
from jaxtyping import Array, Int, Shaped


def largest(
    x: Shaped[Array, "*rows n"], k: int
) -> tuple[Shaped[Array, "*rows k"], Int[Array, "*rows k"]]:
    """The `k` greatest entries of each row and their indices, as `lax.top_k`.

    Barriers keep XLA from replacing it by a full sort where results have several uses.
    Each result has its own: jaxlib 0.11 crashes at a joint one within `shard_map`.
    """
    values, places = lax.top_k(x, k)
    return lax.optimization_barrier(values), lax.optimization_barrier(places)
