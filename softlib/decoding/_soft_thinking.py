"""Soft thinking: mixtures of tokens that are fed back instead of a drawn one."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Integer

from softlib import _checks as checks, logits as logits_
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype
from softlib._ids import labels_in_range
from softlib._sharding import in_auto_mode
from softlib.logits import Logits
from softlib.logits._sources import source_of, with_temperature
from softlib.softmax import (
    gumbel_softmax,
    log_softmax,
    min_p_logits,
    softmax,
    top_p_logits,
)
from softlib.typing import PerRow, Scalar


class ConceptTokens(NamedTuple):
    """Mixtures of a few tokens each, the heaviest first.

    Attributes:
        weights: Their weights, which sum to 1; 0 for all of a row in which no token is
            allowed.
        tokens: Their ids, int32; -1, with weight 0, where a row has fewer tokens.

    Derivatives: of the weights.
    Cost: 2 m numbers per row.

    Example:
        >>> logits = jnp.log(jnp.array([0.5, 0.125, 0.375]))
        >>> concept = softlib.decoding.concept_tokens(logits, top_k=3)
        >>> print(concept.tokens, concept.weights)
        [0 2 1] [0.5   0.375 0.125]
    """

    weights: Float[Array, "*batch m"]
    tokens: Int[Array, "*batch m"]


@array_arguments
def concept_tokens(
    logits: Logits,
    *,
    top_k: int = 30,
    temperature: PerRow | None = None,
    top_p: PerRow | None = None,
    min_p: PerRow | None = None,
    max_tokens: int | None = None,
) -> ConceptTokens:
    r"""The next-token distribution of each row, cut to a few tokens.

    Soft thinking feeds a model the mixture of its likeliest next tokens, as the
    weighted mean of their embeddings, instead of one of them. Of softmax of the logits
    divided by the temperature the `top_k` greatest probabilities are kept, then those
    before which less than `top_p` has gathered, then those of at least `min_p` times
    the greatest, then the `max_tokens` greatest; after each filter they are
    renormalised.

    Models mostly follow the heaviest token of such a mixture, the more so the more it
    weighs, which makes this nearly greedy decoding. `gumbel_concept_tokens` and
    `dirichlet_concept_tokens` draw other weights.

    Args:
        logits: Of the next token; an array, or a value such as `softlib.LinearLogits`.
        top_k: Static, at least 1; more than the number of classes keeps all.
        temperature: Positive; a number, or an array that is a scalar or one value per
            row. The logits must have none of their own. For the temperature 0 take
            `top_k=1`.
        top_p: As in `softlib.softmax.top_p_logits`; None keeps all.
        min_p: As in `softlib.softmax.min_p_logits`; None keeps all.
        max_tokens: Static, at least 1; None for `top_k`.

    Returns:
        `ConceptTokens` with `max_tokens` entries per row, in float32 (float64 for
        float64), of equal ones the lower id first. A logit of -inf is never kept. A row
        with a NaN or +inf among what is kept has weights NaN.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: A size or number is out of range, both the logits and the call have
            a temperature, or an option of the logits has no meaning here.

    Derivatives: of the weights, by the logits that are kept: forward and reverse mode,
        any order. None by the filters.
    Cost: `softlib.logits.top_k` and `gather`: the logits of a head are not formed.
    Source: "LLMs are Single-threaded Reasoners: Demystifying the Working Mechanism of
        Soft Thinking". Filters as in its public code.

    Example:
        >>> table = jnp.log(jnp.array([[0.5], [0.125], [0.375]]))
        >>> logits = softlib.LinearLogits(jnp.ones((1, 1)), table)
        >>> concept = softlib.decoding.concept_tokens(logits, top_k=2)
        >>> print(concept.tokens, (100 * concept.weights).round())
        [[0 2]] [[57. 43.]]
    """
    function = "concept_tokens"
    source = source_of(function, logits)
    if temperature is not None:
        source = with_temperature(source, temperature)
    checks.require_positive_integer(function, "top_k", top_k)
    count = min(top_k, source.own_classes)
    kept = _checked_count(function, max_tokens, count)
    best = logits_.top_k(lax.stop_gradient(source), k=count)
    # `top_k` has no derivative, `gather` has.
    z = logits_.gather(source, jnp.maximum(best.classes, 0))
    z = jnp.where(best.classes >= 0, z, -jnp.inf)
    for name, share, keep in (
        ("top_p", top_p, top_p_logits),
        ("min_p", min_p, min_p_logits),
    ):
        if share is not None:
            _check_share(function, name, share, source.batch_shape)
            z = keep(z, p=share)
    return _heaviest(z, best.classes, kept)


@array_arguments
def gumbel_concept_tokens(
    key: Array,
    weights: Float[Array, "*batch m"],
    tokens: Integer[Array, "*batch m"],
    *,
    temperature: PerRow = 0.5,
    hard: bool = False,
) -> ConceptTokens:
    r"""Mixtures of the same tokens with weights drawn by Gumbel-softmax.

    $$w = \operatorname{softmax}((\log p + g) / \tau), \qquad g_i \sim
        \operatorname{Gumbel}(0, 1)$$

    The heaviest token is an exact draw from $p$, whatever $\tau$: the model that
    follows it samples instead of decoding greedily. At $\tau \to 0$ the mixture is that
    token alone, at $\tau \to \infty$ all tokens weigh the same. The mean of $w$ is not
    $p$.

    Args:
        key: Of `jax.random`.
        weights: $p$, as of `concept_tokens`; at least 0, 0 is never drawn.
        tokens: Their ids.
        temperature: $\tau > 0$: a number, or an array that is a scalar or one value per
            row.
        hard: Static; whether the heaviest token gets weight 1, with the derivative of
            the soft weights (straight-through).

    Returns:
        `ConceptTokens` in the shape of `weights`, the heaviest first, float32 (float64
        for float64).

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit, or the temperature is out of range.

    Derivatives: with respect to `weights` and `temperature`, with the noise held fixed;
        forward and reverse mode, any order (with `hard` the first).
    Cost: noise in the shape of `weights`, and a sort of each row.
    Source: "LLMs are Single-threaded Reasoners: Demystifying the Working Mechanism of
        Soft Thinking".

    Example:
        >>> concept = jnp.array([0.5, 0.5, 0.0]), jnp.array([7, 3, 5])
        >>> draw = softlib.decoding.gumbel_concept_tokens
        >>> print(draw(jax.random.key(1), *concept, hard=True).weights)
        [1. 0. 0.]
    """
    function = "gumbel_concept_tokens"
    log_p = _checked_log_weights(function, weights, tokens)
    with checks.under_name(function, "gumbel_softmax"):
        drawn = gumbel_softmax(key, log_p, temperature=temperature, hard=hard)
    drawn, places = lax.top_k(drawn, drawn.shape[-1])
    ids = jnp.where(log_p == -jnp.inf, -1, tokens)
    return ConceptTokens(drawn, jnp.take_along_axis(ids, places, -1).astype(jnp.int32))


@array_arguments
def dirichlet_concept_tokens(
    key: Array,
    weights: Float[Array, "*batch m"],
    tokens: Integer[Array, "*batch m"],
    *,
    concentration: Scalar = 1.0,
    max_tokens: int | None = None,
) -> ConceptTokens:
    r"""Mixtures of the same tokens with weights drawn from a Dirichlet distribution.

    $$w \sim \operatorname{Dirichlet}(\alpha p), \qquad \mathbb{E} w = p, \qquad
        \operatorname{Var} w_i = \frac{p_i (1 - p_i)}{\alpha + 1}$$

    At $\alpha \to \infty$ the weights stay as they are, at $\alpha \to 0$ the mixture
    is one token, drawn from $p$.

    Args:
        key: Of `jax.random`.
        weights: $p$, as of `concept_tokens`; at least 0, and 0 stays 0. Any sum: they
            are normalised.
        tokens: Their ids.
        concentration: $\alpha > 0$, a number or a scalar array.
        max_tokens: Static; the number of tokens that are kept, those of the greatest
            drawn weights, renormalised. None keeps all.

    Returns:
        `ConceptTokens` with `max_tokens` entries per row, the heaviest first, float32
        (float64 for float64).

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit, or a number is out of range.

    Derivatives: of first order, with respect to `weights` and `concentration`, by those
        of the draws of a gamma distribution.
    Cost: draws of a gamma distribution in the shape of `weights`, in logarithms, so
        that a small concentration does not underflow; a sort of each row.
    Source: "LLMs are Single-threaded Reasoners: Demystifying the Working Mechanism of
        Soft Thinking". Its code leaves out weights of at most 1e-7.

    Example:
        >>> concept = jnp.array([0.5, 0.5, 0.0]), jnp.array([7, 3, 5])
        >>> draw = softlib.decoding.dirichlet_concept_tokens
        >>> drawn = draw(jax.random.key(0), *concept, concentration=1e6)
        >>> print(drawn.weights.round(2), drawn.tokens[2])
        [0.5 0.5 0. ] -1
    """
    function = "dirichlet_concept_tokens"
    log_p = log_softmax(_checked_log_weights(function, weights, tokens))
    checks.require_positive_scalars(function, concentration=concentration)
    kept = _checked_count(function, max_tokens, weights.shape[-1])
    counts = log_p != -jnp.inf
    alpha = jnp.asarray(concentration, log_p.dtype)
    # A gamma distribution of shape 0 has no draws.
    shape = jnp.where(counts, alpha * jnp.exp(jnp.where(counts, log_p, 0)), 1)
    drawn = jax.random.loggamma(key, shape, dtype=log_p.dtype)
    return _heaviest(jnp.where(counts, drawn, -jnp.inf), tokens, kept)


@array_arguments
def concept_embedding(
    weights: Float[Array, "*batch m"],
    tokens: Integer[Array, "*batch m"],
    embedding: Float[Array, "V H"],
) -> Float[Array, "*batch H"]:
    r"""Weighted mean of the embeddings of a few tokens, the next input of the model.

    $$c = \sum_k w_k E_{i_k}$$

    Args:
        weights: $w$, as of `concept_tokens`.
        tokens: $i$; one outside $[0, V)$, as -1, counts as nothing if its weight is 0,
            and makes the row NaN otherwise.
        embedding: $E$, one row per token.

    Returns:
        One embedding per row in the dtype of `embedding`, summed in float32 at least.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together.

    Derivatives: forward and reverse mode, any order, with respect to `weights` and
        `embedding`.
    Cost: the m gathered rows of each mixture and m H multiplications: no product with
        the whole table.
    Source: "LLMs are Single-threaded Reasoners: Demystifying the Working Mechanism of
        Soft Thinking".

    Example:
        >>> weights, tokens = jnp.array([0.75, 0.25]), jnp.array([2, 0])
        >>> table = jnp.array([[4.0, 0.0], [9.0, 9.0], [0.0, 4.0]])
        >>> print(softlib.decoding.concept_embedding(weights, tokens, table))
        [1. 3.]
    """
    function = "concept_embedding"
    _check_weights(function, weights, tokens)
    checks.require_floating(function, embedding=embedding)
    if embedding.ndim != 2:
        raise ValueError(
            f"{function}: `embedding` must have two axes (V, H), got shape "
            f"{embedding.shape}."
        )
    dtype, batch = accumulator_dtype(weights, embedding), weights.ndim - 1

    def mean(weights: Array, tokens: Array, embedding: Array) -> Array:
        ids = labels_in_range(tokens, embedding.shape[0])
        rows = embedding.at[jnp.maximum(ids, 0)].get(mode="fill").astype(dtype)
        bad = (ids < 0) & (weights != 0)
        found = jnp.einsum(
            "...m,...mh->...h",
            jnp.where(bad, jnp.nan, weights.astype(dtype)),
            jnp.where((ids >= 0)[..., None], rows, 0),
            precision=lax.Precision.HIGHEST,
        )
        return found.astype(embedding.dtype)

    rows = lambda spec: PartitionSpec(*spec[:batch], None)
    return in_auto_mode(mean, rows, weights, tokens, embedding)


class ColdStop(NamedTuple):
    """Whether a model has been certain for long enough to stop thinking.

    Attributes:
        count: Number of steps in a row with a low entropy, up to the stop.
        stopped: Whether there were enough, now or before.

    Derivatives: none.
    Cost: two numbers per sequence.

    Example:
        >>> state = softlib.decoding.ColdStop(jnp.zeros(2, int), jnp.zeros(2, bool))
        >>> print(state.stopped)
        [False False]
    """

    count: Int[Array, "*batch"]
    stopped: Bool[Array, "*batch"]


@array_arguments
def cold_stop(
    entropy: Float[Array, "*batch"],
    count: Integer[Array, "*batch"],
    stopped: Bool[Array, "*batch"],
    *,
    threshold: Scalar,
    length: int,
) -> ColdStop:
    """Counts steps of low entropy, and stops after enough of them in a row.

    A model that is fed mixtures drifts from what it was trained on. Once it has been
    certain of its next token for `length` steps, its thinking is ended by the token
    for that. A step of another entropy begins the count again.

    Args:
        entropy: Of the next-token distribution before filters, one number per sequence,
            in nats, as of `softlib.logits.entropy`; or in any unit that the threshold
            has, as entropy divided by the logarithm of V.
        count: As returned for the step before; 0 in the beginning.
        stopped: As returned for the step before; False in the beginning.
        threshold: Entropies below it are low; at least 0.
        length: Static number of steps in a row, at least 1.

    Returns:
        `ColdStop`. A sequence that has stopped stays as it is.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes differ, or a number is out of range.

    Derivatives: none.
    Cost: a few numbers per sequence.
    Source: "LLMs are Single-threaded Reasoners: Demystifying the Working Mechanism of
        Soft Thinking".

    Example:
        >>> state = softlib.decoding.ColdStop(jnp.array([1, 1]), jnp.zeros(2, bool))
        >>> update = softlib.decoding.cold_stop
        >>> entropy = jnp.array([0.0, 0.5])
        >>> print(update(entropy, *state, threshold=0.01, length=2).stopped)
        [ True False]
    """
    function = "cold_stop"
    checks.require_floating(function, entropy=entropy)
    checks.require_integer(function, count=count)
    checks.require_boolean(function, stopped=stopped)
    shape, why = entropy.shape, "one per sequence"
    checks.require_shape(function, "count", count, shape, why)
    checks.require_shape(function, "stopped", stopped, shape, why)
    checks.require_scalar(function, "threshold", threshold, 0, math.inf)
    checks.require_positive_integer(function, "length", length)
    low = entropy < jnp.asarray(threshold, entropy.dtype)
    counted = jnp.where(low, count + 1, 0)
    count = jnp.where(stopped, count, counted)
    return ColdStop(count.astype(jnp.int32), stopped | (count >= length))


def _heaviest(z: Array, tokens: Array, kept: int) -> ConceptTokens:
    """Softmax of the `kept` greatest scores, with their tokens."""
    z, places = lax.top_k(z, kept)
    ids = jnp.take_along_axis(tokens, places, -1)
    return ConceptTokens(
        softmax(z), jnp.where(z == -jnp.inf, -1, ids).astype(jnp.int32)
    )


def _checked_log_weights(function: str, weights: Array, tokens: Array) -> Array:
    """Logarithms of weights, -inf for 0 without a derivative, NaN for a negative."""
    _check_weights(function, weights, tokens)
    weights = weights.astype(accumulator_dtype(weights))
    none = (weights == 0) | (tokens < 0)
    return jnp.where(none, -jnp.inf, jnp.log(jnp.where(none, 1, weights)))


def _check_weights(function: str, weights: Array, tokens: Array) -> None:
    checks.require_floating(function, weights=weights)
    checks.require_integer(function, tokens=tokens)
    checks.require_rank(function, "weights", weights, 1, "(..., m)")
    checks.require_shape(function, "tokens", tokens, weights.shape, "one per weight")


def _checked_count(function: str, max_tokens: int | None, most: int) -> int:
    if max_tokens is None:
        return most
    checks.require_positive_integer(function, "max_tokens", max_tokens)
    return min(max_tokens, most)


def _check_share(
    function: str, name: str, value: PerRow, batch: tuple[int, ...]
) -> None:
    if isinstance(value, int | float):
        checks.require_scalar(function, name, value, 0, 1)
        return
    value = jnp.asarray(value)
    checks.require_floating(function, **{name: value})
    why = "a scalar, or one per row"
    checks.require_shape_in(function, name, value, ((), batch), why)
