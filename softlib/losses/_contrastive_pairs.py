r"""Contrastive losses of embedded pairs; the similarities are never formed."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib.logits import LinearLogits
from softlib.typing import Scalar

from ._contrastive_temperature import ContrastiveLosses
from ._cross_entropy import softmax_cross_entropy
from ._one_versus_all import one_versus_all_loss


@array_arguments
def info_nce_loss(
    rows: Float[Array, "B D"],
    columns: Float[Array, "B D"],
    *,
    temperature: Scalar,
    where: Bool[Array, " B"] | None = None,
) -> ContrastiveLosses:
    r"""InfoNCE of pairs in both directions, streamed over the negatives.

    With the similarities $s_{ij}$ of B pairs, inner products of the embeddings,

    $$L_i = -\log \frac{e^{s_{ii} / \tau}}{\sum_j e^{s_{ij} / \tau}},$$

    and the same of the columns among the rows: the loss of CLIP is the mean of both.
    It is `softmax_cross_entropy` with the other embeddings as the head; take that for
    one direction, for more negatives than the batch has
    (`LinearLogits(queries, keys, temperature=tau)`), or for a batch that is divided
    over devices (`axis_name=`).

    Args:
        rows: Embeddings of one side, such as images. They are not normalised here.
        columns: Embeddings of the other side, of the same pairs.
        temperature: $\tau > 0$; a number is static, an array traced and differentiable.
        where: True for the pairs that count; the others are no negatives either, and
            their losses and gradients are 0, whatever the arrays hold.

    Returns:
        The losses of the rows and of the columns, float32 (float64 if an argument is
        float64).

    Raises:
        TypeError: An array has the wrong kind of dtype.
        ValueError: Shapes do not fit together, or `temperature` is out of range.

    Derivatives: as `row_statistics`.
    Cost: as two calls of `softmax_cross_entropy` with B classes: nothing of B x B is
        stored.
    Source: "Representation Learning with Contrastive Predictive Coding"; in both
        directions "Learning Transferable Visual Models From Natural Language
        Supervision".

    Example:
        >>> images = jnp.array([[1.0, 0.0], [0.0, 1.0]])
        >>> found = softlib.losses.info_nce_loss(images, images, temperature=0.5)
        >>> print(found.row.round(3), found.column.round(3))
        [0.127 0.127] [0.127 0.127]
    """
    function = "info_nce_loss"
    rows, columns, kept = _checked(function, rows, columns, where)
    checks.require_positive_scalars(function, temperature=temperature)
    own = jnp.arange(rows.shape[0])

    def direction(one: Array, other: Array) -> Array:
        head = LinearLogits(one, other, temperature=temperature, class_where=kept)
        return softmax_cross_entropy(head, own, where=kept)

    return ContrastiveLosses(direction(rows, columns), direction(columns, rows))


@array_arguments
def sigmoid_contrastive_loss(
    rows: Float[Array, "B D"],
    columns: Float[Array, "B D"],
    *,
    scale: Scalar,
    bias: Scalar,
    where: Bool[Array, " B"] | None = None,
) -> Float[Array, " B"]:
    r"""Sigmoid loss of image-text pairs (SigLIP), per row: each pair is a question.

    With the similarities $s_{ij}$ of B pairs, inner products of the embeddings,

    $$L_i = \log(1 + e^{-z_{ii}}) + \sum_{j \neq i} \log(1 + e^{z_{ij}}),
        \qquad z = t\, s + b .$$

    No softmax, hence no sum over the batch within a logarithm, and one direction is
    both. The loss of the paper is the mean over the rows. It is `one_versus_all_loss`
    with the other embeddings as the head; take that for a batch that is divided over
    devices (`axis_name=`).

    Args:
        rows: Embeddings of one side, such as images. They are not normalised here.
        columns: Embeddings of the other side, of the same pairs.
        scale: $t$; a number is static, an array traced and differentiable. The paper
            starts with 10 and trains its logarithm.
        bias: $b$, likewise; the paper starts with -10, so that the many negatives cost
            little.
        where: True for the pairs that count; the others are no negatives either, and
            their losses and gradients are 0, whatever the arrays hold.

    Returns:
        The loss per row, float32 (float64 if an argument is float64).

    Raises:
        TypeError: An array has the wrong kind of dtype.  ValueError: Shapes do not fit
            together.

    Derivatives: as `row_statistics`.
    Cost: as `one_versus_all_loss` with B labels: nothing of B x B is stored.
    Source: "Sigmoid Loss for Language Image Pre-Training".

    Example:
        >>> images = jnp.array([[1.0, 0.0], [0.0, 1.0]])
        >>> loss = softlib.losses.sigmoid_contrastive_loss
        >>> print(loss(images, images, scale=10.0, bias=-5.0).round(4))
        [0.0134 0.0134]
    """
    function = "sigmoid_contrastive_loss"
    rows, columns, kept = _checked(function, rows, columns, where)
    for name, value in (("scale", scale), ("bias", bias)):
        checks.require_scalar(function, name, value, -jnp.inf, jnp.inf)
    count = rows.shape[0]
    dtype = bias.dtype if isinstance(bias, Array) else jnp.float32
    each = jnp.broadcast_to(jnp.asarray(bias, dtype), (count,))
    head = LinearLogits(rows, columns, scale=scale, bias=each, class_where=kept)
    own = jnp.arange(count)[:, None]
    return one_versus_all_loss(head, own, where=kept)


def _checked(
    function: str, rows: Array, columns: Array, where: Array | None
) -> tuple[Array, Array, Array | None]:
    """Embeddings, 0 where they do not count, for a zero of the product."""
    checks.require_floating(function, rows=rows, columns=columns)
    if rows.ndim != 2 or not rows.shape[0]:
        raise ValueError(
            f"{function}: `rows` must have shape (B, D) with a pair at least, got "
            f"{rows.shape}."
        )
    checks.require_shape(function, "columns", columns, rows.shape, "that of `rows`")
    if where is None:
        return rows, columns, None
    checks.require_boolean(function, where=where)
    checks.require_shape(function, "where", where, rows.shape[:1], "one per pair")
    drop = lambda array: jnp.where(where[:, None], array, 0)
    return drop(rows), drop(columns), where
