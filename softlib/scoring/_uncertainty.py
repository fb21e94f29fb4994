"""Uncertainty of generated text: of one sequence, of samples, of their meanings."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._compiled_once import compiled_once
from softlib._dtypes import accumulator_dtype
from softlib._masked_mean import masked_mean
from softlib.logits import Logits, entropy, token_surprisals
from softlib.softmax import log_softmax, softmax
from softlib.typing import Scalar

NORMALIZE = ("sum", "mean")


@array_arguments
def sequence_nll(
    logits: Logits,
    labels: Integer[Array, "*batch T"],
    *,
    normalize: str = "sum",
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""Negative log-likelihood of each sequence, in nats.

    $$\mathrm{NLL}(y) = -\sum_t \log p(y_t)$$

    It is `-softlib.logits.sequence_log_probs`, accurate for tokens that are almost
    certain too, whose losses a float32 logsumexp rounds to 0: hundreds of them add up.
    With "mean" it is the logarithm of the perplexity.

    Args:
        logits: An array of logits, or a value such as `softlib.LinearLogits`; one row
            per token, before any temperature, top-k or top-p.
        labels: Class ids in $[0, V)$, the tokens that the rows predict.
        normalize: Static: "sum", or "mean" over the tokens that count.
        where: True for the tokens that count: the answer, its end-of-text token
            included, and not what follows it. Broadcasts to `labels`. Other tokens may
            hold anything.

    Returns:
        One number per sequence, float32 (float64 if an argument is float64); 0 for one
        without tokens. NaN with a label outside $[0, V)$, +inf with an impossible one;
        such a sequence has no gradient.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together, there is no axis of tokens, or
            `normalize` is neither of its two values.
        NotImplementedError: No implementation that was named can run.

    Derivatives: as `softlib.logits.token_surprisals`.
    Cost: as `softlib.logits.token_surprisals`; for a linear head no array of tokens x
        classes.
    Source: "Rethinking Uncertainty Estimation in Natural Language Generation", whose
        score is the least of it over all sequences; see `greedy_nll`.

    Example:
        >>> logits = softlib.LinearLogits(jnp.zeros((1, 3, 4)), jnp.ones((8, 4)))
        >>> labels = jnp.array([[1, 2, 3]])
        >>> print(softlib.scoring.sequence_nll(logits, labels).round(2))
        [6.24]
    """
    function = "sequence_nll"
    checks.require_one_of(function, "normalize", normalize, NORMALIZE)
    with checks.under_name(function, "token_surprisals"):
        each = token_surprisals(logits, labels, where=where)
    return over_tokens(function, each, normalize, where)


@array_arguments
def greedy_nll(
    logits: Logits,
    *,
    normalize: str = "sum",
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""Negative log-likelihood of the greedy continuation (G-NLL), in nats.

    $$-\sum_t \max_v \log p(v \mid y_{<t}), \qquad y_t = \arg\max_v p(v \mid y_{<t})$$

    It is a score of a model's uncertainty about its answer that needs one decoded
    sequence instead of many samples. The proper score is the least NLL of all
    sequences. Greedy decoding bounds it from above; other sequences, as of a beam
    search, may come closer: score them by `sequence_nll`.

    Args:
        logits: An array of logits, or a value such as `softlib.LinearLogits`; one row
            per token of the greedy continuation, before any temperature, top-k or
            top-p.
        normalize: Static: "sum", which is the score of the paper, or "mean" over the
            tokens that count.
        where: True for the tokens that count, the end-of-text token included, and not
            what follows it; broadcasts to the batch shape. Others may hold anything.

    Returns:
        One number per sequence, at least 0, float32 (float64 if an argument is
        float64); 0 for one without tokens.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together, there is no axis of tokens, or
            `normalize` is neither of its two values.
        NotImplementedError: No implementation that was named can run.

    Derivatives: as `softlib.logits.token_surprisals`, for constant tokens: probability
        less one at the first of the likeliest classes.
    Cost: as `softlib.logits.token_surprisals` without labels, two streams of a head.
    Source: "Rethinking Uncertainty Estimation in Natural Language Generation".

    Example:
        >>> logits = jnp.log(jnp.array([[[0.5, 0.25, 0.25], [0.25, 0.75, 0.0]]]))
        >>> nll = softlib.scoring.greedy_nll(logits)
        >>> print(jnp.exp(-nll).round(4))  # 0.5 * 0.75
        [0.375]
    """
    function = "greedy_nll"
    checks.require_one_of(function, "normalize", normalize, NORMALIZE)
    with checks.under_name(function, "token_surprisals"):
        each = token_surprisals(logits, where=where)
    return over_tokens(function, each, normalize, where)


@array_arguments
def sequence_entropy(
    logits: Logits,
    *,
    normalize: str = "sum",
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""Sum of the entropies of the next-token distributions of a sequence, in nats.

    $$\sum_t H(p(\cdot \mid y_{<t}))$$

    Its mean over sequences that the model samples is the entropy of the model's
    distribution over sequences, as is that of their NLL (`predictive_entropy`), but
    with less variance: each token's part is an expectation instead of a sample.

    Args:
        logits: An array of logits, or a value such as `softlib.LinearLogits`; one row
            per token.
        normalize: Static: "sum", or "mean" over the tokens that count.
        where: True for the tokens that count; broadcasts to the batch shape. Others may
            hold anything.

    Returns:
        One number per sequence, float32 (float64 if an argument is float64); 0 for one
        without tokens.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together, there is no axis of tokens, a gradient
            filter is set, or `normalize` is neither of its two values.
        NotImplementedError: No implementation that was named can run.

    Derivatives: as `softlib.logits.entropy`.
    Cost: as `softlib.logits.entropy`.
    Source: the chain rule of entropy.

    Example:
        >>> logits = softlib.LinearLogits(jnp.zeros((1, 3, 4)), jnp.ones((8, 4)))
        >>> print(softlib.scoring.sequence_entropy(logits, normalize="mean").round(4))
        [2.0794]
    """
    function = "sequence_entropy"
    checks.require_one_of(function, "normalize", normalize, NORMALIZE)
    with checks.under_name(function, "entropy"):
        each = entropy(logits, where=where)
    return over_tokens(function, each, normalize, where)


@array_arguments
def predictive_entropy(
    sequence_nll: Float[Array, "*batch S"],
    *,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""Entropy of a model's answers, estimated from sampled ones, in nats.

    $$-\frac{1}{S} \sum_s \log p(y_s)$$

    Args:
        sequence_nll: Of each sample, from `sequence_nll`; with its `normalize="mean"`
            the result is the length-normalised form.
        where: True for the samples that count; broadcasts to `sequence_nll`.

    Returns:
        The mean over samples, float32 (float64 for float64); 0 without samples.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: There is no axis of samples, or `where` does not broadcast.

    Derivatives: any order.
    Cost: one pass.
    Source: a baseline of "Rethinking Uncertainty Estimation in Natural Language
        Generation".

    Example:
        >>> print(softlib.scoring.predictive_entropy(jnp.array([[2.0, 4.0]])))
        [3.]
    """
    function = "predictive_entropy"
    where = _samples(function, sequence_nll, where)
    return masked_mean(sequence_nll, where, axis=-1)


@array_arguments(as_given=("groups",))
def semantic_entropy(
    sequence_nll: Float[Array, "*batch S"],
    groups: Integer[Array, "*batch S"],
    *,
    weights: str = "probability",
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    r"""Entropy over groups of samples that mean the same, in nats.

    $$-\sum_c P_c \log P_c, \qquad P_c = \sum_{s \in c} w_s$$

    Two answers that say the same in other words are one outcome: a model that is sure
    of a fact and not of its wording has a small semantic entropy.

    Args:
        sequence_nll: Of each sample, from `sequence_nll`; +inf is legal. Only
            differences matter.
        groups: Ids of the groups, any integers: equal ones mean the same. Those of
            `similar_groups`, or `identical_groups` for answers that must match.
        weights: Static: "probability" weighs a sample by $e^{-\mathrm{NLL}}$ (then let
            `where` keep one of several samples with equal tokens), "count" weighs all
            alike, in proportion to how often the model gave the answer.
        where: True for the samples that count; broadcasts to `sequence_nll`.

    Returns:
        At least 0 and at most the logarithm of the number of groups, float32 (float64
        for float64); 0 without samples, and if none is possible.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together, or `weights` is neither of its values.

    Derivatives: any order, with respect to `sequence_nll`.
    Cost: $O(S^2)$ per batch entry.
    Source: a baseline of "Rethinking Uncertainty Estimation in Natural Language
        Generation". Probabilities are normalised over the samples.

    Example:
        >>> nll, groups = jnp.array([[1.0, 1.0, 1.0, 1.0]]), jnp.array([[0, 0, 2, 2]])
        >>> print(softlib.scoring.semantic_entropy(nll, groups).round(4))
        [0.6931]
    """
    function = "semantic_entropy"
    checks.require_one_of(function, "weights", weights, ("probability", "count"))
    where = _samples(function, sequence_nll, where)
    groups = jnp.asarray(groups)
    checks.require_integer(function, groups=groups)
    shape = sequence_nll.shape
    checks.require_shape(function, "groups", groups, shape, "one per sample")
    nll = sequence_nll.astype(accumulator_dtype(sequence_nll))
    scores = 0 - jnp.where(where, nll, 0)
    if weights == "count":
        scores = jnp.zeros_like(scores)
    share = softmax(scores, where=where)
    log_share = log_softmax(scores, where=where)
    possible = share > 0
    same = (groups[..., :, None] == groups[..., None, :]) & possible[..., None, :]
    # The row of a sample that is impossible may be empty.
    inside = jnp.where(same, log_share[..., None, :], -jnp.inf)
    inside = jnp.where(possible[..., None], inside, 0)
    of_group = jax.nn.logsumexp(inside, axis=-1)
    terms = jnp.where(possible, share * jnp.minimum(of_group, 0), 0)
    return 0 - terms.sum(-1)


@array_arguments
def similar_groups(
    similarity: Float[Array, "S S"],
    *,
    threshold: Scalar,
    where: Bool[Array, " S"] | None = None,
) -> Int[Array, " S"]:
    """Groups of samples that resemble the first sample of their group.

    In their order, a sample joins the first group whose first sample it resembles, or
    begins a group of its own.

    Args:
        similarity: Of each pair of samples, such as the cosine of sentence embeddings,
            or the smaller probability of entailment of both directions. Row i is read
            for sample i.
        threshold: The least similarity of two samples that mean the same; a number or a
            scalar array.
        where: True for the samples that exist; others are groups of their own.

    Returns:
        int32 ids in [0, S): the index of the group's first sample.

    Raises:
        TypeError: `similarity` is not floating, or `where` is not boolean.
        ValueError: `similarity` is not square, or shapes do not fit together.

    Derivatives: none, the ids are integers.
    Cost: S steps of O(S).
    Source: the clusters of semantic entropy, a baseline of "Rethinking Uncertainty
        Estimation in Natural Language Generation".

    Example:
        >>> similarity = jnp.array([[1.0, 0.2, 0.9], [0.2, 1.0, 0.8], [0.9, 0.8, 1.0]])
        >>> print(softlib.scoring.similar_groups(similarity, threshold=0.7))
        [0 1 0]
    """
    function = "similar_groups"
    checks.require_floating(function, similarity=similarity)
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1]:
        raise ValueError(
            f"{function}: `similarity` must have shape (S, S), got {similarity.shape}."
        )
    checks.require_scalar(function, "threshold", threshold, -jnp.inf, jnp.inf)
    shape, why = similarity.shape[:1], "one per sample"
    exists = checks.checked_where(function, where, shape, why)
    return _joined(similarity >= jnp.asarray(threshold, similarity.dtype), exists)


@compiled_once()
def _joined(alike: Bool[Array, "S S"], exists: Bool[Array, " S"]) -> Int[Array, " S"]:
    samples = jnp.arange(exists.shape[0], dtype=jnp.int32)

    def joined(groups: Array, sample: Array) -> tuple[Array, None]:
        first = (groups == samples) & (samples < sample) & exists
        found = first & alike[sample] & exists[sample]
        own = jnp.where(found.any(), jnp.argmax(found).astype(jnp.int32), sample)
        return groups.at[sample].set(own), None

    return lax.scan(joined, samples, samples)[0]


def over_tokens(
    function: str, each: Array, normalize: str, where: Array | None
) -> Float[Array, "*batch"]:
    """Sum or mean over the last axis of numbers per token, 0 where `where` is False.

    One token that is not finite removes the gradient of the whole sequence, so that no
    NaN of it reaches a weight.
    """
    if not each.ndim:
        raise ValueError(
            f"{function}: `logits` must have at least 2 axes, the tokens of a sequence "
            "before the classes, got 1."
        )
    total = lax.stop_gradient(each.sum(-1))
    finite = jnp.isfinite(total)
    summed = jnp.where(finite[..., None], each, 0).sum(-1)
    summed = jnp.where(finite, summed, total)
    return summed if normalize == "sum" else summed / at_least_one(each, where)


def at_least_one(each: Array, where: Array | None) -> Float[Array, "*batch"]:
    """The number of tokens that count, 1 if none does."""
    there = jnp.broadcast_to(jnp.asarray(True if where is None else where), each.shape)
    return jnp.maximum(there.sum(-1), 1).astype(each.dtype)


def _samples(function: str, nll: Array, where: Array | None) -> Bool[Array, "..."]:
    checks.require_floating(function, sequence_nll=nll)
    checks.require_rank(function, "sequence_nll", nll, 1, "(..., S)")
    why = "the shape of `sequence_nll`"
    return checks.checked_where(function, where, nll.shape, why)
