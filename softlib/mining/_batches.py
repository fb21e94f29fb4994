r"""Hard negatives from the batch itself: which points share one, and what they cost.

Points that are near each other are put into the same batch, where the label drawn for
one is a hard negative for its neighbours, at no further encoding. How: clusters of the
embeddings (`softlib.numerics.balanced_kmeans`), batches of whole clusters
(`ngame_batches`), one positive drawn for each point (`draw_positives`), and a mask of
which drawn labels are positives of which points (`in_batch_positives`), for any loss of
a (B, B) array of scores.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._compiled_once import compiled_once
from softlib._dtypes import accumulator_dtype, promoted
from softlib._ids import PADDING, equal_ids, require_ids


@array_arguments
def ngame_batches(
    clusters: Integer[Array, "clusters size"], *, batch_size: int, key: Array
) -> Int[Array, "batches B"]:
    """Batches of an epoch: the clusters in random order, cut into pieces of one size.

    A batch holds whole clusters but for those at its ends; with clusters of one point
    it is a random batch. Larger clusters make harder negatives, and more of them false:
    the paper starts with 1 and doubles the size as training goes on, and clusters anew
    every few epochs with the embeddings of the day.

    Args:
        clusters: Of `softlib.numerics.balanced_kmeans`: indices, -1 for none.
        batch_size: Static, at least 1.
        key: PRNG key; one for each epoch.

    Returns:
        Indices, int32, each of `clusters` exactly once. What is missing to full batches
        is -1 and stands at the very end: leave the last batches out, or mask them.

    Raises:
        TypeError: `clusters` are no integers, or `batch_size` is no Python int.
        ValueError: `clusters` have not two axes, or `batch_size` is below 1.

    Derivatives: none, the results are indices.
    Cost: one sort of the number of points.
    Source: "NGAME: Negative Mining-aware Mini-batching for Extreme Classification".

    Example:
        >>> clusters = jnp.array([[0, 1], [2, 3], [4, -1]])
        >>> key = jax.random.key(1)
        >>> print(softlib.mining.ngame_batches(clusters, batch_size=2, key=key).shape)
        (3, 2)
    """
    function = "ngame_batches"
    checks.require_integer(function, clusters=clusters)
    checks.require_positive_integer(function, "batch_size", batch_size)
    if clusters.ndim != 2:
        raise ValueError(
            f"{function}: `clusters` must have shape (clusters, size), "
            f"got {clusters.shape}."
        )
    flat = jax.random.permutation(key, clusters, axis=0).reshape(-1)
    flat = flat[jnp.argsort(flat < 0, stable=True)].astype(jnp.int32)
    batches = -(-flat.size // batch_size)
    missing = batches * batch_size - flat.size
    filled = jnp.pad(flat, (0, missing), constant_values=PADDING)
    return jnp.where(filled < 0, PADDING, filled).reshape(batches, batch_size)


@array_arguments
def draw_positives(
    key: Array, positives: Integer[Array, "*batch K"]
) -> Int[Array, "*batch"]:
    """One positive label of each row, uniformly at random.

    Args:
        key: PRNG key.
        positives: Ids; -1 (any negative id) fills a list up.

    Returns:
        An id of each row, int32; -1 for a row without any.

    Raises:
        TypeError: `positives` are no integers.  ValueError: they have no axis of ids.

    Derivatives: none, the results are ids.
    Cost: a random number per id.
    Source: "NGAME: Negative Mining-aware Mini-batching for Extreme Classification".

    Example:
        >>> positives = jnp.array([[7, -1], [-1, -1]])
        >>> print(softlib.mining.draw_positives(jax.random.key(0), positives))
        [ 7 -1]
    """
    function = "draw_positives"
    checks.require_integer(function, positives=positives)
    checks.require_rank(function, "positives", positives, 1, "(..., K)")
    if positives.shape[-1] == 0:
        return jnp.full(positives.shape[:-1], PADDING, jnp.int32)
    lots = jnp.where(positives >= 0, jax.random.uniform(key, positives.shape), -1)
    place = lots.argmax(-1)[..., None]
    drawn = jnp.take_along_axis(positives, place, axis=-1)[..., 0].astype(jnp.int32)
    return jnp.where(drawn < 0, PADDING, drawn)


@array_arguments(as_given=("positives", "labels"))
def in_batch_positives(
    positives: Integer[Array, "B K"], labels: Integer[Array, " M"]
) -> Bool[Array, "B M"]:
    """True where a label of a batch is a positive of a point of the batch.

    Args:
        positives: Ids of all positives of each point; -1 fills a list up.
        labels: Ids of the labels of the batch, such as one drawn for each point. -1 is
            no label, and a positive of nobody.

    Returns:
        True where label `labels[j]` is a positive of point i.

    Raises:
        TypeError: An argument is not of integers.  ValueError: Its axes are not these.

    Derivatives: none.
    Cost: B K M comparisons.
    Source: "NGAME: Negative Mining-aware Mini-batching for Extreme Classification".

    Example:
        >>> positives = jnp.array([[0, 2], [1, -1], [2, -1]])
        >>> print(softlib.mining.in_batch_positives(positives, jnp.array([0, 1, 2]))[0])
        [ True False  True]
    """
    function = "in_batch_positives"
    checks.require_integer(function, labels=labels)
    require_ids(function, positives, positives.shape[:1])
    if labels.ndim != 1:
        raise ValueError(
            f"{function}: `labels` must have one axis, got shape {labels.shape}."
        )
    same = equal_ids(positives[:, :, None], labels[None, None])
    return same.any(1) & (labels >= 0)[None]


@array_arguments
def hard_negative_recall(
    embeddings: Float[Array, "N D"],
    label_embeddings: Float[Array, "N D"],
    batches: Integer[Array, "batches B"],
    *,
    num_negatives: int = 20,
    positives: Bool[Array, "N N"] | None = None,
) -> Float[Array, " N"]:
    r"""The share of each point's hardest negatives that are in its batch.

    The hardest negatives of point $i$ are the `num_negatives` greatest $\langle x_i,
    y_j \rangle$ among the labels of all other points $j$ that are no positives of $i$.
    In random batches the share is that of the batch in all points.

    Args:
        embeddings: $x$, of the points.
        label_embeddings: $y$, of the label drawn for each point; `embeddings` itself
            measures how near to each other the points of a batch are.
        batches: Of `ngame_batches`: indices, -1 for none.
        num_negatives: Static, at least 1.
        positives: True where the label of point $j$ is one of point $i$'s, beside its
            own. None: nowhere.

    Returns:
        A number in $[0, 1]$ per point, float32. 0 for a point in no batch, and for one
        without negatives.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together, or `num_negatives` is out of range.

    Derivatives: none, the result counts.
    Cost: $N^2 D$ products, a batch of rows at a time: for some thousand points.
    Source: "NGAME: Negative Mining-aware Mini-batching for Extreme Classification",
        whose analysis bounds what is missed.

    Example:
        >>> x = jnp.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
        >>> batches = jnp.array([[0, 1], [2, 3]])
        >>> recall = softlib.mining.hard_negative_recall
        >>> print(recall(x, x, batches, num_negatives=1))
        [1. 1. 1. 1.]
    """
    function = "hard_negative_recall"
    checks.require_floating(
        function, embeddings=embeddings, label_embeddings=label_embeddings
    )
    checks.require_integer(function, batches=batches)
    checks.require_boolean(function, positives=positives)
    checks.require_positive_integer(function, "num_negatives", num_negatives)
    checks.require_rank(function, "embeddings", embeddings, 2, "(N, D)")
    count = embeddings.shape[0]
    why = "the shape of `embeddings`"
    shape = embeddings.shape
    checks.require_shape(function, "label_embeddings", label_embeddings, shape, why)
    checks.require_shape(
        function, "positives", positives, (count, count), "all pairs of points"
    )
    if num_negatives >= count:
        raise ValueError(
            f"{function}: `num_negatives` must be below the number of points, {count}, "
            f"got {num_negatives}."
        )

    found = _shares(num_negatives, embeddings, label_embeddings, positives, batches)
    at = jnp.where(batches < 0, count, batches).reshape(-1)
    return jnp.zeros(count, jnp.float32).at[at].set(found.reshape(-1), mode="drop")


@compiled_once(0)
def _shares(
    num_negatives: int,
    embeddings: Float[Array, "N D"],
    label_embeddings: Float[Array, "N D"],
    positives: Bool[Array, "N N"] | None,
    batches: Integer[Array, "batches B"],
) -> Float[Array, "batches B"]:
    count = embeddings.shape[0]

    def of_batch(batch: Array) -> Array:
        points = jnp.where(batch < 0, 0, batch)
        s = jnp.matmul(*promoted(embeddings[points], label_embeddings.T))
        allowed = jnp.arange(count)[None] != points[:, None]
        if positives is not None:
            allowed = allowed & ~positives[points]
        s = jnp.where(allowed, s.astype(accumulator_dtype(s)), -jnp.inf)
        hardest, places = jax.lax.top_k(s, num_negatives)
        exists = hardest != -jnp.inf
        together = (places[:, :, None] == batch[None, None]).any(2) & exists
        return together.sum(1) / jnp.maximum(exists.sum(1), 1)

    return jax.lax.map(of_batch, batches).astype(jnp.float32)
