"""Linear-chain conditional random fields: labels of a sequence, chosen together."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._linear_chain import METHODS, checked_chain, labelled, log_normalizer


@array_arguments
def crf_loss(
    emissions: Float[Array, "*batch T K"],
    labels: Integer[Array, "*batch T"],
    transitions: Float[Array, "K K"],
    *,
    start: Float[Array, " K"] | None = None,
    end: Float[Array, " K"] | None = None,
    where: Bool[Array, "..."] | None = None,
    method: Literal["sequential", "associative"] = "sequential",
) -> Float[Array, "*batch"]:
    r"""Negative log-likelihood of a label sequence under a linear-chain CRF.

    $$L = \log \sum_{y'} e^{s(y')} - s(y), \qquad s(y) = a_{y_1}
        + \sum_t E_{t, y_t} + \sum_{t > 1} A_{y_{t-1}, y_t} + b_{y_T}$$

    for emissions $E$, transitions $A$, and $a$, $b$ at both ends. With transitions that
    are all equal it is the sum of the softmax cross-entropies of the steps.

    The normaliser is computed relative to $s(y)$: the loss of a long sequence is no
    difference of large numbers.

    Args:
        emissions: Scores of the K labels in each step.
        labels: The target, ids in $[0, K)$. An id outside, in a step that counts, makes
            the loss NaN without gradient.
        transitions: $A_{ij}$ from label $i$ to label $j$; -inf forbids.
        start: $a$; None: 0.
        end: $b$; None: 0.
        where: True for the steps that count, usually the first ones of each sequence;
            broadcasts to the shape of `labels`. The others are as if they were not
            there, whatever they hold: the steps around them are neighbours.
        method: Static. "sequential" takes a step after the other; "associative" joins
            neighbours in a tree of depth log T, with K times the work.

    Returns:
        The loss per sequence, float32 (float64 if an argument is float64); 0 for one
        without a step that counts; +inf, without gradient, for one that is forbidden.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together, or `method` is unknown.

    Derivatives: any order, with respect to all floating arguments. Those of the
        emissions are marginals less one-hot labels, those of the transitions expected
        less observed counts.
    Cost: O(T K^2) time; keeps O(T K) numbers for the gradient. "associative": O(T K^3)
        time, O(T K^2) numbers.
    Source: "Conditional Random Fields: Probabilistic Models for Segmenting and Labeling
        Sequence Data"; the tagger of "Did We Miss Something Important? Studying and
        Exploring Variable-Aware Log Abstraction".

    Example:
        >>> emissions = jnp.array([[2.0, 0.0], [0.0, 1.0], [2.0, 0.0]])
        >>> stay = jnp.array([[1.0, -1.0], [-1.0, 1.0]])
        >>> labels = jnp.array([0, 0, 0])
        >>> print(softlib.losses.crf_loss(emissions, labels, stay).round(4))
        0.212
    """
    function = "crf_loss"
    chain = checked_chain(function, emissions, transitions, start, end, where)
    checks.require_integer(function, labels=labels)
    why = "an id for each step of `emissions`"
    checks.require_shape(function, "labels", labels, chain.counts.shape, why)
    checks.require_one_of(function, "method", method, METHODS)

    scores, outside = labelled(chain, labels)
    possible = (scores > -jnp.inf) | jnp.isnan(scores)
    forbidden = ~possible.all(-1)
    # Relative to the target, whose own score becomes 0 in every step.
    shift = jnp.where(possible, scores, 0)[..., None]
    relative = chain._replace(emissions=chain.emissions - shift)
    loss = log_normalizer(relative, method)
    return jnp.where(outside, jnp.nan, jnp.where(forbidden, jnp.inf, loss))


@array_arguments
def crf_log_normalizer(
    emissions: Float[Array, "*batch T K"],
    transitions: Float[Array, "K K"],
    *,
    start: Float[Array, " K"] | None = None,
    end: Float[Array, " K"] | None = None,
    where: Bool[Array, "..."] | None = None,
    method: Literal["sequential", "associative"] = "sequential",
) -> Float[Array, "*batch"]:
    r"""Logarithm of the sum of $e^{s(y)}$ over all label sequences $y$ of a CRF.

    The score $s$ is that of `crf_loss`.

    Args:
        emissions, transitions, start, end, where, method: As in `crf_loss`.

    Returns:
        $\log Z$ per sequence, float32 (float64 if an argument is float64); 0 for one
        without a step that counts; -inf, without gradient, if all are forbidden.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together, or `method` is unknown.

    Derivatives: any order, with respect to all arguments. Those of the emissions are
        `crf_marginals`, those of the transitions expected counts.
    Cost: as `crf_loss`.
    Source: "Conditional Random Fields: Probabilistic Models for Segmenting and Labeling
        Sequence Data".

    Example:
        >>> emissions, transitions = jnp.zeros((3, 2)), jnp.zeros((2, 2))
        >>> log_normalizer = softlib.losses.crf_log_normalizer(emissions, transitions)
        >>> print(jnp.exp(log_normalizer).round(3))  # 2^3 sequences of score 0
        8.0
    """
    function = "crf_log_normalizer"
    chain = checked_chain(function, emissions, transitions, start, end, where)
    checks.require_one_of(function, "method", method, METHODS)
    return log_normalizer(chain, method)


@array_arguments
def crf_marginals(
    emissions: Float[Array, "*batch T K"],
    transitions: Float[Array, "K K"],
    *,
    start: Float[Array, " K"] | None = None,
    end: Float[Array, " K"] | None = None,
    where: Bool[Array, "..."] | None = None,
    method: Literal["sequential", "associative"] = "sequential",
) -> Float[Array, "*batch T K"]:
    r"""Probability of each label in each step, over all label sequences of a CRF.

    $p(y_t = k) = \partial \log Z / \partial E_{tk}$.

    Args:
        emissions, transitions, start, end, where, method: As in `crf_loss`.

    Returns:
        Marginals, float32 (float64 if an argument is float64), of sum 1 in every step;
        0 in steps that do not count, and where all sequences are forbidden.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together, or `method` is unknown.

    Derivatives: any order, with respect to all arguments.
    Cost: that of the gradient of `crf_loss`.
    Source: "Conditional Random Fields: Probabilistic Models for Segmenting and Labeling
        Sequence Data".

    Example:
        >>> emissions = jnp.array([[2.0, 0.0], [0.0, 1.0], [2.0, 0.0]])
        >>> stay = jnp.array([[1.0, -1.0], [-1.0, 1.0]])
        >>> print(softlib.losses.crf_marginals(emissions, stay)[1].round(2))
        [0.84 0.16]
    """
    function = "crf_marginals"
    chain = checked_chain(function, emissions, transitions, start, end, where)
    checks.require_one_of(function, "method", method, METHODS)

    def total(emissions: Array) -> Array:
        return log_normalizer(chain._replace(emissions=emissions), method).sum()

    return jax.grad(total)(chain.emissions)
