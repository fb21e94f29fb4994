r"""Codebooks, which let tokens share a code: by frequency, by a table.

To the loss a codebook is data: `mapping` has no gradient. A table of embeddings that is
learned beside a codebook gets its gradient by the straight-through rule.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Integer

from softlib import _checks as checks, _codes
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype
from softlib._ids import labels_in_range
from softlib.typing import Scalar


class CodebookState(NamedTuple):
    """A codebook as moving averages of the embeddings of its tokens.

    Attributes:
        codebook: The codes, `sums / counts` where a code has ever had a token.
        counts: Moving average of the number (or weight) of tokens per code.
        sums: Moving average of the sum of their embeddings.

    Derivatives: see `codebook_ema_update`.
    Cost: two tables of the codebook's size.

    Example:
        >>> softlib.nn.codebook_state(jnp.eye(2)).counts.tolist()
        [1.0, 1.0]
    """

    codebook: Float[Array, "K D"]
    counts: Float[Array, " K"]
    sums: Float[Array, "K D"]


@array_arguments
def codebook_state(
    codebook: Float[Array, "K D"], counts: Float[Array, " K"] | None = None
) -> CodebookState:
    """Moving averages to begin with, for a codebook that exists.

    Args:
        codebook: One row per code.
        counts: How much the given code weighs against what comes, in tokens; None is 1
            for each code.

    Returns:
        The state, float32 (float64 if an argument is float64).

    Raises:
        TypeError: An argument does not hold floating numbers.
        ValueError: Shapes do not fit together.

    Derivatives: linear in `codebook`.
    Cost: one table of the codebook's size.

    Example:
        >>> print(softlib.nn.codebook_state(jnp.ones((2, 1))).sums)
        [[1.]
         [1.]]
    """
    function = "codebook_state"
    codebook = jnp.asarray(codebook)
    checks.require_floating(function, codebook=codebook)
    if codebook.ndim != 2:
        raise ValueError(
            f"{function}: `codebook` must have shape (K, D), got {codebook.shape}."
        )
    counts = jnp.ones(len(codebook)) if counts is None else jnp.asarray(counts)
    checks.require_floating(function, counts=counts)
    shape = (len(codebook),)
    checks.require_shape(function, "counts", counts, shape, "one per code")
    dtype = accumulator_dtype(codebook)
    codebook, counts = codebook.astype(dtype), counts.astype(dtype)
    return CodebookState(codebook, counts, codebook * counts[:, None])


@array_arguments(as_given=("weights",))
def codebook_ema_update(
    state: CodebookState,
    embeddings: Float[Array, "V D"],
    mapping: Integer[Array, " V"],
    *,
    decay: Scalar,
    weights: Float[Array, " V"] | Integer[Array, " V"] | None = None,
) -> CodebookState:
    r"""Moves each code towards the mean of its tokens' embeddings.

    $N_j \leftarrow \gamma N_j + (1 - \gamma) n_j$ and
    $S_j \leftarrow \gamma S_j + (1 - \gamma) \sum_{M(i) = j} e_i$, then
    $c_j = S_j / N_j$. With $\gamma = 0$ it is one step of k-means. A code whose tokens
    have left keeps its place.

    Args:
        state: Of the last update, or `codebook_state`.
        embeddings: One row per token.
        mapping: Code of each token; outside $[0, K)$ it raises where its value is
            known, and the token is left out in a traced array.
        decay: $\gamma$ in $[0, 1]$, static or traced.
        weights: How much each token counts, at least 0; None counts all alike.

    Returns:
        The new state.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together, or a value is out of range.

    Derivatives: gradients are stopped: the codebook follows the embeddings by this
        rule, not by descent.
    Cost: one pass over the embeddings.
    Source: "Neural Discrete Representation Learning", appendix on moving averages.

    Example:
        >>> state = softlib.nn.codebook_state(jnp.array([[0.0], [1.0]]))
        >>> rows, mapping = jnp.array([[2.0], [4.0]]), jnp.array([1, 1])
        >>> new = softlib.nn.codebook_ema_update(state, rows, mapping, decay=0.5)
        >>> print(new.codebook[:, 0].round(2), new.counts)
        [0.   2.33] [0.5 1.5]
    """
    function = "codebook_ema_update"
    embeddings, _ = _codes.tables(function, embeddings, state.codebook)
    mapping = jnp.asarray(mapping)
    _codes.require_mapping(function, mapping, len(state.codebook))
    shape = embeddings.shape[:1]
    checks.require_shape(function, "mapping", mapping, shape, "one per embedding")
    checks.require_scalar(function, "decay", decay, 0, 1)
    x = lax.stop_gradient(embeddings.astype(state.sums.dtype))
    weights = _codes.row_weights(function, weights, x)
    new = _codes.totals(x, mapping, weights, len(state.codebook))
    old = lax.stop_gradient((state.counts, state.sums))
    decay = jnp.asarray(decay, x.dtype)
    counts, sums = (decay * a + (1 - decay) * b for a, b in zip(old, new, strict=True))
    return CodebookState(_codes.centroids(state.codebook, counts, sums), counts, sums)


@array_arguments
def straight_through_codes(
    embeddings: Float[Array, "V D"],
    codebook: Float[Array, "K D"],
    mapping: Integer[Array, " V"],
) -> Float[Array, "V D"]:
    r"""The code of each token, with a gradient that goes to its embedding.

    The value is $c_{M(i)}$; the derivative is that of $e_i$, as if the quantization
    were not there. As the weight of `softlib.losses.linear_softmax_cross_entropy` it
    trains the embeddings from which `softlib.quantize.assign_codes` takes the next
    mapping, at the cost of a head with V classes: what the codebook saves, it saves
    afterwards.

    Args:
        embeddings: One row per token.
        codebook: One row per code.
        mapping: Code of each token, in $[0, K)$.

    Returns:
        A table in the dtype of `embeddings`. In a traced `mapping` an entry out of
        range makes its row NaN.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together, or `mapping` is known to leave $[0, K)$.

    Derivatives: of `embeddings` the identity, of `codebook` and `mapping` 0.
    Cost: one table of V x D.
    Source: "Neural Discrete Representation Learning".

    Example:
        >>> rows, codebook = jnp.array([[0.3], [0.9]]), jnp.array([[0.0], [1.0]])
        >>> table = softlib.nn.straight_through_codes(rows, codebook, jnp.array([0, 1]))
        >>> print(table[:, 0])
        [0. 1.]
    """
    function = "straight_through_codes"
    embeddings, codebook = _codes.tables(function, embeddings, codebook)
    mapping = jnp.asarray(mapping)
    _codes.require_mapping(function, mapping, len(codebook))
    shape = embeddings.shape[:1]
    checks.require_shape(function, "mapping", mapping, shape, "one per embedding")
    mapping = labels_in_range(mapping, len(codebook))
    valid = mapping >= 0
    codes = codebook[jnp.where(valid, mapping, 0)].astype(embeddings.dtype)
    codes = lax.stop_gradient(jnp.where(valid[:, None], codes, jnp.nan))
    # Exactly the code: the difference is 0, unlike e + (c - e).
    return codes + (embeddings - lax.stop_gradient(embeddings))


@array_arguments(as_given=("counts",))
def frequency_mapping(
    counts: Integer[Array, " V"] | Float[Array, " V"],
    num_codes: int,
    *,
    num_singletons: int = 0,
) -> Int[Array, " V"]:
    r"""Codes by frequency: frequent tokens alone, the rest in even groups.

    The `num_singletons` most frequent tokens get a code each; all others follow in the
    order of their frequency, cut into groups whose sizes differ by one at most. A group
    costs each of its tokens the logarithm of its size, so groups belong where tokens
    are rare; neighbours in frequency make the least of the part of that loss which a
    bias per token could undo.

    Args:
        counts: How often each token occurs. Ties are broken by the lower token.
        num_codes: Static size of the codebook, at most V.
        num_singletons: Static, from 0 to `num_codes`; less than `num_codes` unless
            every token has its own code.

    Returns:
        The code of each token, int32: code 0 for the most frequent one.

    Raises:
        TypeError: `counts` holds neither integers nor floating numbers.
        ValueError: A number is out of range.

    Derivatives: none, integers.
    Cost: a sort of V numbers.
    Source: "VQ-Logits: Compressing the Output Bottleneck of Large Language Models via
        Vector Quantized Logits" names maps by frequency without a rule; this one is
        softlib's.

    Example:
        >>> counts = jnp.array([5, 1, 9, 2, 3])
        >>> print(softlib.nn.frequency_mapping(counts, 3, num_singletons=2))
        [1 2 0 2 2]
    """
    function = "frequency_mapping"
    counts = jnp.asarray(counts)
    if not jnp.issubdtype(counts.dtype, jnp.integer):
        checks.require_floating(function, counts=counts)
    checks.require_positive_integer(function, "num_codes", num_codes)
    if counts.ndim != 1 or len(counts) < num_codes:
        raise ValueError(
            f"{function}: `counts` must have shape (V,) with at least one token per "
            f"code ({num_codes}), got {counts.shape}."
        )
    tokens = len(counts)
    most = num_codes if tokens == num_codes else num_codes - 1
    if isinstance(num_singletons, bool) or not 0 <= num_singletons <= most:
        raise ValueError(
            f"{function}: `num_singletons` must be from 0 to {most} for {num_codes} "
            f"codes and {tokens} tokens, got {num_singletons}."
        )
    order = jnp.argsort(counts, stable=True, descending=True)
    rank = jnp.arange(tokens, dtype=jnp.int32)
    groups = num_codes - num_singletons
    code = rank
    if groups:
        size, longer = divmod(tokens - num_singletons, groups)
        place = rank - num_singletons
        # The first `longer` groups have one token more.
        first = place // (size + 1)
        rest = longer + (place - longer * (size + 1)) // max(size, 1)
        group = jnp.where(place < longer * (size + 1), first, rest)
        code = jnp.where(place < 0, rank, num_singletons + group)
    return jnp.zeros(tokens, jnp.int32).at[order].set(code.astype(jnp.int32))
