"""Cascades: a small model answers, and a large one where the small one is uncertain."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype
from softlib._expm1 import expm1
from softlib.softmax import log_softmax
from softlib.typing import Scalar


class EnsembleUncertainty(NamedTuple):
    r"""Uncertainty of an ensemble's prediction per example, entropies in nats.

    With $p_s$ the distribution of member $s$ and $\bar p$ the mean of all:

    Attributes:
        predictive_entropy: $H(\bar p)$, the whole uncertainty.
        expected_entropy: The mean of $H(p_s)$, what no further training removes.
        mutual_information: The mean of $\mathrm{KL}(p_s \,\|\, \bar p)$, their
            difference: how far the members disagree. Never below 0.
        least_confidence: $1 - \max_j \bar p_j$.

    Derivatives: see `ensemble_uncertainty`.
    Cost: four numbers per example.

    Example:
        >>> logits = jnp.array([[[9.0, 0.0]], [[0.0, 9.0]]])
        >>> found = softlib.scoring.ensemble_uncertainty(logits)
        >>> print([round(float(each[0]), 2) for each in found])
        [0.69, 0.0, 0.69, 0.5]
    """

    predictive_entropy: Float[Array, "*batch"]
    expected_entropy: Float[Array, "*batch"]
    mutual_information: Float[Array, "*batch"]
    least_confidence: Float[Array, "*batch"]


@array_arguments
def ensemble_uncertainty(
    logits: Float[Array, "S *batch C"], *, where: Bool[Array, "..."] | None = None
) -> EnsembleUncertainty:
    r"""Uncertainty of the mean prediction of several models or of several passes.

    $$\bar p = \frac{1}{S} \sum_s p_s, \qquad
        H(\bar p) = \frac{1}{S} \sum_s H(p_s)
        + \frac{1}{S} \sum_s \mathrm{KL}(p_s \,\|\, \bar p)$$

    The members are those of an ensemble, or one model under several dropout masks. The
    last term is the mutual information of member and prediction. It is computed as a
    sum of terms that are not negative instead of as a difference of entropies, so that
    it is accurate where the members almost agree, and
    the least confidence from the classes other than the likeliest.

    Args:
        logits: One array per member on the first axis; -inf is legal.
        where: True for the members that count, for all or per example: broadcasts to
            the axes before the classes, (S, *batch). Others may hold anything.

    Returns:
        `EnsembleUncertainty`, float32 (float64 for float64). 0 for an example without
        members that count. A member whose logits are all -inf makes its example NaN.

    Raises:
        TypeError: `logits` are not floating, or `where` is not boolean.
        ValueError: `logits` have fewer than two axes, no member or no class, or `where`
            does not broadcast.

    Derivatives: forward and reverse, any order, with respect to `logits`.
    Cost: a few passes over `logits`, with arrays of their size.
    Source: "AdaptiveLog: An Adaptive Log Analysis Framework with the Collaboration of
        Large and Small Language Model", which estimates uncertainty from repeated
        passes. Which of these numbers it takes is not known to us.

    Example:
        >>> logits = jnp.array([[[9.0, 0.0]], [[0.0, 9.0]]])
        >>> found = softlib.scoring.ensemble_uncertainty(logits)
        >>> print((1000 * found.mutual_information).round(), found.least_confidence)
        [692.] [0.5]
    """
    function = "ensemble_uncertainty"
    checks.require_floating(function, logits=logits)
    checks.require_rank(function, "logits", logits, 2, "(S, ..., C)")
    if 0 in (logits.shape[0], logits.shape[-1]):
        raise ValueError(
            f"{function}: `logits` must have at least one member on the first axis and "
            f"one class on the last, got shape {logits.shape}."
        )
    shape = logits.shape[:-1]
    where = checks.checked_where(function, where, shape, "the shape before the classes")
    logits = logits.astype(accumulator_dtype(logits))
    log_p = log_softmax(jnp.where(where[..., None], logits, 0))
    massless = jnp.isneginf(log_p).all(-1) & where

    count = jnp.maximum(where.sum(0), 1).astype(log_p.dtype)
    counted = jnp.where(where[..., None], log_p, -jnp.inf)
    log_mean = _logsumexp(counted, 0) - jnp.log(count)[..., None]
    mean = jnp.exp(log_mean)
    # An entropy takes the classes that have a probability: 0 log 0 is 0.
    known = lambda log_p: jnp.where(jnp.isneginf(log_p), 0, log_p)
    predictive = 0 - (mean * known(log_mean)).sum(-1)
    over_members = lambda each: jnp.where(where, each, 0).sum(0) / count
    expected = over_members(0 - (jnp.exp(log_p) * known(log_p)).sum(-1))
    information = over_members(_divergence_terms(counted, log_mean[None]).sum(-1))

    top = jnp.argmax(log_mean, axis=-1)
    classes = lax.broadcasted_iota(top.dtype, log_mean.shape, log_mean.ndim - 1)
    others = jnp.where(classes == top[..., None], 0, mean).sum(-1)
    found = EnsembleUncertainty(
        predictive, expected, jnp.maximum(information, 0), others
    )
    bad, some = massless.any(0), where.any(0)
    return EnsembleUncertainty(
        *(jnp.where(bad, jnp.nan, jnp.where(some, each, 0)) for each in found)
    )


def _divergence_terms(log_p: Array, log_q: Array) -> Array:
    """Terms of KL(p || q), each 0 or more: p (e^d - 1 - d) with d = log q - log p.

    Over all classes e^d - 1 adds 0, as p and q sum to 1; a class without p adds q.
    """
    log_q = jnp.broadcast_to(log_q, log_p.shape)
    possible = ~jnp.isneginf(log_p)
    log_p, log_q_there = (jnp.where(possible, x, 0) for x in (log_p, log_q))
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    d = log_q_there - log_p
    near = d < 1  # elsewhere nothing cancels, and e^d could overflow
    small = jnp.where(near, d, 0)
    terms = jnp.where(near, p * (expm1(small) - small), q - p - p * d)
    return jnp.where(possible, terms, q)


def _logsumexp(x: Array, axis: int) -> Array:
    """The logsumexp; -inf, without a gradient, where all entries are."""
    empty = jnp.isneginf(x).all(axis, keepdims=True)
    found = jax.nn.logsumexp(jnp.where(empty, 0, x), axis=axis)
    return jnp.where(empty.squeeze(axis), -jnp.inf, found)


@array_arguments
def route_by_uncertainty(
    uncertainty: Float[Array, " B"],
    *,
    budget: float | None = None,
    threshold: Scalar | None = None,
    where: Bool[Array, " B"] | None = None,
) -> Bool[Array, " B"]:
    r"""True for the most uncertain examples, which a large model should answer.

    Args:
        uncertainty: A number per example, greater where the small model is less sure.
            NaN is the greatest.
        budget: Static share of the examples in $[0, 1]$ that may be sent on: of $n$
            that count exactly $\lfloor n \cdot budget \rfloor$ are, of equally
            uncertain ones the lower index first.
        threshold: Send the examples of a greater uncertainty, instead of a share; a
            number or a scalar array.
        where: True for the examples that count; others are never sent.

    Returns:
        Booleans, True for what is sent on.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: `uncertainty` has not one axis, both or neither of `budget` and
            `threshold` are given, or one is out of range.

    Derivatives: none, the result is boolean.
    Cost: a sort of the examples for a budget.
    Source: "AdaptiveLog: An Adaptive Log Analysis Framework with the Collaboration of
        Large and Small Language Model".

    Example:
        >>> uncertainty = jnp.array([0.1, 0.9, 0.4, 0.4])
        >>> print(softlib.scoring.route_by_uncertainty(uncertainty, budget=0.5))
        [False  True  True False]
    """
    function = "route_by_uncertainty"
    where = _checked(function, uncertainty, where)
    if (budget is None) == (threshold is None):
        raise ValueError(
            f"{function}: one of `budget` and `threshold` must be given, got "
            f"budget={budget} and threshold={threshold}."
        )
    if threshold is not None:
        checks.require_scalar(function, "threshold", threshold, -math.inf, math.inf)
        above = ~(uncertainty <= jnp.asarray(threshold, uncertainty.dtype))
        return above & where
    checks.require_number(function, "budget", budget)
    assert budget is not None
    if not 0 <= budget <= 1:
        raise ValueError(f"{function}: `budget` must be in [0, 1], got {budget}.")
    # The product of 0.29 and 100 is below 29 by its rounding.
    share = lambda n: math.floor(budget * n * (1 + 1e-12))
    sent = [min(share(n), n) for n in range(uncertainty.shape[0] + 1)]
    places = _places(uncertainty, where)
    return (places < jnp.asarray(np.array(sent, np.int32))[where.sum()]) & where


def _checked(function: str, uncertainty: Array, where: Array | None) -> Array:
    checks.require_floating(function, uncertainty=uncertainty)
    if uncertainty.ndim != 1:
        raise ValueError(
            f"{function}: `uncertainty` must have one axis (B,), got shape "
            f"{uncertainty.shape}."
        )
    shape = uncertainty.shape
    return checks.checked_where(function, where, shape, "the shape of `uncertainty`")


def _order(uncertainty: Array, where: Array) -> Int[Array, " B"]:
    """Indices from the most uncertain example on; those that do not count are last."""
    key = lax.stop_gradient(jnp.where(jnp.isnan(uncertainty), jnp.inf, uncertainty))
    nan = jnp.isnan(uncertainty)
    # By the last key first: not counted, then not NaN, then the falling uncertainty.
    return jnp.lexsort((-key, ~nan, ~where)).astype(jnp.int32)


def _places(uncertainty: Array, where: Array) -> Int[Array, " B"]:
    """The place of each example in `_order`."""
    order = _order(uncertainty, where)
    return jnp.argsort(order).astype(jnp.int32)


@array_arguments(as_given=("small_correct", "large_correct"))
def cascade_curve(
    uncertainty: Float[Array, " B"],
    small_correct: Num[Array, " B"] | Bool[Array, " B"],
    large_correct: Num[Array, " B"] | Bool[Array, " B"],
    *,
    where: Bool[Array, " B"] | None = None,
) -> Float[Array, " budgets"]:
    r"""Accuracy of a cascade against the number of examples that are sent on.

    Entry $m$ is the mean correctness if the $m$ most uncertain examples get the answer
    of the large model: the first entry is the accuracy of the small model alone, the
    last that of the large one. For `uncertainty` equal to `large_correct -
    small_correct` it is the best curve that any order has. Its mean, less the mean of
    the two ends, is what the order gains over a random one.

    Args:
        uncertainty: A number per example; the order is that of `route_by_uncertainty`.
        small_correct: Whether the small model is right, or any score, the more the
            better.
        large_correct: The same of the large model.
        where: True for the examples that count; others may hold anything.

    Returns:
        B + 1 numbers, float32 (float64 if a score is float64). With $n$ examples that
        count, the entries from $n$ on are equal; 0 if none counts.

    Raises:
        TypeError: `uncertainty` is not floating, or `where` is not boolean.
        ValueError: There is not one axis, or shapes differ.

    Derivatives: with respect to the scores; the order has none.
    Cost: a sort of the examples.
    Source: "AdaptiveLog: An Adaptive Log Analysis Framework with the Collaboration of
        Large and Small Language Model", as a curve over all budgets.

    Example:
        >>> uncertainty = jnp.array([0.1, 0.9, 0.4, 0.2])
        >>> small, large = jnp.array([1, 0, 0, 1]), jnp.ones(4)
        >>> print(softlib.scoring.cascade_curve(uncertainty, small, large))
        [0.5  0.75 1.   1.   1.  ]
    """
    function = "cascade_curve"
    where = _checked(function, uncertainty, where)
    small, large = jnp.asarray(small_correct), jnp.asarray(large_correct)
    shape, why = uncertainty.shape, "the shape of `uncertainty`"
    checks.require_shape(function, "small_correct", small, shape, why)
    checks.require_shape(function, "large_correct", large, shape, why)
    dtype = accumulator_dtype(small, large)
    small, large = (jnp.where(where, a.astype(dtype), 0) for a in (small, large))
    gains = (large - small)[_order(uncertainty, where)]
    steps = jnp.concatenate([small.sum()[None], gains])
    return jnp.cumsum(steps) / jnp.maximum(where.sum(), 1).astype(dtype)


class SimilarCases(NamedTuple):
    """The most similar of known cases for each query, in falling order.

    Attributes:
        indices: Indices of the cases, int32, the lower first on ties; -1 where there
            are fewer than asked for.
        scores: Their cosines with the query, -inf where there is none.

    Derivatives: of the scores.
    Cost: 2 k numbers per query.

    Example:
        >>> cases = jnp.array([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]])
        >>> found = softlib.scoring.similar_cases(jnp.array([[0.0, 1.0]]), cases, k=2)
        >>> print(found.indices, (100 * found.scores).round())
        [[1 2]] [[100.  80.]]
    """

    indices: Int[Array, "*batch k"]
    scores: Float[Array, "*batch k"]


@array_arguments
def similar_cases(
    queries: Float[Array, "*batch D"],
    cases: Float[Array, "N D"],
    *,
    k: int,
    where: Bool[Array, " N"] | None = None,
) -> SimilarCases:
    r"""The k cases whose embeddings have the greatest cosine with that of a query.

    With the past mistakes of a small model as cases, it finds those to show to the
    large model beside a new example that the small one is not sure of.

    Args:
        queries: Embeddings; that of a query of zeros has cosine 0 with all cases.
        cases: Embeddings of the known cases.
        k: Static number of cases per query, at least 1 and at most N.
        where: True for the cases that exist; others may hold anything.

    Returns:
        `SimilarCases`, scores in float32 (float64 if an argument is float64). A query
        with NaN, or a case with NaN that exists, has scores NaN.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together, or `k` is out of range.

    Derivatives: of the scores, with respect to both embeddings, 0 at zero vectors.
    Cost: time $O(B N D)$, memory for the cosines of all queries with all cases.
    Source: the retrieval of error-prone cases of "AdaptiveLog: An Adaptive Log Analysis
        Framework with the Collaboration of Large and Small Language Model".

    Example:
        >>> cases = jnp.array([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]])
        >>> where = jnp.array([True, False, True])
        >>> find = softlib.scoring.similar_cases
        >>> print(find(jnp.array([[0.0, 1.0]]), cases, k=1, where=where).indices)
        [[2]]
    """
    function = "similar_cases"
    checks.require_floating(function, queries=queries, cases=cases)
    checks.require_rank(function, "queries", queries, 1, "(..., D)")
    if cases.ndim != 2 or cases.shape[1] != queries.shape[-1]:
        raise ValueError(
            f"{function}: `cases` must have shape (N, {queries.shape[-1]}), one "
            f"embedding per case, got {cases.shape}."
        )
    checks.require_positive_integer(function, "k", k)
    count = cases.shape[0]
    if k > count:
        raise ValueError(
            f"{function}: `k` must be at most the number of cases, {count}, got {k}."
        )
    where = checks.checked_where(function, where, (count,), "one per case")
    dtype = accumulator_dtype(queries, cases)
    cases = jnp.where(where[:, None], cases, 0)
    scores = jnp.einsum(
        "...d,nd->...n",
        _unit(queries.astype(dtype)),
        _unit(cases.astype(dtype)),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=dtype,
    )
    there = jnp.broadcast_to(where, scores.shape)
    scores, indices = lax.top_k(jnp.where(there, scores, -jnp.inf), k)
    return SimilarCases(jnp.where(jnp.isneginf(scores), -1, indices), scores)


def _unit(x: Array) -> Array:
    """The vectors divided by their lengths; 0 for 0, without overflow."""
    largest = lax.stop_gradient(jnp.abs(x).max(-1, keepdims=True))
    zero = largest == 0
    x = x / jnp.where(zero, 1, largest)
    squares = jnp.where(zero, 1, (x * x).sum(-1, keepdims=True))
    return jnp.where(zero, 0, x) / jnp.sqrt(squares)
