"""Centroids of rows by k-means, and the nearest code of each row."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Integer, PRNGKeyArray

from softlib import _checks as checks, _codes
from softlib._array_arguments import array_arguments
from softlib._compiled_once import compiled_once
from softlib._dtypes import accumulator_dtype
from softlib._sharding import in_auto_mode, match_varying
from softlib._symbolic import is_symbolic

# Scores of rows against codes that a step of the search holds.
_SCORES = 2**22


class KMeans(NamedTuple):
    """The result of `kmeans`.

    Attributes:
        codebook: The centroids.
        mapping: The nearest centroid of each row.
        inertia: Weighted squared distance to it, summed over rows: before each
            iteration, and at the end. It does not increase.

    Derivatives: none are meant: assignments jump.
    Cost: K D + V numbers.

    Example:
        >>> found = softlib.quantize.kmeans(jnp.eye(3), 3, key=jax.random.key(0))
        >>> print(found.inertia[-1])
        0.0
    """

    codebook: Float[Array, "K D"]
    mapping: Int[Array, " V"]
    inertia: Float[Array, " steps"]


@array_arguments
def assign_codes(
    embeddings: Float[Array, "V D"], codebook: Float[Array, "K D"]
) -> Int[Array, " V"]:
    r"""The nearest code of each embedding, by Euclidean distance.

    $M(i) = \arg\min_j |e_i - c_j|^2 = \arg\max_j (e_i \cdot c_j - |c_j|^2 / 2)$, the
    lowest code on ties, with $e$ and $c$ relative to the mean of the codes, so that
    nothing cancels far from 0.

    Args:
        embeddings: One row per token.
        codebook: One row per code.

    Returns:
        Codes, int32.

    Raises:
        TypeError: An argument does not hold floating numbers.
        ValueError: Shapes do not fit together.

    Derivatives: none, integers.
    Cost: one product of V x D x K and a copy of the rows; scores are held for blocks of
        rows, no array of V x K.
    Source: vector quantization.

    Example:
        >>> rows, codebook = jnp.array([[0.9], [-2.0]]), jnp.array([[0.0], [1.0]])
        >>> print(softlib.quantize.assign_codes(rows, codebook))
        [1 0]
    """
    embeddings, codebook = _codes.tables("assign_codes", embeddings, codebook)
    dtype = accumulator_dtype(embeddings, codebook)
    embeddings, codebook = lax.stop_gradient((embeddings, codebook))
    engine = lambda x, codes: _nearest(*match_varying((x, codes)))
    by_rows = lambda spec: PartitionSpec(*spec[:1])
    return in_auto_mode(
        engine, by_rows, embeddings.astype(dtype), codebook.astype(dtype)
    )


@array_arguments(as_given=("weights",))
def kmeans(
    x: Float[Array, "V D"],
    num_codes: int,
    *,
    key: PRNGKeyArray,
    weights: Float[Array, " V"] | Integer[Array, " V"] | None = None,
    num_steps: int = 20,
) -> KMeans:
    r"""Centroids of rows by Lloyd's iterations, started by k-means++.

    Args:
        x: Rows to cluster, for a head the table of output embeddings.
        num_codes: Static number of centroids. With more centroids than distinct rows
            some stay without a row.
        key: A key of `jax.random`, for the starting points.
        weights: How much each row counts, at least 0: the frequencies of the tokens
            make the codes of frequent ones finer. None counts all alike.
        num_steps: Static.

    Returns:
        Centroids, the assignment to them, and the course of the inertia. float32
        (float64 if `x` is float64).

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together, or a number is not positive.

    Derivatives: none are meant: assignments jump. Gradients are stopped.
    Cost: per iteration V x D x K multiply-adds and one array of V x D; the start takes
        as long as one iteration, in K steps.
    Source: "k-means++: The Advantages of Careful Seeding".

    Example:
        >>> x = jnp.array([[0.0], [0.25], [5.0], [5.25]])
        >>> found = softlib.quantize.kmeans(x, 2, key=jax.random.key(0))
        >>> print(jnp.sort(found.codebook[:, 0]), found.inertia[-1])
        [0.125 5.125] 0.0625
    """
    function = "kmeans"
    x = jnp.asarray(x)
    checks.require_floating(function, x=x)
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(
            f"{function}: `x` must have shape (V, D) without an empty axis, "
            f"got {x.shape}."
        )
    checks.require_positive_integer(function, "num_codes", num_codes)
    checks.require_positive_integer(function, "num_steps", num_steps)
    x = lax.stop_gradient(x.astype(accumulator_dtype(x)))
    weights = _codes.row_weights(function, weights, x)
    return _lloyd(key, x, weights, num_codes, num_steps)


@compiled_once()
def _nearest(
    embeddings: Float[Array, "V D"], codebook: Float[Array, "K D"]
) -> Int[Array, " V"]:
    rows, codes = embeddings.shape[0], codebook.shape[0]
    centre = _centre(codebook)
    codebook = codebook - centre
    lengths = jnp.square(codebook).sum(-1) / 2
    ids = jnp.arange(codes, dtype=jnp.int32)

    def of_row(x: Array) -> Array:
        product = jnp.matmul(x - centre[0], codebook.T, precision="highest")
        scores = product - lengths
        # jnp.argmax reduces values and indices together, which XLA does not vectorise
        # on a CPU.
        best = scores == scores.max()
        # A row of NaN has no best code; it gets the first.
        return jnp.where(best, ids, codes).min() % codes

    block = max(_SCORES // codes, 1)
    if is_symbolic(rows) or rows <= block:
        return jax.vmap(of_row)(embeddings)
    return lax.map(of_row, embeddings, batch_size=block)


@compiled_once(3, 4)
def _lloyd(
    key: PRNGKeyArray,
    x: Float[Array, "V D"],
    weights: Float[Array, " V"],
    num_codes: int,
    num_steps: int,
) -> KMeans:
    centre = _centre(x)  # sums and products of rows far from 0 would cancel
    x = x - centre

    def step(codebook: Array, _) -> tuple[Array, Array]:
        mapping = assign_codes(x, codebook)
        inertia = _inertia(x, codebook, mapping, weights)
        counts, sums = _codes.totals(x, mapping, weights, num_codes)
        return _codes.centroids(codebook, counts, sums), inertia

    start = _plus_plus(key, x, weights, num_codes)
    codebook, inertia = lax.scan(step, start, length=num_steps)
    mapping = assign_codes(x, codebook)
    last = _inertia(x, codebook, mapping, weights)
    return KMeans(codebook + centre, mapping, jnp.append(inertia, last))


def _centre(x: Float[Array, "N D"]) -> Float[Array, "1 D"]:
    """The mean of rows, 0 where it is not finite."""
    mean = x.mean(0, keepdims=True)
    return jnp.where(jnp.isfinite(mean), mean, 0)


def _inertia(x: Array, codebook: Array, mapping: Array, weights: Array) -> Array:
    return jnp.sum(weights * jnp.square(x - codebook[mapping]).sum(axis=-1))


def _plus_plus(
    key: Array, x: Float[Array, "V D"], weights: Float[Array, " V"], num_codes: int
) -> Float[Array, "K D"]:
    """Each next start is drawn by the squared distance to those that are there."""

    def draw(key: Array, distance: Array) -> Array:
        return x[jax.random.categorical(key, jnp.log(weights * distance))]

    def add(i, carry):
        codebook, distance = carry
        center = draw(jax.random.fold_in(key, i), distance)
        codebook = codebook.at[i].set(center)
        return codebook, jnp.minimum(distance, jnp.square(x - center[None]).sum(-1))

    start = jnp.zeros((num_codes, x.shape[1]), x.dtype)
    far = jnp.full(len(x), jnp.finfo(x.dtype).max ** 0.5, x.dtype)
    return lax.fori_loop(0, num_codes, add, (start, far))[0]
