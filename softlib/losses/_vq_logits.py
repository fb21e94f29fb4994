r"""Cross-entropy of a codebook head: a softmax over V tokens from K logits.

Tokens share the logit of their code, so the sum over tokens is one over codes, each
counted as often as it has tokens: $\log \sum_j n_j e^{z_j}$. The engine adds the
logarithm of the counts to what it exponentiates, after the softcap, and nowhere else.
"""

from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float, Int, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype, common_dtype
from softlib._ids import labels_in_range
from softlib._sharding import in_auto_mode
from softlib.logits._compose import log_probability_of_labels
from softlib.logits._labelled_rows import rows_that_count
from softlib.logits._options import LinearHeadOptions
from softlib.logits._sources import LinearLogits


@array_arguments(as_given=("counts",))
def vq_softmax_cross_entropy(
    hidden: Float[Array, "*batch D"],
    codebook: Float[Array, "K D"] | Float[Array, "D K"],
    mapping: Integer[Array, " V"],
    labels: Integer[Array, "*batch"],
    *,
    counts: Integer[Array, " K"] | Float[Array, " K"] | None = None,
    token_bias: Float[Array, " V"] | None = None,
    where: Bool[Array, "..."] | None = None,
    **options: Unpack[LinearHeadOptions],
) -> Float[Array, "*batch"]:
    r"""Cross-entropy over V tokens of a codebook head, in nats per row, from K logits.

    Token $i$ has the logit $z_{M(i)}$ of its code, with $z$ the final logits of
    `hidden` and `codebook` and $M$ the `mapping`. With $n_j$ tokens in code $j$

    $$L = \log \sum_j n_j e^{z_j} - z_{M(y)} ,$$

    exactly the cross-entropy of the softmax over all tokens, of which no array is
    formed. With `token_bias` $b$ the logit is $z_{M(i)} + b_i$, $n_j$ becomes
    $\sum_{M(i) = j} e^{b_i}$ and $L$ loses $b_y$.

    The tokens of a code are equally likely without `token_bias`, hence $L \geq
    \log n_{M(y)}$ whatever is learned: with 50,257 tokens spread evenly over 1,024
    codes no less than 3.89 nats. A bias learns the frequencies within the codes; what
    the context says about the tokens of one code is lost either way.

    Args:
        hidden: Inputs of the head.
        codebook: One row per code, or one column with `vocab_axis=1`.
        mapping: Code of each token. An entry outside $[0, K)$ raises where its value is
            known; in a traced array that token has no probability and its loss is NaN.
        labels: Tokens in $[0, V)$. Outside, the loss is NaN, without a gradient.
        counts: `vq_token_counts(mapping, K)`, to save counting in every step. Data,
            without a gradient; must be those of `mapping`, which nobody checks.
        token_bias: One number per token, added after softcap and temperature. -inf
            excludes a token: as a label it costs +inf. Not together with `counts`.
        where: True for the rows that count; broadcasts to the batch shape. Elsewhere
            the loss and all gradients are exactly 0, whatever `hidden` and `labels`
            hold.
        **options: `bias` (per code), `logit_scale`, `logit_softcap`, `temperature` (of
            the logits of codes, not of `token_bias`), `class_where` (codes that exist),
            `vocab_axis`, `vocab_chunk`, `token_chunk`, `gradient_filter_eps`,
            `precision` and `implementation`, as in `linear_softmax_cross_entropy` for
            the codebook. `axis_name` must be None: a codebook is small.

    Returns:
        The loss per row, float32 (float64 if an argument is float64).

    Raises:
        TypeError: An argument has the wrong kind of dtype, or a keyword is unknown.
        ValueError: Shapes do not fit together, an option is out of range, or `mapping`
            is known to leave $[0, K)$.
        NotImplementedError: No implementation that was named can run; no kernel counts
            classes so far.

    Derivatives: as `row_statistics`, and with respect to `token_bias`. `mapping`
        and `counts` have none. A code without tokens has gradient 0.
    Cost: as `linear_softmax_cross_entropy` with K for V, and a count over V integers
        without `counts`; with `token_bias` a few arrays of V numbers.
    Source: "VQ-Logits: Compressing the Output Bottleneck of Large Language Models via
        Vector Quantized Logits". The bias per token is softlib's addition.

    Example:
        >>> hidden, codebook = jnp.eye(2), jnp.array([[1.0, 0.0], [0.0, 2.0]])
        >>> mapping, labels = jnp.array([0, 0, 1, 0]), jnp.array([3, 2])
        >>> vq = softlib.losses.vq_softmax_cross_entropy
        >>> print(np.asarray(vq(hidden, codebook, mapping, labels)).round(2))
        [1.21 0.34]
    """
    function = "vq_softmax_cross_entropy"
    if options.get("axis_name") is not None:
        raise ValueError(
            f"{function}: `axis_name` must be None, got {options['axis_name']!r}: a "
            "codebook is small enough for every device."
        )
    source = LinearLogits.of(
        function, hidden, codebook, weight_name="codebook", **options
    )
    mapping, labels = jnp.asarray(mapping), jnp.asarray(labels)
    require_mapping(function, mapping, source.num_classes)
    checks.require_integer(function, labels=labels)
    checks.require_shape(
        function, "labels", labels, source.batch_shape, "the batch shape"
    )
    token_bias = None if token_bias is None else jnp.asarray(token_bias)
    require_token_bias(function, token_bias, mapping)
    if token_bias is not None and counts is not None:
        raise ValueError(
            f"{function}: `counts` must be None with `token_bias`, got both: a bias "
            "counts the tokens of a code by itself."
        )

    log_weights = log_weights_of(
        mapping,
        source.num_classes,
        None if counts is None else _checked_counts(function, counts, source),
        token_bias,
        accumulator_dtype(source.hidden, source.weight),
    )
    labels = labels_in_range(labels, len(mapping))
    where = rows_that_count(source, where)

    def look_up(labels: Array, per_token: Array) -> Array:
        found = per_token[jnp.where(labels < 0, 0, labels)]
        return jnp.where(labels < 0, -1, found)

    at_labels = lambda per_token: in_auto_mode(
        look_up, lambda spec: PartitionSpec(*spec), labels, per_token
    )
    log_prob = log_probability_of_labels(
        source.counting(log_weights), at_labels(mapping), where
    )
    if token_bias is not None:
        own = at_labels(token_bias.astype(_wide(token_bias)))
        counts_here = labels >= 0 if where is None else where & (labels >= 0)
        # What is impossible without the bias too has no slope in it.
        counts_here = counts_here & (log_prob != -jnp.inf)
        log_prob = log_prob + jnp.where(counts_here, own, 0)
    return 0 - log_prob  # a certain label costs 0, not -0


@array_arguments
def vq_token_counts(mapping: Integer[Array, " V"], num_codes: int) -> Int[Array, " K"]:
    """How many tokens each code of a codebook stands for.

    Args:
        mapping: Code of each token; an entry outside [0, num_codes) raises where its
            value is known, and is not counted in a traced array.
        num_codes: Static size of the codebook.

    Returns:
        Counts, int32; their sum is the number of tokens.

    Raises:
        TypeError: `mapping` does not hold integers.
        ValueError: `mapping` is not one number per token, is empty, or is known to
            leave its range; `num_codes` is not a positive integer.

    Derivatives: none, integers.
    Cost: one pass over V integers.
    Source: "VQ-Logits: Compressing the Output Bottleneck of Large Language Models via
        Vector Quantized Logits".

    Example:
        >>> print(softlib.losses.vq_token_counts(jnp.array([0, 2, 2, 0, 0]), 4))
        [3 0 2 0]
    """
    return token_counts("vq_token_counts", mapping, num_codes)


# ------------------------------------------------------------------------------- shared
def token_counts(function: str, mapping: Array, num_codes: int) -> Int[Array, " K"]:
    """`vq_token_counts` under the name of a function that calls it."""
    checks.require_positive_integer(function, "num_codes", num_codes)
    require_mapping(function, mapping, num_codes)
    return _count(mapping, num_codes)


def log_weights_of(
    mapping: Integer[Array, " V"],
    num_codes: int,
    counts: Array | None,
    token_bias: Array | None,
    dtype: DTypeLike,
) -> Float[Array, " K"]:
    """The logarithm of the tokens of each code, or of the sum of their e^b."""
    if token_bias is None:
        if counts is None:
            counts = _count(mapping, num_codes)
        return lax.stop_gradient(jnp.log(counts.astype(dtype)))
    bias = token_bias.astype(common_dtype(dtype, token_bias.dtype))
    codes = _in_range(mapping, num_codes)
    options = {"mode": "drop", "indices_are_sorted": False}
    start = jnp.full(num_codes, -jnp.inf, bias.dtype)
    top = start.at[codes].max(lax.stop_gradient(bias), **options)
    top = jnp.where(jnp.isfinite(top), top, 0)
    here = jnp.where(codes < num_codes, top[jnp.minimum(codes, num_codes - 1)], 0)
    total = (
        jnp.zeros(num_codes, bias.dtype).at[codes].add(jnp.exp(bias - here), **options)
    )
    # Selected before the logarithm as well: its derivative at 0 is infinite.
    empty = total == 0
    return jnp.where(empty, -jnp.inf, top + jnp.log(jnp.where(empty, 1, total)))


def require_mapping(function: str, mapping: Array, num_codes: int) -> None:
    checks.require_integer(function, mapping=mapping)
    if mapping.ndim != 1 or not mapping.size:
        raise ValueError(
            f"{function}: `mapping` must have shape (V,), one code per token and at "
            f"least one, got {mapping.shape}."
        )
    if isinstance(mapping, jax.core.Tracer):
        return
    values = np.asarray(mapping)
    least, most = int(values.min()), int(values.max())
    if least < 0 or most >= num_codes:
        raise ValueError(
            f"{function}: `mapping` must hold codes in [0, {num_codes}), got "
            f"{least if least < 0 else most}."
        )


def require_token_bias(function: str, token_bias: Array | None, mapping: Array) -> None:
    checks.require_floating(function, token_bias=token_bias)
    shape, why = mapping.shape, "one per token"
    checks.require_shape(function, "token_bias", token_bias, shape, why)


def _checked_counts(function: str, counts: ArrayLike, source: LinearLogits) -> Array:
    counts = jnp.asarray(counts)
    if not jnp.issubdtype(counts.dtype, jnp.integer):
        checks.require_floating(function, counts=counts)
    shape, why = (source.num_classes,), "one per code"
    checks.require_shape(function, "counts", counts, shape, why)
    return counts


def _count(mapping: Array, num_codes: int) -> Int[Array, " K"]:
    zeros = jnp.zeros(num_codes, jnp.int32)
    return zeros.at[_in_range(mapping, num_codes)].add(1, mode="drop")


def _in_range(mapping: Array, num_codes: int) -> Int[Array, " V"]:
    """`num_codes` for what is outside [0, num_codes): a negative index would wrap."""
    codes = labels_in_range(mapping, num_codes)
    return jnp.where(codes < 0, num_codes, codes)


def _wide(array: Array) -> DTypeLike:
    return accumulator_dtype(array)
