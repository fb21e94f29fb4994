r"""Softmax against a sample of the labels, if a pass over all takes too long."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._sharding import in_auto_mode
from softlib.logits._positives import Positives
from softlib.logits._sources import LinearLogits
from softlib.typing import PerRow, Precision

DISTRIBUTIONS = ("log_uniform", "uniform")


@array_arguments
def sampled_softmax_loss(
    hidden: Float[Array, "*batch D"],
    weight: Float[Array, "L D"],
    positives: Integer[Array, "*batch K"],
    *,
    key: Array,
    num_sampled: int,
    distribution: str = "log_uniform",
    bias: Float[Array, " L"] | None = None,
    scale: PerRow | None = None,
    weights: Float[Array, "*batch K"] | None = None,
    where: Bool[Array, "..."] | None = None,
    precision: Precision = None,
) -> Float[Array, "*batch"]:
    r"""Decoupled softmax loss against drawn negatives, the same for all rows.

    $S$ labels $j$ are drawn with replacement from $q$. Those that are positives of the
    row (accidental hits) are left out; the others represent all negatives:

    $$L = \frac{1}{|P|} \sum_{l \in P} \log\bigl(1 + e^{\hat N - z_l}\bigr), \qquad
    e^{\hat N} = \sum_{j \text{ drawn}, j \notin P} \frac{e^{z_j}}{S\, q_j} .$$

    The sum $e^{\hat N}$ has the mean of `decoupled_softmax_loss`, and its
    variance falls as $1 / S$. **Bias:** the logarithm makes the loss too low on average
    (by up to half the variance of the relative error of the sum), and the slopes of the
    negatives as well; both errors vanish as $S$ grows. Train with it, but evaluate with
    the exact loss.

    Args:
        hidden: Embeddings of the queries.
        weight: One row per label.
        positives: Ids of the positives in $[0, L)$, distinct; -1 fills a list up.
            Another id out of range makes the loss NaN, and the row has no gradient.
        key: PRNG key; the same key draws the same labels.
        num_sampled: $S$, static.
        distribution: Static. "uniform", or "log_uniform" with
            $q_j = \log((j + 2) / (j + 1)) / \log(L + 1)$, which fits labels in the
            order of falling frequency.
        bias: Added to the scaled products.
        scale: A scalar or one per row, differentiable; the reciprocal of a
            temperature.
        weights: $w_l$ instead of $1 / |P|$, differentiable; they are not divided by
            their sum.
        where: True for the rows that count; the others cost 0, whatever they hold.
        precision: Static precision of the products, as in `jax.lax.dot_general`.

    Returns:
        The loss per row in nats, float32 (float64 if an argument is float64). A row
        without positives, or all of whose draws are its positives, has loss 0 and
        gradient 0.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together, `num_sampled` is below 1, or
            `distribution` is unknown.

    Derivatives: forward and reverse mode, any order, with respect to `hidden`,
        `weight`, `bias`, `scale` and `weights`. Labels that were not
        drawn and are no positive have gradient 0.
    Cost: $N (S + K) D$ products and $N (S + K)$ scores in memory for $N$ rows, $N K S$
        comparisons; no pass over all labels, but the gradient of `weight` is
        an array of its size.
    Source: "On Using Very Large Target Vocabulary for Neural Machine Translation", with
        the positives of "Dual-Encoders for Extreme Multi-Label Classification". A
        positive is not drawn, so its score is not corrected by its $q$.

    Example:
        >>> hidden, table = jnp.eye(2), jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> options = {"key": jax.random.key(0), "num_sampled": 2000}
        >>> loss = softlib.losses.sampled_softmax_loss
        >>> print(loss(hidden, table, jnp.array([[0, 2], [1, -1]]), **options).round(1))
        [0.5 0.2]
    """
    function = "sampled_softmax_loss"
    checks.require_positive_integer(function, "num_sampled", num_sampled)
    checks.require_one_of(function, "distribution", distribution, DISTRIBUTIONS)
    source = LinearLogits.of(
        function,
        hidden,
        weight,
        bias=bias,
        scale=scale,
    )
    rows = Positives.of(source, positives, where, required=True)
    source, ids = source.masked(rows.where), rows.ids
    assert ids is not None
    modifiers, dtype = source.modifiers, source.dtype
    drawn, log_q = _draw(key, num_sampled, source.num_classes, distribution)

    def scores(equation: str, labels: Array) -> Array:
        products = jnp.einsum(
            equation,
            source.hidden,
            _taken(source.weight, labels),
            precision=precision,
            preferred_element_type=dtype,
        )
        if modifiers.scale is not None:
            factor = modifiers.scale.astype(dtype)
            products = products * (factor[..., None] if factor.ndim else factor)
        if modifiers.bias is None:
            return products
        added = _taken(modifiers.bias.astype(dtype), labels)
        shape = (1,) * (products.ndim - added.ndim) + added.shape
        return products + added.reshape(shape)

    negatives = scores("...d,sd->...s", drawn)
    own = scores("...d,...kd->...k", jnp.where(ids < 0, 0, ids))
    shape = (1,) * len(source.batch_shape) + drawn.shape
    hit = (drawn.reshape(*shape, 1) == ids[..., None, :]).any(-1)
    correction = (log_q + math.log(num_sampled)).astype(dtype).reshape(shape)
    corrected = jnp.where(hit, -jnp.inf, negatives - correction)
    some = (corrected != -jnp.inf).any(-1, keepdims=True)
    total = jax.nn.logsumexp(jnp.where(some, corrected, 0), axis=-1, keepdims=True)
    counts = rows.present & some
    margin = jnp.where(counts, total - own, 0)
    costs = jnp.where(counts, jax.nn.softplus(margin), 0)
    return rows.exceptions(rows.sum(rows.weights(source, weights), costs))


def _taken(table: Array, labels: Array) -> Array:
    """Rows of a table, sharded like the labels."""
    rest = (None,) * (table.ndim - 1)
    specs = lambda spec: PartitionSpec(*spec, *rest)
    return in_auto_mode(lambda ids, table: table[ids], specs, labels, table)


def _draw(
    key: Array, count: int, labels: int, distribution: str
) -> tuple[Int[Array, " S"], Float[Array, " S"]]:
    """Labels drawn with replacement, and the logarithms of their probabilities."""
    if distribution == "uniform":
        drawn = jax.random.randint(key, (count,), 0, labels)
        return drawn, jnp.full(count, -math.log(labels), jnp.float32)
    uniform = jax.random.uniform(key, (count,), jnp.float32)
    # The inverse of log(j + 1) / log(L + 1); rounding must not reach label L.
    index = jnp.exp(uniform * math.log(labels + 1)).astype(jnp.int32) - 1
    drawn = jnp.clip(index, 0, labels - 1)
    share = jnp.log1p(1 / (drawn.astype(jnp.float32) + 1)) / math.log(labels + 1)
    return drawn, jnp.log(share)
