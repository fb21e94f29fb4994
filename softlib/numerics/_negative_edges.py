"""Edges that a graph does not have, drawn at random."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments


class NegativeEdges(NamedTuple):
    """Drawn edges.

    Attributes:
        src: Their first nodes.
        dst: Their second ones.
        where: False for an edge that the graph has, and for all if it has none to draw
            from.
    """

    src: Int[Array, " n"]
    dst: Int[Array, " n"]
    where: Bool[Array, " n"]


@array_arguments
def sample_negative_edges(
    key: Array,
    src: Integer[Array, " E"],
    dst: Integer[Array, " E"],
    *,
    num_nodes: int,
    num_samples: int,
    where: Bool[Array, "..."] | None = None,
) -> NegativeEdges:
    """Edges of a graph with another second node, drawn uniformly.

    The first nodes are those of edges drawn with replacement, so that a node has as
    many drawn edges as its own, on average. A draw may hit an edge of the graph, which
    the result says.

    Args:
        key: PRNG key.
        src, dst: The nodes of the edges of the graph.
        num_nodes: Static; second nodes are drawn from `[0, num_nodes)`.
        num_samples: Static; how many are drawn.
        where: True for the edges that count.

    Returns:
        `NegativeEdges`.

    Raises:
        TypeError: Nodes are no integers.
        ValueError: Shapes do not fit together, or a number is below 1.

    Derivatives: none.
    Cost: a sort of E + `num_samples` pairs.
    Source: the negative sampling of "GLAD: Content-aware Dynamic Graphs For Log Anomaly
        Detection".

    Example:
        >>> src, dst = jnp.array([0, 0, 0]), jnp.array([0, 1, 2])
        >>> draw = softlib.numerics.sample_negative_edges
        >>> found = draw(jax.random.key(0), src, dst, num_nodes=4, num_samples=5)
        >>> print(bool((found.where == (found.dst == 3)).all()))
        True
    """
    function = "sample_negative_edges"
    checks.require_integer(function, src=src, dst=dst)
    checks.require_positive_integer(function, "num_nodes", num_nodes)
    checks.require_positive_integer(function, "num_samples", num_samples)
    if src.ndim != 1:
        raise ValueError(f"{function}: `src` must be (E,), got {src.shape}.")
    why = "one entry for each edge of `src`"
    checks.require_shape(function, "dst", dst, src.shape, why)
    counts = checks.checked_where(function, where, src.shape, why)
    of_edge, of_node = jax.random.split(key)
    end = jax.random.randint(of_node, (num_samples,), 0, num_nodes, jnp.int32)
    if not src.size:
        return NegativeEdges(
            jnp.zeros(num_samples, jnp.int32), end, jnp.zeros(num_samples, bool)
        )

    total = jnp.cumsum(counts)
    place = jax.random.randint(of_edge, (num_samples,), 0, jnp.maximum(total[-1], 1))
    begin = src[jnp.searchsorted(total, place, side="right")].astype(jnp.int32)
    is_edge = _are_among(begin, end, src, dst, counts)
    return NegativeEdges(begin, end, ~is_edge & (total[-1] > 0))


def _are_among(
    begin: Array, end: Array, src: Array, dst: Array, counts: Array
) -> Bool[Array, " n"]:
    """Whether pairs are edges: sorted together, an edge stands before its like.

    One number for a pair would not fit 32 bits.
    """
    join = lambda edges, drawn: jnp.concatenate([edges.astype(jnp.int32), drawn])
    # -1: no node is drawn so.
    first = join(jnp.where(counts, src, -1), begin)
    second = join(jnp.where(counts, dst, -1), end)
    number = jnp.arange(len(begin), dtype=jnp.int32)
    number = join(jnp.full(src.shape, -1), number)
    first, second, number = lax.sort((first, second, number), num_keys=3)
    is_new = (first[1:] != first[:-1]) | (second[1:] != second[:-1])
    is_new = jnp.concatenate([jnp.ones(1, bool), is_new])
    places = jnp.arange(len(first), dtype=jnp.int32)
    start = lax.cummax(jnp.where(is_new, places, 0))
    is_edge = number[start] < 0
    rows = jnp.where(number < 0, len(begin), number)
    return jnp.zeros(len(begin), bool).at[rows].set(is_edge, mode="drop")
