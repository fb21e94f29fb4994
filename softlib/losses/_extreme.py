r"""Losses of rows with many positives among very many labels.

In decoupled softmax each positive of a row competes with the negatives alone; soft
top-k wants all positives among the first k. Other files hold one-versus-all, and the
softmax in which positives compete with each other.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib.logits import Logits
from softlib.logits._positives import Positives
from softlib.logits._sources import array_source_of, source_of
from softlib.softmax import log_soft_top_k
from softlib.typing import PerRow


@array_arguments
def decoupled_softmax_loss(
    logits: Logits,
    positives: Bool[Array, "*batch L"] | Integer[Array, "*batch K"],
    *,
    weights: Float[Array, "*batch M"] | None = None,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""Decoupled softmax loss over many labels, of which a row has several.

    With the positives $P$ of a row and $N$ the logsumexp of the scores of all *other*
    labels,

    $$L = \frac{1}{|P|} \sum_{l \in P} \log\bigl(1 + e^{N - z_l}\bigr) :$$

    each positive is classified among itself and the negatives. In the sum of ordinary
    cross-entropies over the positives (`multi_label_cross_entropy`) the positives
    compete with each other: at the optimum all have the same score, and a positive more
    certain than $1 / |P|$ is pushed down. Here no positive is pushed down. With one
    positive the loss is cross-entropy.

    Args:
        logits: An array of logits, or a value such as `softlib.LinearLogits`.
        positives: Ids of the positives in $[0, L)$, distinct; -1 fills a list up. For
            stored logits also a mask over the labels. Another id out of range makes the
            loss NaN, a positive on an excluded label +inf; such a row has no gradient.
        weights: Relevances $w_l$ instead of $1 / |P|$, differentiable. They are not
            divided by their sum.
        where: True for the rows that count; the others cost 0, whatever they hold.

    Returns:
        The loss per row in nats, float32 (float64 if an argument is float64). A row
        without positives, or without negatives, has loss 0 and gradient 0.

    Raises:
        TypeError, ValueError, NotImplementedError: As `softmax_cross_entropy`.

    Derivatives: as `row_statistics`, and with respect to `weights`.
    Cost: as `softmax_cross_entropy`; each tile of scores is compared with all
        $K$ ids of its rows, forward and backward.
    Source: "Dual-Encoders for Extreme Multi-Label Classification". The negatives are
        summed without the positives: a difference of sums would have no accurate digit
        where one positive dominates.

    Example:
        >>> hidden, table = jnp.eye(2), jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> loss = softlib.losses.decoupled_softmax_loss
        >>> logits = softlib.LinearLogits(hidden, table)
        >>> print(loss(logits, jnp.array([[0, 2], [1, -1]])).round(4))
        [0.5032 0.2395]
    """
    source = source_of("decoupled_softmax_loss", logits)
    rows = Positives.of(source, positives, where, required=True)
    others, own = rows.statistics(source, ("lse",))
    assert others.lse is not None
    lse = others.lse[..., None]
    # Without negatives a positive costs nothing, unless its own logit is -inf.
    impossible = rows.of_some_class(source) & (own == -jnp.inf)
    possible = rows.present & (lse != -jnp.inf) & ~impossible
    margin = jnp.where(possible, lse - jnp.where(possible, own, 0), 0)
    costs = jnp.where(possible, jax.nn.softplus(margin), 0)
    costs = jnp.where(impossible, jnp.inf, costs)
    return rows.exceptions(rows.sum(rows.weights(source, weights), costs))


@array_arguments
def soft_top_k_loss(
    logits: Logits,
    positives: Bool[Array, "*batch L"] | Integer[Array, "*batch K"],
    *,
    k: PerRow | None,
    alpha: PerRow = 1.0,
    weights: Float[Array, "*batch M"] | None = None,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""Soft top-k loss, which is near 0 if all positives are among the first k labels.

    With $\sigma$ the logistic function and a threshold $t$ per row that makes the $z$
    sum to $k$ (`softlib.softmax.soft_top_k`),

    $$L = -\frac{1}{|P|} \sum_{l \in P} \log z_l, \qquad
    z_l = \sigma(\alpha (x_l + t)), \qquad \sum_j z_j = k .$$

    It goes with metrics of the first $k$ labels, such as recall at $k$; their order
    does not matter. Choose $k$ at least the number of positives.

    Args:
        logits: $x$, an array, -inf for an impossible label, or
            `softlib.logits.StoredLogits`; NaN or +inf make their row NaN.
        positives: A mask over the labels, or ids in $[0, L)$ that -1 fills up. Another
            id out of range makes the loss NaN, a positive on an excluded label +inf;
            such a row has no gradient.
        k: Sum of $z$: a number (static) or an array with a value per row (traced),
            positive, not necessarily whole. None: the number of positives of the row.
        alpha: Sharpness, positive: a number (static) or an array (traced).
        weights: $w_l$ instead of $1 / |P|$, differentiable, of the shape of
            `positives`; they are not divided by their sum.
        where: True for the rows that count; the others cost 0, whatever they hold.

    Returns:
        The loss per row, float32 (float64 if an argument is float64). A row without
        positives has loss 0 and gradient 0.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together, an option is out of range, or
            `StoredLogits` pin an implementation: there is one.

    Derivatives: forward and reverse mode, any order, with respect to `logits`, `k` and
        `alpha` too; see `soft_top_k`.
    Cost: that of `soft_top_k`: dozens of passes over `logits`. A linear head is not
        supported: its scores would be computed again in each pass.
    Source: "Dual-Encoders for Extreme Multi-Label Classification", which trains with
        $\alpha$ from the temperature of the scores and with $k$ or $|P|$.

    Example:
        >>> scores = jnp.array([[3.0, 2.0, -3.0, -4.0]])
        >>> positives = jnp.array([[True, True, False, False]])
        >>> loss = softlib.losses.soft_top_k_loss
        >>> print(loss(scores, positives, k=2, alpha=4.0).round(4))
        [0.]
    """
    source = array_source_of("soft_top_k_loss", logits)
    rows = Positives.of(source, positives, where, required=True)
    if k is None:
        k = jnp.maximum(rows.count, 1).astype(source.dtype)
    masked = source.masked(rows.where)
    with checks.under_name(source.function, "log_soft_top_k"):
        log_z = log_soft_top_k(masked.materialize(), k=k, alpha=alpha)
    if rows.ids is not None:
        log_z = masked.at_labels(log_z, rows.ids)
    costs = jnp.where(rows.of_some_class(source), 0 - log_z, 0)
    return rows.exceptions(rows.sum(rows.weights(source, weights), costs))
