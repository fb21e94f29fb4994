r"""Metrics of rankings of very many labels, also if a few labels are most of them.

A ranking is a list of ids, the best first, as `softlib.logits.top_k` gives it. The
labels that are right are lists of ids too. Nothing here has the size of rows x labels.
"""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype, promoted
from softlib._ids import labels_in_range, require_ids
from softlib.typing import Scalar


@array_arguments
def precision_at_k(
    ranking: Integer[Array, "*batch M"],
    positives: Integer[Array, "*batch K"],
    *,
    k: int,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """The share of the first k labels of a ranking that are right (P@k).

    Args:
        ranking: Distinct ids, the best first; at least `k`. -1 is no label.
        positives: Ids of the labels that are right, distinct; -1 fills a list up.
        k: Static, at least 1.
        where: True for the rows that count; broadcasts to the batch shape.

    Returns:
        A number in [0, 1] per row, float32; 0 where `where` is False. A row of fewer
        than k positives cannot reach 1.

    Raises:
        TypeError: Ids are no integers, or `where` is not boolean.
        ValueError: Shapes do not fit together, or `k` is below 1 or above M.

    Derivatives: none, the result counts.
    Cost: k K comparisons a row.
    Source: the measure of the extreme classification repository.

    Example:
        >>> ranking, positives = jnp.array([[4, 2, 7]]), jnp.array([[2, 4, 9, -1]])
        >>> print(softlib.metrics.precision_at_k(ranking, positives, k=3).round(4))
        [0.6667]
    """
    hits = _hits("precision_at_k", ranking, positives, k)
    return _counted("precision_at_k", hits.sum(-1) / k, where)


@array_arguments
def recall_at_k(
    ranking: Integer[Array, "*batch M"],
    positives: Integer[Array, "*batch K"],
    *,
    k: int,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """The share of the right labels that are among the first k of a ranking (R@k).

    Args:
        ranking: Distinct ids, the best first; at least `k`. -1 is no label.
        positives: Ids of the labels that are right, distinct; -1 fills a list up.
        k: Static, at least 1.
        where: True for the rows that count; broadcasts to the batch shape.

    Returns:
        A number in [0, 1] per row, float32; 0 where `where` is False, and for a row
        without positives, which `where` may leave out of a mean.

    Raises:
        TypeError: Ids are no integers, or `where` is not boolean.
        ValueError: Shapes do not fit together, or `k` is below 1 or above M.

    Derivatives: none, the result counts.
    Cost: k K comparisons a row.
    Source: the measure of information retrieval.

    Example:
        >>> ranking, positives = jnp.array([[4, 2, 7]]), jnp.array([[2, 4, 9, -1]])
        >>> print(softlib.metrics.recall_at_k(ranking, positives, k=1).round(4))
        [0.3333]
    """
    hits = _hits("recall_at_k", ranking, positives, k)
    right = jnp.maximum((positives >= 0).sum(-1), 1)
    return _counted("recall_at_k", hits.sum(-1) / right, where)


@array_arguments
def propensity_scored_precision_at_k(
    ranking: Integer[Array, "*batch M"],
    positives: Integer[Array, "*batch K"],
    propensities: Float[Array, " L"],
    *,
    k: int,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, ""]:
    r"""Precision in which a rare label that is found counts more (PSP@k).

    With the propensity $p_l$, the probability that a right label $l$ was noted at all,

    $$\frac{\sum_i \sum_{l \in \text{first } k,\, l \in P_i} 1 / p_l}
           {\sum_i \max_{S \subseteq P_i, |S| \le k} \sum_{l \in S} 1 / p_l} .$$

    One number for all rows, not one for each: the repository divides sums, since a mean
    of quotients would give rows of frequent labels as much weight as those of rare
    ones.

    Args:
        ranking: Distinct ids, the best first; at least `k`. -1 is no label.
        positives: Ids of the labels that are right, distinct; -1 fills a list up.
        propensities: Of all labels, in $(0, 1]$, as `label_propensities` gives them.
        k: Static, at least 1.
        where: True for the rows that count; broadcasts to the batch shape.

    Returns:
        A number in $[0, 1]$, in the dtype of `propensities` or float32; 0 without a
        positive. NaN if a positive of a row that counts has no propensity.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together, or `k` is below 1 or above M.

    Derivatives: with respect to `propensities`; the ranking has none.
    Cost: k K comparisons and a sort of K numbers a row.
    Source: "Extreme Multi-label Loss Functions for Recommendation, Tagging, Ranking and
        Other Missing Label Applications", normalised as its repository does.

    Example:
        >>> ranking, positives = jnp.array([[0, 1]]), jnp.array([[1, 2]])
        >>> propensities = jnp.array([1.0, 0.5, 0.25])
        >>> score = softlib.metrics.propensity_scored_precision_at_k
        >>> print(score(ranking, positives, propensities, k=2).round(4))
        0.3333
    """
    function = "propensity_scored_precision_at_k"
    hits = _hits(function, ranking, positives, k)
    checks.require_floating(function, propensities=propensities)
    if propensities.ndim != 1:
        raise ValueError(
            f"{function}: `propensities` must have one axis, one number per label, "
            f"got shape {propensities.shape}."
        )
    inverse = 1 / propensities.astype(accumulator_dtype(propensities))

    def value(ids: Array) -> Array:
        known = labels_in_range(ids, len(inverse))
        found = jnp.where(known < 0, jnp.nan, inverse[jnp.where(known < 0, 0, known)])
        return jnp.where(ids < 0, 0, found)

    gained = jnp.where(hits, value(ranking[..., :k]), 0).sum(-1)
    most = min(k, positives.shape[-1])
    possible = lax.top_k(value(positives), most)[0].sum(-1) if most else 0 * gained
    gained, possible = (_counted(function, a, where) for a in (gained, possible))
    best = possible.sum()
    none = best == 0
    return jnp.where(none, 0, gained.sum() / jnp.where(none, 1, best))


@array_arguments
def label_propensities(
    label_counts: Array, num_examples: int, *, a: Scalar = 0.55, b: Scalar = 1.5
) -> Float[Array, " L"]:
    r"""The probability that a label that is right was noted, from how often it was.

    $$p_l = \frac{1}{1 + C\,(n_l + b)^{-a}}, \qquad C = (\log N - 1)(b + 1)^a :$$

    a model fitted to data whose missing labels are known; rare labels are missed more.

    Args:
        label_counts: $n_l \geq 0$: of how many training examples each is a label.
        num_examples: $N$, static; above $e$, or nothing is missed.
        a: Exponent; 0.55 for Wikipedia, 0.6 for Amazon, where $b = 2.6$.
        b: Offset, positive.

    Returns:
        Numbers in $(0, 1]$, float32, or the dtype of floating counts if that is wider.

    Raises:
        TypeError: `num_examples` is no Python int.
        ValueError: `num_examples` is below 1, or `a` or `b` is no scalar or negative.

    Derivatives: with respect to floating counts, `a` and `b`.
    Cost: a power per label.
    Source: "Extreme Multi-label Loss Functions for Recommendation, Tagging, Ranking and
        Other Missing Label Applications".

    Example:
        >>> counts = jnp.array([1, 10, 1000])
        >>> propensities = softlib.metrics.label_propensities(counts, 10_000)
        >>> print((100 * propensities).astype(int))
        [10 21 76]
    """
    function = "label_propensities"
    checks.require_positive_integer(function, "num_examples", num_examples)
    checks.require_scalar(function, "a", a, 0, math.inf)
    checks.require_scalar(function, "b", b, 0, math.inf)
    counts = jnp.asarray(label_counts)
    counts = counts.astype(
        accumulator_dtype(counts)
        if jnp.issubdtype(counts.dtype, jnp.floating)
        else jnp.float32
    )
    counts, a, b = promoted(counts, a, b)
    constant = max(math.log(num_examples) - 1, 0) * (b + 1) ** a
    return 1 / (1 + constant * (counts + b) ** -a)


def _hits(
    function: str, ranking: Array, positives: Array, k: int
) -> Bool[Array, "*batch k"]:
    checks.require_integer(function, ranking=ranking)
    checks.require_rank(function, "ranking", ranking, 1, "(..., M)")
    require_ids(function, positives, ranking.shape[:-1])
    checks.require_positive_integer(function, "k", k)
    if k > ranking.shape[-1]:
        raise ValueError(
            f"{function}: `k` must be at most the {ranking.shape[-1]} ids of a row of "
            f"`ranking`, got {k}."
        )
    first = ranking[..., :k]
    return (first[..., None] == positives[..., None, :]).any(-1) & (first >= 0)


def _counted(function: str, values: Array, where: Array | None) -> Array:
    values = values.astype(accumulator_dtype(values))
    if where is None:
        return values
    where = checks.checked_where(function, where, values.shape, "the batch shape")
    return jnp.where(where, values, 0)
