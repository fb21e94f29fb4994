"""Graph convolution: every node takes a weighted mean of its neighbours."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype
from softlib._ids import labels_in_range


@array_arguments
def gcn_propagate(
    adjacency: Float[Array, "... N N"],
    x: Float[Array, "... N D"],
    *,
    self_loops: bool = True,
) -> Float[Array, "... N D"]:
    r"""Features of the neighbours of each node, normalised by both degrees.

    $D^{-1/2} (A + I) D^{-1/2} X$ with the degrees $D$ of $A + I$, the sums of its rows.
    A layer of a graph convolutional network multiplies it by a kernel.

    Args:
        adjacency: Weights $A_{uv} \geq 0$ of the edges; symmetric for an undirected
            graph.
        x: Features of the nodes; its batch axes broadcast with those of the graphs.
        self_loops: Static; False leaves $I$ out. A node without edges then gets 0.

    Returns:
        Features, float32 (float64 if an argument is float64).

    Raises:
        TypeError: An array is not floating.
        ValueError: Shapes do not fit together.

    Derivatives: any order, with respect to both; 0 through a degree of 0.
    Cost: a product of N by N by D for each graph.
    Source: "Semi-Supervised Classification with Graph Convolutional Networks"; the
        encoder of "GLAD: Content-aware Dynamic Graphs For Log Anomaly Detection".

    Example:
        >>> adjacency = jnp.array([[0.0, 1.0], [1.0, 0.0]])
        >>> x = jnp.array([[2.0], [4.0]])
        >>> print(softlib.nn.gcn_propagate(adjacency, x).round(4))
        [[3.]
         [3.]]
    """
    function = "gcn_propagate"
    checks.require_floating(function, adjacency=adjacency, x=x)
    checks.require_rank(function, "adjacency", adjacency, 2, "(nodes, nodes)")
    checks.require_rank(function, "x", x, 2, "(nodes, features)")
    nodes = x.shape[-2]
    if adjacency.shape[-2:] != (nodes, nodes):
        raise ValueError(
            f"{function}: `adjacency` must end in shape ({nodes}, {nodes}) (the nodes "
            f"of `x`), got {adjacency.shape}."
        )
    try:
        batch = jnp.broadcast_shapes(adjacency.shape[:-2], x.shape[:-2])
    except ValueError:
        raise ValueError(
            f"{function}: the batch axes of `x` must broadcast with those of "
            f"`adjacency`, {adjacency.shape[:-2]}, got {x.shape[:-2]}."
        ) from None
    dtype = accumulator_dtype(adjacency, x)
    weights = jnp.broadcast_to(adjacency.astype(dtype), (*batch, nodes, nodes))
    x = jnp.broadcast_to(x, (*batch, *x.shape[-2:]))
    scale = _inverse_root(weights.sum(-1) + (1 if self_loops else 0))[..., None]
    # The loops are a sum of their own: no identity of N by N.
    own = x.astype(dtype) * scale
    found = jnp.matmul(weights, own, precision="highest")
    return scale * (found + own if self_loops else found)


@array_arguments
def gcn_propagate_edges(
    x: Float[Array, "N D"],
    src: Integer[Array, " E"],
    dst: Integer[Array, " E"],
    weight: Float[Array, " E"] | None = None,
    *,
    self_loops: bool = True,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "N D"]:
    r"""The same as `gcn_propagate` from a list of edges: $A_{uv}$ sums their weights.

    Node $u =$ `src` takes from $v =$ `dst`: an undirected edge is listed both ways.

    Args:
        x: Features of the N nodes.
        src, dst: The nodes of each edge, in $[0, N)$; an edge with another is left out.
        weight: At least 0; None: 1.
        self_loops: Static, as in `gcn_propagate`.
        where: True for the edges that count; the others may hold anything.

    Returns:
        Features, float32 (float64 if an argument is float64).

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together.

    Derivatives: any order, with respect to `x` and `weight`.
    Cost: O((E + N) D) time and memory.
    Source: as `gcn_propagate`.

    Example:
        >>> x = jnp.array([[2.0], [4.0]])
        >>> src, dst = jnp.array([0, 1]), jnp.array([1, 0])
        >>> print(softlib.nn.gcn_propagate_edges(x, src, dst).round(4))
        [[3.]
         [3.]]
    """
    function = "gcn_propagate_edges"
    checks.require_floating(function, x=x, weight=weight)
    checks.require_integer(function, src=src, dst=dst)
    if x.ndim != 2 or src.ndim != 1:
        raise ValueError(
            f"{function}: `x` must be (N, D) and `src` (E,), got shapes {x.shape} and "
            f"{src.shape}."
        )
    why = "one entry for each edge of `src`"
    checks.require_shape(function, "dst", dst, src.shape, why)
    checks.require_shape(function, "weight", weight, src.shape, why)
    counts = checks.checked_where(function, where, src.shape, why)

    nodes = x.shape[0]
    src, dst = labels_in_range(src, nodes), labels_in_range(dst, nodes)
    counts &= (src >= 0) & (dst >= 0)
    dtype = accumulator_dtype(x, weight)
    given = jnp.ones(src.shape, dtype) if weight is None else weight.astype(dtype)
    weights = jnp.where(counts, given, 0)
    # An id of -1 would count from the end.
    src, dst = jnp.where(counts, src, 0), jnp.where(counts, dst, 0)

    degrees = jax.ops.segment_sum(weights, src, nodes)
    scale = _inverse_root(degrees + (1 if self_loops else 0))[:, None]
    own = x.astype(dtype) * scale
    if not nodes:
        return own
    found = jax.ops.segment_sum(weights[:, None] * own[dst], src, nodes)
    return scale * (found + own if self_loops else found)


def _inverse_root(degrees: Array) -> Array:
    """0 for a node without edges."""
    some = degrees > 0
    return jnp.where(some, 1 / jnp.sqrt(jnp.where(some, degrees, 1)), 0)
