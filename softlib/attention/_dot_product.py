"""Dot-product attention over the blocks that a mask leaves."""

from typing import Any, Literal, TypedDict, Unpack, overload

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib.masks import Mask
from softlib.typing import Implementations, Precision, Scalar

from ._arguments import Shapes, are_given, planned, run, scaled, values_and_array
from ._engine.plan import BlockPlan
from ._engine.scores import Kind, LogSoftplus, Softmax, StableMax
from ._engine.tiles import Operands, Options
from ._partials import AttentionResult

_KINDS: dict[str, Kind] = {
    "softmax": Softmax(),
    "softplus": LogSoftplus(),
    "stablemax": StableMax(),
}


# For type checkers: the return type depends on a flag. (A TypedDict may have more keys
# than it names, hence the ignored error.)
class _Options(TypedDict, total=False):
    mask: Any
    bias: Array | None
    scale: Scalar | None
    softcap: float | None
    sinks: Array | None
    query_offset: ArrayLike
    is_causal: bool
    local_window_size: int | tuple[int, int] | None
    query_seq_lengths: ArrayLike | None
    key_value_seq_lengths: ArrayLike | None
    normalizer: Literal["softmax", "softplus", "stablemax"]
    block_query: int | None
    block_key: int | None
    precision: Precision
    implementation: Implementations


@overload
# pyrefly: ignore[inconsistent-overload]
def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    return_lse: Literal[True],
    **options: Unpack[_Options],
) -> AttentionResult: ...
@overload
# pyrefly: ignore[inconsistent-overload]
def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[_Options],
) -> Array: ...
@array_arguments
def dot_product_attention(
    query: Float[Array, "*batch T N H"],
    key: Float[Array, "*batch S K H"],
    value: Float[Array, "*batch S K E"],
    *,
    mask: Mask
    | BlockPlan
    | Bool[Array, "..."]
    | np.ndarray
    | tuple[Mask | Bool[Array, "..."] | np.ndarray, ...]
    | None = None,
    bias: Float[Array, "..."] | None = None,
    scale: Scalar | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    query_offset: ArrayLike = 0,
    is_causal: bool = False,
    local_window_size: int | tuple[int, int] | None = None,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    normalizer: Literal["softmax", "softplus", "stablemax"] = "softmax",
    return_lse: bool = False,
    block_query: int | None = None,
    block_key: int | None = None,
    precision: Precision = None,
    implementation: Implementations = None,
) -> Float[Array, "*batch T N E"] | AttentionResult:
    r"""Attention that visits only the blocks of keys that its mask leaves.

    $\mathrm{out}_i = \sum_j f(z_{ij})\, v_j / \sum_j f(z_{ij})$ over the keys $j$ that
    query $i$ may attend to, with the scores
    $z_{ij} = c \tanh(a \langle q_i, k_j \rangle / c) + b_{ij}$, $a$ the scale, $c$ the
    softcap, $b$ the bias, and $f = \exp$ by default. Takes the keyword arguments of
    `jax.nn.dot_product_attention`, and masks that are values (`softlib.masks`): those
    cost what their pattern costs, forward and backward, in time and memory.

    Args:
        query: Any leading batch axes, or none.
        key: K key heads; query head n reads key head `n // (N // K)`, N a multiple of
            K.
        value: Its feature size E may differ from H.
        mask: A mask value on absolute positions; or a `BlockPlan`, which holds one; or
            a boolean array, True for pairs that attend, that broadcasts to
            `(*batch, N, T, S)` and is looked up in every block that is visited; or a
            tuple of mask values and boolean arrays, of which all must hold.
        bias: Added to the scores after the softcap, so that -inf excludes a pair.
            Broadcasts to `(*batch, N, T, S)`, with all axes present. Its gradient has
            its shape and is reduced tile by tile.
        scale: Multiplies the products; None for $1/\sqrt H$. A number is static, a
            scalar array is traced and differentiable.
        softcap: Static positive number c; None for none.
        sinks: One extra score per query head, without a value, in every normaliser.
            Only for `normalizer="softmax"`.
        query_offset: Absolute position of the first query, for masks: an int, or an
            integer array, scalar or one per batch entry. With an array no block can be
            skipped.
        is_causal: Static; key position at most query position.
        local_window_size: Static; keys at most so far before and after a query, one
            number or `(before, after)`.
        query_seq_lengths: Integers, `*batch`; queries at or beyond it have the output
            0, are not read and may hold anything.
        key_value_seq_lengths: Integers, `*batch`; keys and values at or beyond it are
            not read and may hold anything.
        normalizer: Static; the positive function f: `softmax` exp, `softplus`
            $\log(1 + e^z)$, `stablemax` $1 + z$ for $z \ge 0$ and $1/(1 - z)$ below.
        return_lse: Static; returns `AttentionResult`, with the logarithm of $\sum_j
            f(z_{ij})$.
        block_query: Static queries per block; None chooses by mask, shape and
            platform. Kernels have blocks of their own: where sizes or a `BlockPlan` are
            given, none runs.
        block_key: Static keys per block, likewise.
        precision: Of the matrix products, as in `jax.lax.dot_general`.
        implementation: Static; see `softlib.explain`. `reference` materialises the
            scores and supports forward mode. `cudnn` calls cuDNN through `jax.nn`; None
            takes it on NVIDIA GPUs where it covers the call and no kernel comes first.

    Returns:
        The output in the dtype of `query`; with `return_lse` also the log-sum, nats,
        `(*batch, T, N)`, float32, or float64 if an argument is float64. A query that
        may attend to no key has the output 0 and the log-sum -inf, with a sink: the
        sink.

    Raises:
        TypeError: An argument has the wrong kind of dtype or type.
        ValueError: Shapes do not fit together, an option is out of range, or options
            exclude each other.
        NotImplementedError: No implementation that was named can run.

    Derivatives: reverse mode of any order and forward over reverse, with respect to
        `query`, `key`, `value`, `bias`, `sinks` and `scale`, through both results;
        plain forward mode with `implementation="reference"`. A query without keys has
        gradient 0 and gives none.
    Cost: with P pairs in the visited blocks $2 P N (H + E)$ flop forward and
        $P N (6 H + 4 E)$ backward; scratch of the arguments once in float32, and of a
        few tiles: on GPUs and TPUs, without a kernel and for the gradient of a bias, up
        to 768 MiB. There products of 16-bit arrays round the weights to their dtype.
        Kept for the backward pass: the arguments, the output, and one number per row.
        Reverse over reverse stores the tiles.
    Source: "FlashAttention: Fast and Memory-Efficient Exact Attention with
        IO-Awareness" and its successors for dense attention; "Radial Attention:
        O(n log n) Sparse Attention with Energy Decay for Long Video Generation" for
        static sparse masks.

    Example:
        >>> query = key = value = jnp.eye(4)[:, None, :]
        >>> mask = softlib.masks.Window(left=1, right=0)
        >>> attend = softlib.attention.dot_product_attention
        >>> print(attend(query, key, value, mask=mask, scale=0.0)[2, 0])
        [0.  0.5 0.5 0. ]
    """
    function = "dot_product_attention"
    shapes = Shapes.of(function, query, key, value)
    checks.require_one_of(function, "normalizer", normalizer, _KINDS)
    checks.require_floating(function, bias=bias, sinks=sinks)
    checks.require_shape(function, "sinks", sinks, (shapes.heads,), "one per head")
    if sinks is not None and normalizer != "softmax":
        raise ValueError(
            f"{function}: `sinks` must be None for normalizer={normalizer!r}, because "
            "a sink is a logarithm of a weight, got an array."
        )
    if softcap is not None:
        checks.require_positive_number(function, "softcap", softcap)
    if bias is not None:
        bias = shapes.on_pairs(function, "bias", bias)
    mask, dense = values_and_array(function, shapes, mask)
    plan = planned(
        function,
        shapes,
        mask,
        query_offset=query_offset,
        is_causal=is_causal,
        local_window_size=local_window_size,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        blocks=(block_query, block_key),
        all_partial=dense is not None,
    )
    query, key, value = shapes.flat(query, key, value)
    if query_seq_lengths is not None:
        query = shapes.without_padding(query, query_seq_lengths)
    if key_value_seq_lengths is not None:
        key, value = (
            shapes.without_padding(x, key_value_seq_lengths) for x in (key, value)
        )
    out_dtype = query.dtype
    query, scale = scaled(function, query, scale)
    operands = Operands(query, key, value, plan, dense, bias, sinks)
    kind = _KINDS[normalizer]
    given = are_given(mask, block_query, block_key)
    options = Options(
        kind,
        scale,
        softcap,
        precision,
        out_dtype,
        drops_normalizer=not return_lse,
        has_given_blocks=given,
    )
    found = run(function, implementation, options, operands)
    out = shapes.unflat(found.out)
    if not return_lse:
        return out
    lse = found.normalizer if kind.is_log else _log_sum(found.normalizer)
    return AttentionResult(out, shapes.unflat(lse))


def _log_sum(total: Array) -> Array:
    empty = total == 0
    return jnp.where(empty, -jnp.inf, jnp.log(jnp.where(empty, 1, total)))
