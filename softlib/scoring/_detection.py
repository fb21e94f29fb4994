"""Tests of whether a language model wrote a text, from its next-token distributions."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib.logits import AbstractLogits, Logits, moments, token_surprisals
from softlib.losses import softmax_kl_divergence

from ._uncertainty import at_least_one, over_tokens


class EntropyTest(NamedTuple):
    r"""Comparison of a text's log-perplexity with the entropy that a model expects.

    Attributes:
        difference: $L - H$: near 0 if the model wrote the text.
        z: The difference in standard deviations. About normal if the model wrote it.
        log_perplexity: $L$, the mean of $-\log p_t(x_t)$, in nats per token.
        entropy: $H$, the mean entropy of the distributions, in nats per token.
        length: The number of tokens that count, int32.

    Derivatives: none.
    Cost: five numbers per text.

    Example:
        >>> logits = jnp.log(jnp.array([[[0.9, 0.1]] * 4]))
        >>> test = softlib.scoring.entropy_test(logits, jnp.array([[0, 0, 0, 1]]))
        >>> print(test.length[0], f"{test.difference[0]:.2f} {test.z[0]:.2f}")
        4 0.33 1.00
    """

    difference: Float[Array, "*batch"]
    z: Float[Array, "*batch"]
    log_perplexity: Float[Array, "*batch"]
    entropy: Float[Array, "*batch"]
    length: Int[Array, "*batch"]


@array_arguments
def entropy_test(
    logits: Logits,
    labels: Integer[Array, "*batch T"],
    *,
    where: Bool[Array, "..."] | None = None,
) -> EntropyTest:
    r"""Test of whether a model wrote a text, without training.

    $$L - H = \frac{1}{N} \sum_t \bigl(-\log p_t(x_t) - H(p_t)\bigr), \qquad
        z = \frac{\sum_t (-\log p_t(x_t) - H(p_t))}
        {\sqrt{\sum_t \mathrm{Var}_{p_t}(\log p_t)}}$$

    If the model wrote the text, each term has mean 0 given the tokens before: the
    difference tends to 0 and $z$ is about standard normal, so that $|z| > 1.96$ rejects
    a text of the model with a probability of 5 %. Take a threshold
    $c / \sqrt N$ on $|L - H|$ for a level that is exponentially small in $N$.

    The test sees nothing but $\mathrm{CE}(q, p) - H(p)$ of an author $q$, which is
    small for authors that are as predictable to the model as its own text. If the other
    author is a model too, take `two_model_test`.

    Args:
        logits: An array of logits, or a value such as `softlib.LinearLogits`; one row
            per token, given all before it, with its prompt. As they were sampled from:
            a temperature or top-p must be in them (-inf is legal).
        labels: Class ids in $[0, V)$, the tokens that the rows predict.
        where: True for the tokens that count: not the prompt, not padding, and not the
            first token, which nothing predicts. Broadcasts to `labels`. Others may
            hold anything.

    Returns:
        `EntropyTest`, float32 (float64 if an argument is float64). 0 for a text without
        tokens; $z$ is 0 where no distribution has a variance. NaN with a label outside
        $[0, V)$; +inf with an impossible one.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together, there is no axis of tokens, or an option
            of the logits has no meaning here.

    Derivatives: none; `sequence_nll` and `sequence_entropy` have them.
    Cost: as the forward passes of `softlib.logits.token_surprisals` and
        `softlib.logits.moments`, three streams of a head; no array of tokens x classes.
    Source: "Zero-Shot Statistical Tests for LLM-Generated Text Detection using Finite
        Sample Concentration Inequalities". Deviation: the standardised $z$ instead of
        the paper's constants, which we have not verified.

    Example:
        >>> logits = jnp.array([[[2.0, 0.0], [0.0, 0.0]]])
        >>> test = softlib.scoring.entropy_test(logits, jnp.array([[0, 1]]))
        >>> print(f"{test.log_perplexity[0]:.3f} {test.entropy[0]:.3f}")
        0.410 0.529
    """
    function = "entropy_test"
    with checks.under_name(function, "token_surprisals"):
        each = lax.stop_gradient(token_surprisals(logits, labels, where=where))
    with checks.under_name(function, "moments"):
        found = moments(logits, order=2)
    assert found.variance is not None
    counts = jnp.broadcast_to(jnp.asarray(True if where is None else where), each.shape)
    expected, variance = (
        jnp.where(counts, moment, 0) for moment in (found.mean, found.variance)
    )
    log_perplexity = over_tokens(function, each, "mean", where)
    # The terms are subtracted before they are summed: the sums would cancel.
    excess = (each - expected).sum(-1)
    total = variance.sum(-1)
    some = total > 0
    z = excess / jnp.sqrt(jnp.where(some, total, 1))
    z = jnp.where(some | ~jnp.isfinite(excess), z, 0)
    z = jnp.where(jnp.isnan(total), jnp.nan, z)
    count = at_least_one(each, where)
    length = counts.sum(-1).astype(jnp.int32)
    mean_entropy = expected.sum(-1) / count
    return EntropyTest(excess / count, z, log_perplexity, mean_entropy, length)


class TwoModelTest(NamedTuple):
    r"""Log-likelihood ratio of a text under two models, and what each would give.

    Attributes:
        log_ratio: The mean of $\log p_t(x_t) - \log q_t(x_t)$, in nats per token.
        expected: Its mean if the first model wrote the text,
            $\mathrm{KL}(p_t \,\|\, q_t)$, at least 0.
        expected_other: Its mean if the other did, $-\mathrm{KL}(q_t \,\|\, p_t)$, at
            most 0.
        length: The number of tokens that count, int32.

    Derivatives: see `two_model_test`.
    Cost: four numbers per text.

    Example:
        >>> p, q = (jnp.log(jnp.array([[[a, 1 - a]]])) for a in (0.75, 0.5))
        >>> test = softlib.scoring.two_model_test(p, q, jnp.array([[0]]))
        >>> print(f"{test.log_ratio[0]:.3f} {test.expected[0]:.3f}")
        0.405 0.131
    """

    log_ratio: Float[Array, "*batch"]
    expected: Float[Array, "*batch"]
    expected_other: Float[Array, "*batch"]
    length: Int[Array, "*batch"]


@array_arguments
def two_model_test(
    logits: Logits,
    other_logits: Logits,
    labels: Integer[Array, "*batch T"],
    *,
    where: Bool[Array, "..."] | None = None,
) -> TwoModelTest:
    r"""Log-likelihood ratio of two models, one of which wrote a text.

    The first is likelier where the ratio is positive; against equal error rates compare
    it with the middle of the two expectations.

    Args:
        logits: Of the first model: an array, or a value such as
            `softlib.LinearLogits`; one row per token.
        other_logits: Of the other model, for the same tokens and classes.
        labels: Class ids in $[0, V)$, the tokens that the rows predict.
        where: True for the tokens that count; broadcasts to `labels`. Others may hold
            anything.

    Returns:
        `TwoModelTest`, float32 (float64 if an argument is float64). 0 for a text
        without tokens. NaN with a label outside $[0, V)$ or impossible for both.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together, or there is no axis of tokens.
        NotImplementedError: No implementation that was named can run.

    Derivatives: as `softlib.logits.token_surprisals` and
        `softlib.losses.softmax_kl_divergence`.
    Cost: of both functions: a pass over each head for the tokens, and for each
        divergence two products per head.
    Source: the two-model form of "Zero-Shot Statistical Tests for LLM-Generated Text
        Detection using Finite Sample Concentration Inequalities".

    Example:
        >>> p, q = (jnp.log(jnp.array([[[a, 1 - a]]])) for a in (0.75, 0.5))
        >>> test = softlib.scoring.two_model_test(p, q, jnp.array([[1]]))
        >>> print(f"{test.log_ratio[0]:.3f} {test.expected_other[0]:.3f}")
        -0.693 -0.144
    """
    function = "two_model_test"
    _require_alike(function, logits, other_logits)
    with checks.under_name(function, "softmax_kl_divergence"):
        forward = softmax_kl_divergence(other_logits, logits, where=where)
        reverse = softmax_kl_divergence(logits, other_logits, where=where)
    with checks.under_name(function, "token_surprisals"):
        own = token_surprisals(logits, labels, where=where)
        other = token_surprisals(other_logits, labels, where=where)
    mean = lambda each: over_tokens(function, each, "mean", where)
    counts = jnp.broadcast_to(jnp.asarray(True if where is None else where), own.shape)
    length = counts.sum(-1).astype(jnp.int32)
    ratio = mean(other - own)
    return TwoModelTest(ratio, mean(forward), 0 - mean(reverse), length)


def _require_alike(function: str, logits: Logits, other_logits: Logits) -> None:
    shapes = []
    for name, value in (("logits", logits), ("other_logits", other_logits)):
        if not isinstance(value, AbstractLogits):
            value = jnp.asarray(value)
            checks.require_floating(function, **{name: value})
        shapes.append(value.shape)
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{function}: `other_logits` must have the shape of `logits`, {shapes[0]}, "
            f"got {shapes[1]}."
        )
