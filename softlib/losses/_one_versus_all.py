r"""One-versus-all: every label is a yes-or-no question of its own."""

from typing import Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from softlib._array_arguments import array_arguments
from softlib.logits._options import LinearHeadOptions, LogitsOptions
from softlib.logits._positives import Positives
from softlib.logits._sources import GivenLogits, LinearHead, Source


@array_arguments
def linear_one_versus_all_loss(
    hidden: Float[Array, "*batch D"],
    label_embeddings: Float[Array, "L D"] | Float[Array, "D L"],
    positives: Integer[Array, "*batch K"],
    *,
    weights: Float[Array, "*batch K"] | None = None,
    where: Bool[Array, "..."] | None = None,
    **options: Unpack[LinearHeadOptions],
) -> Float[Array, "*batch"]:
    r"""Binary cross-entropies of all labels, summed, without the scores of its rows.

    With the positives $P$ of a row and scores $z$,

    $$L = \sum_{l \in P} \log(1 + e^{-z_l}) + \sum_{j \notin P} \log(1 + e^{z_j}) .$$

    Labels do not compete, so that $\sigma(z_l)$ is a probability of each. The slope of
    a negative is $\sigma(z_j)$ however many there are: among very many labels start
    with scores far below 0 (a bias near $-\log L$), or the negatives drown the
    positives.

    Args:
        hidden: Embeddings of the queries.
        label_embeddings: One row per label, or one column with `vocab_axis=1`.
        positives: Ids of the positives in $[0, L)$, distinct; -1 fills a list up.
            Another id out of range makes the loss NaN, a positive on an excluded label
            +inf; such a row has no gradient.
        weights: Factors of the positives' terms, differentiable. None: 1 each.
        where: True for the rows that count; broadcasts to the batch shape. Elsewhere
            the loss and all gradients are exactly 0, whatever the arguments hold.
        **options: `bias`, `logit_scale`, `logit_softcap`, `temperature`, `class_where`,
            `vocab_axis`, `vocab_chunk`, `token_chunk`, `axis_name`, `precision` and
            `implementation`, as in `linear_softmax_cross_entropy`.
            `gradient_filter_eps` must be None.

    Returns:
        The loss per row in nats, float32 (float64 if an argument is float64). A row
        without positives costs its negatives; one without labels has loss 0 and
        gradient 0.

    Raises:
        TypeError: An argument has the wrong kind of dtype, or a keyword is unknown.
        ValueError: Shapes do not fit together, or an option is out of range.
        NotImplementedError: No implementation that was named can run.

    Derivatives: as `linear_row_statistics`, and with respect to `weights`.
    Cost: as `linear_softmax_cross_entropy`; each tile of scores is compared with all
        $K$ ids of its rows, forward and backward.
    Source: logistic regression per label, the baseline of "Dual-Encoders for Extreme
        Multi-Label Classification". The positives are left out of the sum over all
        labels: subtracted from it, a score of 30 would leave no digit of its loss.

    Example:
        >>> hidden, table = jnp.eye(2), jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> loss = softlib.losses.linear_one_versus_all_loss
        >>> print(loss(hidden, table, jnp.array([[0, 2], [-1, -1]])).round(1))
        [1.7 3.5]
    """
    function = "linear_one_versus_all_loss"
    source = LinearHead.of(
        function, hidden, label_embeddings, weight_name="label_embeddings", **options
    )
    return _one_versus_all(source, positives, weights, where)


@array_arguments
def one_versus_all_loss(
    scores: Float[Array, "*batch L"],
    positives: Bool[Array, "*batch L"] | Integer[Array, "*batch K"],
    *,
    weights: Float[Array, "*batch M"] | None = None,
    where: Bool[Array, "..."] | None = None,
    **options: Unpack[LogitsOptions],
) -> Float[Array, "*batch"]:
    r"""Binary cross-entropies of all labels of a row, summed, in nats.

    The loss of `linear_one_versus_all_loss` from scores that exist.

    Args:
        scores: Log-odds of all labels, -inf for one that cannot be.
        positives: A mask over the labels, or ids that -1 fills up, with the exceptions
            described in `linear_one_versus_all_loss`.
        weights: Factors of the positives' terms, of the shape of `positives`,
            differentiable. None: 1 each.
        where: True for the rows that count; broadcasts to the batch shape. Elsewhere
            the loss and all gradients are exactly 0, whatever the arguments hold.
        **options: `bias`, `logit_scale`, `logit_softcap`, `temperature`, `class_where`
            and `implementation`, as in `softmax_cross_entropy`.

    Returns:
        The loss per row in nats, float32 (float64 if an argument is float64). A row
        without positives costs its negatives; one without labels has loss 0 and
        gradient 0.

    Raises:
        TypeError: An argument has the wrong kind of dtype, or a keyword is unknown.
        ValueError: Shapes do not fit together, or an option is out of range.
        NotImplementedError: No implementation that was named can run.

    Derivatives: as `linear_one_versus_all_loss`.
    Cost: a few passes over `scores` forward, one backward.
    Source: logistic regression per label.

    Example:
        >>> scores = jnp.array([[2.0, -1.0]])
        >>> loss = softlib.losses.one_versus_all_loss
        >>> print(loss(scores, jnp.array([[True, False]])).round(4))
        [0.4402]
    """
    source = GivenLogits.of("one_versus_all_loss", scores, name="scores", **options)
    return _one_versus_all(source, positives, weights, where)


def _one_versus_all(
    source: Source, positives: Array, weights: Array | None, where: Array | None
) -> Array:
    rows = Positives.of(source, positives, where, required=False)
    others, own = rows.statistics(source, ("sum_softplus",))
    assert others.sum_softplus is not None
    counts = rows.of_some_class(source)
    possible = counts & (own != -jnp.inf)
    costs = jax.nn.softplus(jnp.where(possible, 0 - own, 0))
    costs = jnp.where(possible, costs, jnp.where(counts, jnp.inf, 0))
    of_positives = rows.sum(rows.weights(source, weights, total=True), costs)
    total = others.sum_softplus + of_positives
    return rows.exceptions(
        jnp.where(jnp.isinf(of_positives), of_positives, total)  # without gradient
    )
