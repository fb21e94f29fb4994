r"""Logarithms of proximities between the nodes of a graph, and their distances.

Proximities are sums of positive terms over paths. They range over more powers of ten
than a float has, so sums are taken of logarithms. Nothing is subtracted where that
could cancel, and an entry is -inf only where there is no path.
"""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._compiled_once import compiled_once
from softlib._dtypes import accumulator_dtype
from softlib._finite import finite
from softlib._log_domain import log_add, log_of, log_sum
from softlib._nan import nan_where
from softlib.typing import Scalar

KINDS = ("walk", "communicability", "forest", "heat", "pagerank")
MOST_SQUARINGS = 24
NUM_TERMS = 18  # of the exponential series at a norm of at most 1


class ProximityDistance(NamedTuple):
    """Distances that belong to proximities.

    Attributes:
        distance: Symmetric, 0 on the diagonal; inf between nodes without a path where
            the proximities were logarithms.
        triangle_excess: The most by which the distance of two nodes exceeds the way
            over a third one. At most 0 (up to rounding) says that the distance is a
            metric, as it is for the logarithms of "walk" and "forest".

    Derivatives: see `proximity_distance`.
    Cost: the square of the number of nodes.

    Example:
        >>> path = jnp.array([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
        >>> log_h = softlib.estimation.log_graph_proximity(path, kind="forest", t=1.0)
        >>> d = softlib.estimation.proximity_distance(log_h).distance
        >>> print(f"{d[0, 1]:.3f} {d[1, 2]:.3f} {d[0, 2]:.3f}")
        0.805 0.805 1.609
    """

    distance: Float[Array, "n n"]
    triangle_excess: Float[Array, ""]


@array_arguments
def log_graph_proximity(
    adjacency: Float[Array, "n n"],
    *,
    kind: Literal["walk", "communicability", "forest", "heat", "pagerank"],
    t: Scalar,
) -> Float[Array, "n n"]:
    r"""The logarithm of how near the nodes of a graph are, over all of its paths.

    For weights $A$, degrees $D$ (sums of rows) and the Laplacian $L = D - A$, the
    proximity $H$ is

    - "walk": $H = (I - tA)^{-1}$ for $0 \leq t < 1 / \rho(A)$;
    - "communicability": $H = e^{tA}$ for $t \geq 0$;
    - "forest": $H = (I + tL)^{-1}$ for $t \geq 0$;
    - "heat": $H = e^{-tL}$ for $t \geq 0$;
    - "pagerank": $H = (I - t D^{-1} A)^{-1}$ for $0 \leq t < 1$,

    and the result is the elementwise $\log H$. It is finite wherever a path leads,
    however far, and for any $t$: $e^{tA}$ itself overflows float32 at
    $t \rho(A) = 88$. The plain proximity is `jnp.exp` of it. Distances for clustering
    are those of `proximity_distance`, of either.

    Args:
        adjacency: Weights of edges, at least 0; 0 is no edge. It need not be symmetric;
            a negative weight makes every result NaN. Weights of a node to itself have
            no effect on "forest" and "heat".
        kind: Static; a name in the list.
        t: A number or a scalar array, of the range in the list. Beyond it (also where
            a walk does not converge), and for exponentials of a norm of $t A$ or $t L$
            above $2^{24}$, every result is NaN.

    Returns:
        $\log H$, from row to column, float32 (float64 for float64 weights); -inf where
        no path leads. A node without edges has 0 at itself. Errors of exponentials grow
        like the norm of $tA$ or $tL$ times the precision.

    Raises:
        TypeError: `adjacency` is not floating.
        ValueError: It is not square, `kind` is unknown, or `t` is negative.

    Derivatives: forward and reverse, any order, in `t` above 0 and in the weights of
        edges; 0 in a weight of 0, for which there is no edge to change.
    Cost: inverses n steps of n² logarithms, in reverse mode with as many matrices kept;
        exponentials $17 + \log_2 \max(n, \lVert tA \rVert_\infty)$ products of n³
        exponentials, row by row.
    Source: "Do logarithmic proximity measures outperform plain ones in graph
        clustering?". Deviation: logarithms are summed, not taken of the inverse, so
        that nothing is added to entries that have vanished.

    Example:
        >>> path = jnp.array([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
        >>> log_h = softlib.estimation.log_graph_proximity(path, kind="forest", t=1.0)
        >>> print(jnp.exp(log_h).round(3))
        [[0.625 0.25  0.125]
         [0.25  0.5   0.25 ]
         [0.125 0.25  0.625]]
    """
    function = "log_graph_proximity"
    adjacency = _checked_square(function, "adjacency", adjacency)
    checks.require_one_of(function, "kind", kind, KINDS)
    checks.require_scalar(function, "t", t, 0, math.inf)
    dtype = accumulator_dtype(adjacency)
    return _log_proximity(adjacency.astype(dtype), jnp.asarray(t, dtype), kind)


@array_arguments
def proximity_distance(proximity: Float[Array, "n n"]) -> ProximityDistance:
    r"""The distances $d_{ij} = (h_{ii} + h_{jj} - h_{ij} - h_{ji}) / 2$.

    Of logarithms of proximities $d_{ij} = \tfrac12 \log \frac{H_{ii} H_{jj}}
    {H_{ij} H_{ji}}$. For "walk" and "forest" on a symmetric graph this is a metric, in
    which $d_{ij} + d_{jk} = d_{ik}$ just where every path from $i$ to $k$ passes $j$.

    Args:
        proximity: $H$ or $\log H$, as `log_graph_proximity` gives it.

    Returns:
        `ProximityDistance`, float32 (float64 for float64 proximities).

    Raises:
        TypeError: `proximity` is not floating.
        ValueError: It is not square.

    Derivatives: forward and reverse, any order; 0 where a distance is inf.
    Cost: n³ comparisons, row by row.
    Source: "Do logarithmic proximity measures outperform plain ones in graph
        clustering?".

    Example:
        >>> ring = jnp.ones((3, 3)) - jnp.eye(3)
        >>> log_h = softlib.estimation.log_graph_proximity(ring, kind="walk", t=0.4)
        >>> found = softlib.estimation.proximity_distance(log_h)
        >>> print(found.distance[0].round(4), found.triangle_excess < 0)
        [0.     0.4055 0.4055] True
    """
    proximity = _checked_square("proximity_distance", "proximity", proximity)
    return ProximityDistance(*_distance(proximity.astype(accumulator_dtype(proximity))))


def _checked_square(function: str, name: str, array: Array) -> Array:
    array = jnp.asarray(array)
    checks.require_floating(function, **{name: array})
    if array.ndim != 2 or array.shape[0] != array.shape[1] or not array.size:
        raise ValueError(
            f"{function}: `{name}` must have shape (n, n) with n at least 1, "
            f"got {array.shape}."
        )
    return array


@compiled_once(2)
def _log_proximity(
    adjacency: Float[Array, "n n"], t: Float[Array, ""], kind: str
) -> Float[Array, "n n"]:
    n = adjacency.shape[0]
    known = jnp.isfinite(adjacency).all() & (adjacency >= 0).all()
    # A weight of 0 is no edge: it has no derivative, also by way of the degree.
    weights = jnp.where(known & (adjacency > 0), adjacency, 0)
    own = jnp.eye(n, dtype=bool)
    if kind in ("forest", "heat"):
        weights = jnp.where(own, 0, weights)
    degrees = weights.sum(1)

    if kind == "walk":
        log_h, good = _log_closure(log_of(weights) + log_of(t), None)
    elif kind == "pagerank":
        log_rates = log_of(weights) - finite(log_of(degrees))[:, None]
        stays = jnp.where(degrees > 0, log_of(1 - t), 0)
        log_h, good = _log_closure(log_rates + log_of(t), stays)
        good &= t < 1
    elif kind == "forest":
        log_total = jnp.log1p(t * degrees)
        log_steps = log_of(weights) + log_of(t) - log_total[:, None]
        log_h, good = _log_closure(log_steps, 0 - log_total)
        log_h -= log_total[None, :]
    elif kind == "heat":
        # e^{-tL} = e^{-t d} e^{t (dI - L)}, whose exponent has no negative entry.
        # Above all degrees, so that every node stays with a positive rate.
        most = lax.stop_gradient(1.5 * degrees.max())
        shifted = jnp.where(own, most - degrees[None], weights)
        log_h, good = _log_exponential(shifted, t)
        log_h -= t * most
    else:
        log_h, good = _log_exponential(weights, t)
    return nan_where(~(known & good & (t >= 0)), log_h)


def _log_closure(
    log_b: Float[Array, "n n"], log_rest: Float[Array, " n"] | None
) -> tuple[Float[Array, "n n"], Bool[Array, ""]]:
    r"""Log (I - B)^{-1} of a non-negative B, and whether its series converges.

    Elimination of one node after the other: sums of products, but for the pivot
    1 - b. Where the sums of rows and `rest` are 1 this is the sum of what leaves for
    the nodes to come, and of the rest (the algorithm of Grassmann, Taksar and Heyman).
    """
    n = log_b.shape[0]
    places = jnp.arange(n)
    has_rest = log_rest is not None

    def step(k: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        matrix, rest, good = state
        row, column, own = matrix[k], matrix[:, k], matrix[k, k]
        if has_rest:
            to_come = log_sum(jnp.where(places > k, row, -jnp.inf))
            log_pivot = log_add(to_come, rest[k])
        else:
            log_pivot = log_of(-jnp.expm1(jnp.minimum(own, 0)))
        converges = log_pivot > -jnp.inf
        log_visits = 0 - jnp.where(converges, log_pivot, 0)
        rest = log_add(rest, column + log_visits + rest[k])
        row, column = (jnp.where(places == k, 0, one) for one in (row, column))
        here = (places[:, None] == k) | (places[None] == k)
        matrix = jnp.where(here, -jnp.inf, matrix)
        through = column[:, None] + (row + log_visits)[None]
        return log_add(matrix, through), rest, good & converges

    start = log_rest if log_rest is not None else jnp.full_like(log_b[0], -jnp.inf)
    matrix, _, good = lax.fori_loop(0, n, step, (log_b, start, jnp.array(True)))
    return matrix, good


def _log_exponential(
    weights: Float[Array, "n n"], t: Float[Array, ""]
) -> tuple[Float[Array, "n n"], Bool[Array, ""]]:
    """Log e^{t weights} of a non-negative matrix, and whether its norm is in range.

    A series and squarings. Paths of more edges than terms of the series are made of
    shorter ones: one squaring for each doubling of their greatest length.
    """
    n = weights.shape[0]
    norm = lax.stop_gradient(t * weights.sum(1).max())
    length = max(n - 1, 1)
    wanted = jnp.ceil(jnp.log2(jnp.maximum(norm, length))).astype(jnp.int32)
    squarings = jnp.clip(wanted, 0, MOST_SQUARINGS)
    scale = log_of(t) - squarings.astype(t.dtype) * math.log(2)
    log_x = log_of(weights) + scale
    identity = jnp.where(jnp.eye(n, dtype=bool), 0, -jnp.inf).astype(t.dtype)

    def term(k: Array, log_series: Array) -> Array:
        # Horner: 1 + X (1 + X / 2 (1 + ...)), the innermost first.
        count = (NUM_TERMS - k).astype(t.dtype)
        return log_add(identity, _log_product(log_x - jnp.log(count), log_series))

    def square(k: Array, log_h: Array) -> Array:
        twice = lambda h: _log_product(h, h)
        return lax.cond(k < squarings, twice, lambda h: h, log_h)

    series = lax.fori_loop(0, NUM_TERMS, term, identity)
    whole = lax.fori_loop(0, MOST_SQUARINGS, square, series)
    return whole, norm <= 2.0**MOST_SQUARINGS


def _log_product(a: Float[Array, "n m"], b: Float[Array, "m k"]) -> Float[Array, "n k"]:
    """The logarithm of the product of matrices of which `a` and `b` are logarithms."""
    columns = b.T
    of_row = jax.checkpoint(lambda row: log_sum(row[None] + columns))
    return lax.map(of_row, a)


@compiled_once()
def _distance(
    proximity: Float[Array, "n n"],
) -> tuple[Float[Array, "n n"], Float[Array, ""]]:
    own = jnp.diagonal(proximity)
    both = proximity + proximity.T
    apart = both == -jnp.inf
    distance = (own[:, None] + own[None] - jnp.where(apart, 0, both)) / 2
    distance = jnp.where(apart, jnp.inf, distance)
    distance = jnp.where(jnp.eye(own.size, dtype=bool), 0, distance)

    return distance, _excess(lax.stop_gradient(distance))


def _excess(distance: Float[Array, "n n"]) -> Float[Array, ""]:
    """The most by which d_ik exceeds d_ij + d_jk over three nodes; -inf without."""
    n = distance.shape[0]
    places = jnp.arange(n)

    def of_row(i: Array) -> Array:
        row = distance[i]
        way = row[:, None] + distance
        three = (places[:, None] != i) & (places[None] != i)
        three &= places[:, None] != places[None]
        counts = three & (way < jnp.inf)
        return jnp.where(counts, row[None] - jnp.where(counts, way, 0), -jnp.inf).max()

    return lax.map(of_row, places).max()
