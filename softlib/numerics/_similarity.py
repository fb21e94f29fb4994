"""Similarity of a point to known data: depth of agreement, quantile, radius."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._compiled_once import compiled_once
from softlib._dtypes import accumulator_dtype
from softlib.typing import Scalar


class SimilarityDepth(NamedTuple):
    """Agreement of a query with the keys near it.

    Attributes:
        depth: The number of the nearest keys that agree, int32.
        nearest: The distance to the nearest key, float32 (float64 if an argument is).
    """

    depth: Int[Array, " B"]
    nearest: Float[Array, " B"]


@array_arguments
def similarity_depth(
    queries: Float[Array, "B M"],
    keys: Float[Array, "N M"],
    query_pred: Integer[Array, " B"],
    key_pred: Integer[Array, " N"],
    key_labels: Integer[Array, " N"],
    *,
    exclude_index: Integer[Array, " B"] | None = None,
    max_depth: int | None = None,
    where: Bool[Array, " N"] | None = None,
) -> SimilarityDepth:
    r"""Number of nearest keys that agree with a query, and distance of the nearest.

    A key agrees if its prediction is right and is that of the query. The depth $q$ is
    the number of keys, from the nearest on (Euclidean distance, of equally distant ones
    the lower index first), until the first that does not agree.

    Args:
        queries: Embeddings of the points in question.
        keys: Embeddings of the training points.
        query_pred: Predicted class of each query.
        key_pred: Predicted class of each key.
        key_labels: True class of each key.
        exclude_index: The key that is the query itself, per query; it is passed over.
            -1 (any index out of range) excludes none. By index, because a duplicate of
            the query is not the query.
        max_depth: Static, at least 1: counting stops there, which saves the sorting of
            all keys. The depth is exact if no result equals it.
        where: True for the keys that exist.

    Returns:
        Depths, and the distance to the nearest key: inf without keys. A query with NaN
        has depth 0 and distance NaN; a key with NaN counts as infinitely far.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit, or `max_depth` is below 1.

    Derivatives: none; depths are counts and the distance is a statistic, constant to
        differentiation.
    Cost: time $O(B N (M + \log N))$, memory for one query's distances at a time.
    Source: "Similarity-Distance-Magnitude Universal Verification".

    Example:
        >>> keys, pred = jnp.array([[0.0], [1.0], [2.0]]), jnp.array([1, 1, 1])
        >>> query, labels = jnp.array([[0.25]]), jnp.array([1, 1, 0])
        >>> depth = softlib.numerics.similarity_depth
        >>> print(*depth(query, keys, jnp.array([1]), pred, labels))
        [2] [0.25]
    """
    function = "similarity_depth"
    checks.require_floating(function, queries=queries, keys=keys)
    predictions = {"key_pred": key_pred, "key_labels": key_labels}
    checks.require_integer(function, query_pred=query_pred, **predictions)
    batch, features = queries.shape
    count = keys.shape[0]
    checks.require_shape(function, "keys", keys, (count, features), "one row per key")
    for name, value in predictions.items():
        checks.require_shape(function, name, value, (count,), "one per key")
    checks.require_shape(function, "query_pred", query_pred, (batch,), "one per query")
    if exclude_index is not None:
        checks.require_integer(function, exclude_index=exclude_index)
        checks.require_shape(
            function, "exclude_index", exclude_index, (batch,), "one per query"
        )
    if where is not None:
        checks.require_boolean(function, where=where)
        checks.require_shape(function, "where", where, (count,), "one per key")
    if max_depth is not None:
        checks.require_positive_integer(function, "max_depth", max_depth)
    dtype = accumulator_dtype(queries, keys)
    queries, keys = (lax.stop_gradient(y.astype(dtype)) for y in (queries, keys))
    depth = count if max_depth is None else min(max_depth, count)
    exists = jnp.ones(count, bool) if where is None else where
    # NaN would be the largest of all to top_k.
    exists = exists & ~jnp.isnan(keys).any(-1)
    right = (key_pred == key_labels) & exists
    if exclude_index is None:
        exclude_index = jnp.full(batch, -1)
    each = (queries, query_pred, exclude_index)
    return SimilarityDepth(*_of_queries(depth, each, keys, key_pred, exists, right))


@compiled_once(0)
def _of_queries(
    depth: int,
    queries: tuple[Array, Array, Array],
    keys: Float[Array, "N D"],
    key_pred: Integer[Array, " N"],
    exists: Bool[Array, " N"],
    right: Bool[Array, " N"],
) -> tuple[Array, Array]:
    count = keys.shape[0]

    def of_query(each: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        query, prediction, itself = each
        other = exists & (jnp.arange(count) != itself)
        # Not |a|^2 + |b|^2 - 2 ab, which cancels for near points.
        squares = jnp.square(keys - query[None]).sum(-1)
        squares = jnp.where(other, squares, jnp.inf)
        nearest = jnp.sqrt(squares.min(initial=jnp.inf))
        agrees = right & (key_pred == prediction) & other
        order = lax.top_k(-squares, depth)[1]
        run = jnp.cumprod(agrees[order].astype(jnp.int32)).sum().astype(jnp.int32)
        bad = jnp.isnan(query).any()
        return jnp.where(bad, 0, run), jnp.where(bad, jnp.nan, nearest)

    return lax.map(of_query, queries)


@array_arguments
def distance_quantile(
    nearest: Float[Array, "*batch"],
    calibration_nearest: Float[Array, " N"],
    calibration_labels: Integer[Array, " N"],
    *,
    num_classes: int,
    where: Bool[Array, " N"] | None = None,
) -> Float[Array, "*batch"]:
    r"""The share of calibration points that are at least as far, least over classes.

    $d = \min_c (1 - F_c(x))$ with $F_c(x)$ the share of calibration points of class $c$
    whose nearest key is strictly nearer than $x$: 1 beside the training data, 0 beyond
    every calibration point of some class.

    Args:
        nearest: Distances $x$ to the nearest key, as `similarity_depth` returns them.
        calibration_nearest: The same of the calibration points.
        calibration_labels: True classes of these. Points of a class outside of
            $[0, C)$, or of a NaN distance, are left out.
        num_classes: Static number $C$ of classes. One without points gives 0.
        where: True for the calibration points to use: in the paper those of a depth
            above 0.

    Returns:
        A number in $[0, 1]$ for each distance, float32 (float64 if an argument is); NaN
        for NaN.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit, or `num_classes` is below 1.

    Derivatives: none; a constant to differentiation.
    Cost: time $O(C N \log N + B C \log N)$, memory $C (N + B)$.
    Source: "Similarity-Distance-Magnitude Universal Verification"; which points are
        counted, strictly nearer ones, is that of its code.

    Example:
        >>> quantile = softlib.numerics.distance_quantile
        >>> known, labels = jnp.array([1.0, 2.0, 3.0, 4.0]), jnp.array([0, 0, 0, 0])
        >>> print(quantile(jnp.array([1.0, 2.5, 9.0]), known, labels, num_classes=1))
        [1.  0.5 0. ]
    """
    function = "distance_quantile"
    checks.require_floating(
        function, nearest=nearest, calibration_nearest=calibration_nearest
    )
    checks.require_integer(function, calibration_labels=calibration_labels)
    shape = calibration_nearest.shape
    checks.require_rank(function, "calibration_nearest", calibration_nearest, 1, "(N,)")
    checks.require_shape(
        function, "calibration_labels", calibration_labels, shape, "one per point"
    )
    checks.require_positive_integer(function, "num_classes", num_classes)
    dtype = accumulator_dtype(nearest, calibration_nearest)
    x = lax.stop_gradient(nearest.astype(dtype))
    known = lax.stop_gradient(calibration_nearest.astype(dtype))
    used = ~jnp.isnan(known)
    if where is not None:
        checks.require_boolean(function, where=where)
        checks.require_shape(function, "where", where, shape, "one per point")
        used = used & where
    flat = x.reshape(-1)

    def of_class(c: Array) -> Array:
        own = used & (calibration_labels == c)
        number = own.sum()
        ordered = jnp.sort(jnp.where(own, known, jnp.inf))
        # Points that are left out are inf, at the end.
        nearer = jnp.minimum(jnp.searchsorted(ordered, flat, side="left"), number)
        share = nearer.astype(dtype) / jnp.maximum(number, 1).astype(dtype)
        return jnp.where(number > 0, 1 - share, 0)

    d = jax.vmap(of_class)(jnp.arange(num_classes)).min(0).reshape(x.shape)
    return jnp.where(jnp.isnan(x), jnp.nan, d)


@array_arguments
def dkw_radius(n: ArrayLike, *, alpha: Scalar = 0.95) -> Float[Array, "..."]:
    r"""Half-width of a band that holds a whole distribution function.

    $\sqrt{\log(2 / (1 - \alpha)) / (2 n)}$, the inequality of Dvoretzky, Kiefer,
    Wolfowitz and Massart: with probability at least $\alpha$ the empirical distribution
    function of $n$ independent draws is nowhere further from the true one.

    Args:
        n: Number of draws, an integer or an array; floats (expected numbers) are
            taken as they are.
        alpha: Confidence in $(0, 1)$; a number is static, an array traced.

    Returns:
        Float32 (float64 for float64), at most 1, which says nothing: the value for
        $n = 0$. NaN for a negative or NaN `n`.

    Raises:
        ValueError: `alpha` is no scalar, or a number outside $(0, 1)$.

    Derivatives: those of the formula, 0 where it is cut at 1.
    Cost: a few operations.
    Source: "Similarity-Distance-Magnitude Universal Verification". Cut at 1, which
        changes no band of probabilities.

    Example:
        >>> print((1000 * softlib.numerics.dkw_radius(jnp.array([0, 5, 50]))).round())
        [1000.  607.  192.]
    """
    function = "dkw_radius"
    checks.require_scalar(function, "alpha", alpha, 0, 1)
    if isinstance(alpha, int | float) and not 0 < alpha < 1:
        raise ValueError(f"{function}: `alpha` must be in (0, 1), got {alpha}.")
    n = jnp.asarray(n)
    if not jnp.issubdtype(n.dtype, jnp.floating):
        n = n.astype(jnp.float32)
    n = n.astype(accumulator_dtype(n))
    level = jnp.log(2 / (1 - jnp.asarray(alpha, n.dtype)))
    some = n > 0
    radius = jnp.sqrt(level / (2 * jnp.where(some, n, 1)))
    radius = jnp.where(some & (radius < 1), radius, 1)
    return jnp.where(n >= 0, radius, jnp.nan)
