r"""Clusters of one size, by repeated halving between two means."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._compiled_once import compiled_once
from softlib._dtypes import accumulator_dtype


@array_arguments
def balanced_kmeans(
    x: Float[Array, "N D"], cluster_size: int, *, key: Array, num_steps: int = 8
) -> Int[Array, "clusters size"]:
    r"""Divides points into clusters of near duplicates, all of the same size.

    All points are halved, the halves are halved, until no part has more than
    `cluster_size` points. A half is found by spherical 2-means under the condition that
    both have the same size: with $c_0, c_1$ the directions of their means, the points
    of greatest $\langle x, c_0 - c_1 \rangle$ are the first half; repeated `num_steps`
    times from a point at random and the point least similar to it.

    Args:
        x: Points; their cosine counts, so that scale does not. A point of zeros or with
            NaN is somewhere.
        cluster_size: Static, at least 1: the most points of a cluster. There are
            $2^m$ clusters with the least $m$ that allows it, so that a cluster has more
            than half as many points; with 1 every point is its own.
        key: PRNG key; the same key gives the same clusters.
        num_steps: Static; how often each division is improved.

    Returns:
        The indices of the points of each cluster, int32, each exactly once. The sizes
        differ by at most 1; shorter clusters end with -1.

    Raises:
        TypeError: `x` is not floating, or a static argument is no Python int.
        ValueError: `x` has not two axes or no points, or a static argument is below 1.

    Derivatives: none, the results are indices.
    Cost: time $O(N \log(N / C)\,(D + \log N))$ for each of `num_steps`, memory a copy
        of `x`.
    Source: "NGAME: Negative Mining-aware Mini-batching for Extreme Classification",
        which clusters by balanced 2-means; the start and the rule for odd sizes are
        softlib's.

    Example:
        >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1], [0.1, 0.9]])
        >>> clusters = softlib.numerics.balanced_kmeans(x, 2, key=jax.random.key(0))
        >>> print(sorted(sorted(map(int, c)) for c in clusters))
        [[0, 2], [1, 3]]
    """
    function = "balanced_kmeans"
    checks.require_floating(function, x=x)
    checks.require_positive_integer(function, "cluster_size", cluster_size)
    checks.require_positive_integer(function, "num_steps", num_steps)
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(
            f"{function}: `x` must have shape (N, D) with at least one point and one "
            f"feature, got {x.shape}."
        )
    count = x.shape[0]
    if cluster_size == 1:
        return jnp.arange(count, dtype=jnp.int32)[:, None]
    return _clusters(x, key, cluster_size, num_steps)


@compiled_once(2, 3)
def _clusters(
    x: Float[Array, "N D"], key: Array, cluster_size: int, num_steps: int
) -> Int[Array, "clusters size"]:
    count = x.shape[0]
    x = jnp.nan_to_num(x.astype(accumulator_dtype(x)))
    norm = jnp.linalg.norm(x, axis=1, keepdims=True)
    x = x / jnp.where(norm > 0, norm, 1)
    clusters = jnp.arange(count, dtype=jnp.int32)[None]
    sizes = np.array([count])
    for level in range(max(0, math.ceil(math.log2(count / cluster_size)))):
        key_of_level = jax.random.fold_in(key, level)
        clusters = _halved(x, clusters, sizes, key_of_level, num_steps)
        sizes = np.stack([-(-sizes // 2), sizes // 2], axis=1).reshape(-1)
    return clusters


def _halved(
    x: Array, clusters: Array, sizes: np.ndarray, key: Array, num_steps: int
) -> Int[Array, "clusters size"]:
    """Splits each cluster in two; members come first, then -1. `sizes` are static."""
    number, width = clusters.shape
    members = x[jnp.where(clusters < 0, 0, clusters)]
    present = np.arange(width) < sizes[:, None]
    first = np.arange(width) < (-(-sizes // 2))[:, None]

    def ordered(difference: Array) -> Array:
        """Order of members by falling inner product with the difference of means."""
        agreement = jnp.einsum("cwd,cd->cw", members, difference)
        return jnp.argsort(jnp.where(present, -agreement, jnp.inf), axis=1)

    def mean(order: Array, half: np.ndarray) -> Array:
        taken = jnp.take_along_axis(members, order[..., None], axis=1)
        total = jnp.where(half[..., None], taken, 0).sum(1)
        norm = jnp.linalg.norm(total, axis=1, keepdims=True)
        return total / jnp.where(norm > 0, norm, 1)

    def improve(_, order: Array) -> Array:
        return ordered(mean(order, first) - mean(order, present & ~first))

    start = jax.random.randint(key, (number, 1), 0, jnp.asarray(sizes)[:, None])
    seed = jnp.take_along_axis(members, start[..., None], axis=1)[:, 0]
    similarity = jnp.einsum("cwd,cd->cw", members, seed)
    farthest = jnp.where(present, similarity, jnp.inf).argmin(1)[:, None, None]
    other = jnp.take_along_axis(members, farthest, axis=1)[:, 0]
    order = jax.lax.fori_loop(0, num_steps, improve, ordered(seed - other))

    # The halves of each cluster, as indices into its order; -1 where a half is shorter.
    wide = -(-width // 2)
    left = np.arange(wide) + np.zeros_like(sizes)[:, None]
    right = left + (-(-sizes // 2))[:, None]
    index = np.stack([left, right], axis=1).reshape(number, -1)
    stop = np.stack([-(-sizes // 2), sizes], axis=1)
    exists = index < np.repeat(stop, wide, axis=1)
    kept = jnp.take_along_axis(clusters, order, axis=1)
    halves = jnp.take_along_axis(kept, jnp.minimum(index, width - 1), axis=1)
    return jnp.where(exists, halves, -1).reshape(2 * number, wide)
