"""Candidate sequences: their utilities, probabilities, and the choice among them."""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Integer

from softlib import _checks as checks, logits as logits_
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype
from softlib.logits import Logits
from softlib.logits._labelled_rows import rows_that_count
from softlib.logits._sources import source_of
from softlib.softmax import log_softmax
from softlib.typing import Scalar


@array_arguments
def sequence_utility(
    logits: Logits,
    tokens: Integer[Array, "*batch T"],
    *,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""Utility of each sequence: the sum of the logits of its tokens.

    $$U(y) = \sum_t w_t u_t(y_t)$$

    Training by maximum likelihood moves the utilities $u_t$ of a step by the gradient
    of $\log \operatorname{softmax}(u_t)_{y_t}$, the one-hot of the chosen token less
    the softmax: the utility of the token rises, and those of all others fall by their
    share. `softlib.logits.sequence_log_probs` is $U$ less the logsumexp of each step,
    which depends on the tokens before: the two rank sequences differently.

    A constant added to the logits of one step changes $U$ and no probability. So $U$
    means something only for logits as the model gives them, of one model; where they
    may be shifted take log-probabilities.

    Args:
        logits: An array of logits, or a value such as `softlib.LinearLogits`; one row
            per token.
        tokens: Ids in $[0, V)$; a sequence with another one is NaN. One that is
            excluded makes it -inf.
        where: True for the tokens that count; broadcasts to the shape of `tokens`.
            Others may hold anything.

    Returns:
        One number per sequence, float32 (float64 if an argument is float64); 0 without
        a token that counts.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together, or there is no axis of tokens.

    Derivatives: as `softlib.logits.gather`.
    Cost: as `softlib.logits.gather` with one class per row: a linear head computes the
        logits of the tokens only.
    Source: "Utility-Probability Duality of Neural Networks".

    Example:
        >>> logits = softlib.LinearLogits(jnp.eye(3), jnp.diag(jnp.array([1., 2., 4.])))
        >>> print(softlib.decoding.sequence_utility(logits, jnp.array([0, 1, 2])))
        7.0
    """
    function = "sequence_utility"
    source = source_of(function, logits)
    batch = source.batch_shape
    if not batch:
        raise ValueError(
            f"{function}: `logits` must have at least 2 axes, the tokens of a sequence "
            "before the classes, got 1."
        )
    checks.require_integer(function, tokens=tokens)
    checks.require_shape(function, "tokens", tokens, batch, "one per row of `logits`")
    where = rows_that_count(source, where)
    found = logits_.gather(source.masked(where), tokens[..., None])[..., 0]
    if where is not None:
        found = jnp.where(where, found, 0)
    return found.sum(-1)


@array_arguments
def candidate_log_probs(
    scores: Float[Array, "*batch N"],
    *,
    lengths: Integer[Array, "*batch N"] | None = None,
    length_power: Scalar = 0.0,
    temperature: Scalar = 1.0,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch N"]:
    r"""Log-probabilities of a few candidate sequences, relative to each other.

    $$\log P(y) = \log \operatorname{softmax}_{y \in S}
        \left( \frac{s(y)}{\tau |y|^\alpha} \right)$$

    The scores are log-probabilities or utilities of whole sequences, as of
    `beam_search` or of samples. The probability of a sequence falls with its length, so
    that the most probable one may be the empty one; a power of 1 compares means per
    token instead.

    Scores of sequences differ by tens of nats: without a power, temperature 1 leaves
    one candidate. Choose both on held-out data. A candidate that is listed twice counts
    twice: leave duplicates out by `where`, as with `softlib.scoring.identical_groups`.

    Args:
        scores: A number per candidate; -inf is impossible.
        lengths: Number of tokens of each candidate, at least 1 with a `length_power`;
            needed for it.
        length_power: $\alpha \geq 0$, a number or a scalar array.
        temperature: $\tau > 0$, a number or a scalar array.
        where: True for the candidates that count; broadcasts to `scores`. Others may
            hold anything.

    Returns:
        In the shape of `scores`, float32 (float64 for float64), in nats; -inf for a
        candidate that does not count, also for all of them. A row is NaN if a score
        that counts is NaN or +inf, or a length below 1 where there is a power.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit, a number is out of range, or there is a
            `length_power` and no `lengths`.

    Derivatives: forward and reverse mode, any order, with respect to `scores`,
        `length_power` and `temperature`.
    Cost: a few passes over the candidates.
    Source: "Utility-Probability Duality of Neural Networks". Its equation from
        utilities to probabilities is not known to us: this is a softmax over a set.

    Example:
        >>> scores, lengths = jnp.array([[-3.0, -4.0]]), jnp.array([[1, 4]])
        >>> of = softlib.decoding.candidate_log_probs
        >>> log_probs = of(scores, lengths=lengths, length_power=1.0)
        >>> print((100 * jnp.exp(log_probs)).round())
        [[12. 88.]]
    """
    function = "candidate_log_probs"
    checks.require_floating(function, scores=scores)
    checks.require_rank(function, "scores", scores, 1, "(..., N)")
    checks.require_scalar(function, "length_power", length_power, 0, math.inf)
    checks.require_positive_scalars(function, temperature=temperature)
    where = checks.checked_where(function, where, scores.shape, "that of `scores`")
    dtype = accumulator_dtype(scores)
    z = jnp.where(where, scores, -jnp.inf).astype(dtype)
    plain = isinstance(length_power, int | float) and length_power == 0
    if lengths is not None:
        checks.require_integer(function, lengths=lengths)
        checks.require_shape(function, "lengths", lengths, scores.shape, "one a score")
    elif not plain:
        raise ValueError(
            f"{function}: `lengths` must be given with a `length_power`, got None."
        )
    divisor = jnp.asarray(temperature, dtype)
    if lengths is not None and not plain:
        power = jnp.asarray(length_power, dtype)
        divisor = divisor * jnp.maximum(lengths, 1).astype(dtype) ** power
        z = jnp.where(where & (lengths < 1) & (power > 0), jnp.nan, z)
    # Divided where finite: -inf / x has no derivative by x.
    finite = jnp.isfinite(z)
    return log_softmax(jnp.where(finite, jnp.where(finite, z, 0) / divisor, z))


@array_arguments
def minimum_bayes_risk(
    candidate_log_probs: Float[Array, "*batch N"], gain: Float[Array, "*batch N N"]
) -> Int[Array, "*batch"]:
    r"""Index of the candidate of the greatest expected gain.

    $$\arg\max_i \sum_j P_j\, G_{ij}$$

    With $G_{ij}$ the quality of candidate $i$ if $j$ is the truth, a similarity such as
    one less the edit distance per token, it chooses the candidate that agrees best with
    all. With the identity as gain it is the most probable one.

    Args:
        candidate_log_probs: Log-probabilities of the candidates, as of the function of
            that name; -inf for one that does not exist, which is neither chosen nor
            asked. They need not be normalised.
        gain: The gain of choosing the candidate of the first index if that of the
            second is true. Of candidates that do not exist it may hold anything.

    Returns:
        int32, the lower index on ties; -1 for a row without a candidate, or with a NaN.

    Raises:
        TypeError: An argument is not floating.
        ValueError: Shapes do not fit together.

    Derivatives: none, the result is an index.
    Cost: time and memory N² per row.
    Source: "Utility-Probability Duality of Neural Networks"; the definition.

    Example:
        >>> log_probs = jnp.log(jnp.array([0.4, 0.3, 0.3]))
        >>> gain = jnp.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.9], [0.0, 0.9, 1.0]])
        >>> print(softlib.decoding.minimum_bayes_risk(log_probs, gain))
        1
    """
    function = "minimum_bayes_risk"
    log_probs = candidate_log_probs
    checks.require_floating(function, candidate_log_probs=log_probs, gain=gain)
    checks.require_rank(function, "candidate_log_probs", log_probs, 1, "(..., N)")
    shape = (*log_probs.shape, log_probs.shape[-1])
    checks.require_shape(function, "gain", gain, shape, "one per pair of candidates")
    if not log_probs.shape[-1]:
        return jnp.full(log_probs.shape[:-1], -1, jnp.int32)
    dtype = accumulator_dtype(log_probs, gain)
    log_probs, gain = log_probs.astype(dtype), gain.astype(dtype)
    exists = log_probs != -jnp.inf
    top = jnp.max(log_probs, -1, keepdims=True)
    p = jnp.exp(jnp.where(exists, log_probs - jnp.where(exists, top, 0), -jnp.inf))
    gain = jnp.where(exists[..., None, :], gain, 0)
    expected = jnp.einsum("...ij,...j->...i", gain, p, precision=lax.Precision.HIGHEST)
    expected = jnp.where(exists, expected, -jnp.inf)
    bad = jnp.isnan(expected).any(-1) | ~exists.any(-1)
    best = jnp.argmax(expected, axis=-1).astype(jnp.int32)
    return jnp.where(bad, -1, best)
