"""The greatest entries of rows, found by a search and not by a sort."""

from jax import lax
from jaxtyping import Array, Int, Shaped


def largest(
    x: Shaped[Array, "*rows n"], k: int
) -> tuple[Shaped[Array, "*rows k"], Int[Array, "*rows k"]]:
    """The `k` greatest entries of each row and their places, as `lax.top_k` gives them.

    Behind barriers: XLA makes a full sort of a search whose results have several
    readers. One for each result, since jaxlib 0.11 ends the process at one for both
    within `shard_map`.
    """
    values, places = lax.top_k(x, k)
    return lax.optimization_barrier(values), lax.optimization_barrier(places)
