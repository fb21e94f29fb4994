r"""One-versus-all: a binary cross-entropy for every label."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from softlib._array_arguments import array_arguments
from softlib.logits import Logits
from softlib.logits._positives import Positives
from softlib.logits._sources import source_of


@array_arguments
def one_versus_all_loss(
    logits: Logits,
    positives: Bool[Array, "*batch L"] | Integer[Array, "*batch K"],
    *,
    weights: Float[Array, "*batch M"] | None = None,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""Binary cross-entropies of all labels, summed.

    With the positives $P$ of a row and scores $z$,

    $$L = \sum_{l \in P} \log(1 + e^{-z_l}) + \sum_{j \notin P} \log(1 + e^{z_j}) .$$

    Labels do not compete: $\sigma(z_l)$ is the probability of each. The slope of every
    negative is $\sigma(z_j)$, however many there are. So start with scores far below 0
    (a bias near $-\log L$) among very many labels, or the negatives outweigh the
    positives.

    Args:
        logits: An array of logits, or a value such as `softlib.LinearLogits`.
        positives: As in `decoupled_softmax_loss`.
        weights: Factors of the positives' terms, differentiable. None: 1 each.
        where: True for the rows that count; the others cost 0, whatever they hold.

    Returns:
        The loss per row in nats, float32 (float64 if an argument is float64). A row
        without positives costs its negatives; one without labels has loss 0 and
        gradient 0.

    Raises:
        TypeError, ValueError, NotImplementedError: As `softmax_cross_entropy`.

    Derivatives: as `row_statistics`, and with respect to `weights`.
    Cost: as `softmax_cross_entropy`; each tile of scores is compared with all
        $K$ ids of its rows, forward and backward.
    Source: logistic regression per label, the baseline of "Dual-Encoders for Extreme
        Multi-Label Classification". The positives are left out of the sum over all
        labels: subtracted from it, a score of 30 would leave no digit of its loss.

    Example:
        >>> hidden, table = jnp.eye(2), jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> loss = softlib.losses.one_versus_all_loss
        >>> logits = softlib.LinearLogits(hidden, table)
        >>> print(loss(logits, jnp.array([[0, 2], [-1, -1]])).round(1))
        [1.7 3.5]
    """
    source = source_of("one_versus_all_loss", logits)
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
