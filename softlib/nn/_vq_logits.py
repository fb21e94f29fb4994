"""A codebook head at decoding time: logits and draws over V tokens from K codes."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Integer, PRNGKeyArray

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._codes import (
    log_weights_of,
    require_mapping,
    require_token_bias,
    token_counts,
)
from softlib._compiled_once import compiled_once
from softlib._ids import signed
from softlib.logits import LinearLogits
from softlib.typing import PerRow, Precision


class TokenClusters(NamedTuple):
    """The tokens of a mapping, sorted by their code.

    Attributes:
        tokens: Tokens in the order of their codes, lower tokens first within one.
        starts: Where in `tokens` each code begins.
        counts: How many tokens each code has.

    Derivatives: none, integers.
    Cost: V + 2 K integers.

    Example:
        >>> clusters = softlib.nn.vq_clusters(jnp.array([1, 0, 1]), 3)
        >>> print(clusters.tokens, clusters.starts, clusters.counts)
        [1 0 2] [0 1 3] [1 2 0]
    """

    tokens: Integer[Array, " V"]
    starts: Integer[Array, " K"]
    counts: Integer[Array, " K"]


@array_arguments
def vq_clusters(mapping: Integer[Array, " V"], num_codes: int) -> TokenClusters:
    """Sorts the tokens by their code, once for many calls of `vq_sample`.

    Args:
        mapping: Code of each token; an entry outside [0, num_codes) raises where its
            value is known, and belongs to no code in a traced array.
        num_codes: Static size of the codebook.

    Returns:
        The sorted tokens, and where each code begins and how many it has, int32.

    Raises:
        TypeError: `mapping` does not hold integers.
        ValueError: `mapping` is not one number per token, or leaves its range.

    Derivatives: none, integers.
    Cost: a sort of V integers.

    Example:
        >>> clusters = softlib.nn.vq_clusters(jnp.array([1, 0, 1]), 2)
        >>> print(clusters.tokens[clusters.starts[1] :])
        [0 2]
    """
    counts = token_counts("vq_clusters", mapping, num_codes)
    # Tokens without a code come first or last; the starts leave the first ones out.
    tokens = jnp.argsort(mapping, stable=True).astype(jnp.int32)
    before = (mapping < 0).sum(dtype=jnp.int32)
    return TokenClusters(tokens, before + jnp.cumsum(counts) - counts, counts)


@array_arguments
def vq_sample(
    key: PRNGKeyArray,
    hidden: Float[Array, "*batch D"],
    codebook: Float[Array, "K D"],
    mapping: Integer[Array, " V"] | TokenClusters,
    *,
    token_bias: Float[Array, " V"] | None = None,
    scale: PerRow | None = None,
    softcap: float | None = None,
    temperature: PerRow | None = None,
    precision: Precision = None,
) -> Int[Array, "*batch"]:
    r"""Draws a token per row without an array of rows x vocabulary.

    First a code from the probabilities of codes, which count their tokens, then one of
    its tokens: uniformly, or by $e^{b_i}$. The distribution is that of
    `softlib.logits.VQLogits`.

    Args:
        key: A key of `jax.random`.
        hidden: Inputs of the head.
        codebook: One row per code.
        mapping: Code of each token, in $[0, K)$, or `vq_clusters` of it, which saves a
            sort per call.
        token_bias: One number per token; -inf is never drawn.
        scale: Multiplies the products: a number, a scalar, or one value per row.
        softcap: Static positive number $c$: $l$ becomes $c\tanh(l / c)$.
        temperature: Divides the logits of codes: a number, a scalar, or one value per
            row. It does not divide `token_bias`: for draws from the tempered softmax
            divide that too.
        precision: Static precision of the product, as in `jax.lax.dot_general`.

    Returns:
        Tokens, int32. Without a token that may be drawn, or with NaN, the result is
        some token.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together, or `mapping` is known to leave $[0, K)$.

    Derivatives: none, a draw.
    Cost: rows x K numbers. With `token_bias` also sums of V numbers, and a search of
        $\log_2 V$ steps per row.
    Source: "VQ-Logits: Compressing the Output Bottleneck of Large Language Models via
        Vector Quantized Logits" does not sample; the two steps are softlib's.

    Example:
        >>> mapping = jnp.array([0, 1, 1, 1])
        >>> hidden, codebook = jnp.zeros((3, 2)), jnp.zeros((2, 2))
        >>> softlib.nn.vq_sample(jax.random.key(0), hidden, codebook, mapping).shape
        (3,)
    """
    function = "vq_sample"
    logits = LinearLogits.of(
        function,
        hidden,
        codebook,
        weight_name="codebook",
        scale=scale,
        softcap=softcap,
        temperature=temperature,
        precision=precision,
    ).materialize()
    num_codes = logits.shape[-1]
    if isinstance(mapping, TokenClusters):
        clusters = mapping
        checks.require_integer(function, **clusters._asdict())
        clusters = TokenClusters(*map(signed, clusters))
        shape, why = (num_codes,), "one per code"
        checks.require_shape(function, "mapping.counts", clusters.counts, shape, why)
        of_tokens = jnp.zeros(clusters.tokens.shape, jnp.int32)
        places = clusters.starts, jnp.arange(num_codes, dtype=jnp.int32)
        sorted_codes = of_tokens.at[places[0]].max(places[1], mode="drop")
        sorted_codes = lax.cummax(sorted_codes)
    else:
        mapping = jnp.asarray(mapping)
        require_mapping(function, mapping, num_codes)
        clusters = vq_clusters(mapping, num_codes)
        sorted_codes = mapping[clusters.tokens]
    token_bias = None if token_bias is None else jnp.asarray(token_bias)
    require_token_bias(function, token_bias, clusters.tokens)

    of_code, of_token = jax.random.split(key)
    sorted_bias = None if token_bias is None else token_bias[clusters.tokens]
    log_weights = log_weights_of(
        sorted_codes, num_codes, clusters.counts, sorted_bias, logits.dtype
    )
    code = jax.random.categorical(of_code, logits + _row(log_weights, logits))
    first, count = clusters.starts[code], clusters.counts[code]
    if sorted_bias is None:
        place = jax.random.randint(of_token, code.shape, 0, jnp.maximum(count, 1))
        return clusters.tokens[first + place]
    weights = jnp.exp(sorted_bias.astype(log_weights.dtype) - log_weights[sorted_codes])
    weights = jnp.where(sorted_bias == -jnp.inf, 0, weights)
    summed = _scan_within(jnp.add, weights, sorted_codes)
    # What has no weight repeats the sum before it, which rounding must not lift: the
    # first place above a number is then never one of these.
    summed = _scan_within(jnp.maximum, jnp.where(weights > 0, summed, 0), sorted_codes)
    share = jax.random.uniform(of_token, code.shape, summed.dtype)
    place = _first_above(summed, share, first, count)
    return clusters.tokens[place]


def _scan_within(
    combine: Callable[[Array, Array], Array],
    values: Float[Array, " V"],
    sorted_codes: Integer[Array, " V"],
) -> Float[Array, " V"]:
    """Cumulative sums or maxima that start anew with every code.

    One sum over all codes would lose, in a late one, the digits of its tokens.
    """

    def join(left, right):
        (a, code_a), (b, code_b) = left, right
        return jnp.where(code_a == code_b, combine(a, b), b), code_b

    return lax.associative_scan(join, (values, sorted_codes))[0]


@compiled_once()
def _first_above(
    summed: Float[Array, " V"],
    share: Float[Array, "*batch"],
    first: Int[Array, "*batch"],
    count: Int[Array, "*batch"],
) -> Int[Array, "*batch"]:
    """The first place of a code whose sum exceeds a share of the code's total."""
    last = first + jnp.maximum(count, 1) - 1
    total = summed[last]
    # By rounding a share below 1 can reach the total, which no sum exceeds.
    wanted = jnp.minimum(share * total, jnp.nextafter(total, jnp.zeros_like(total)))

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) // 2
        above = summed[middle] > wanted
        return jnp.where(above, low, middle + 1), jnp.where(above, middle, high)

    # The last place is always above, so `low` never passes `high`.
    steps = len(summed).bit_length()
    return lax.fori_loop(0, steps, halve, (first, last))[1]


def _row(values: Array, like: Array) -> Array:
    """Numbers along the last axis, with as many axes as `like`."""
    return values.reshape((1,) * (like.ndim - 1) + values.shape)
