"""Attention of few queries to a long cache of keys."""

import functools
import math
from typing import Any, Literal, NamedTuple, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Integer

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype
from softlib._ids import signed
from softlib._sharding import match_varying, per_shard
from softlib._unified_range import require_ordered
from softlib.numerics import UnifiedMax
from softlib.typing import AxisName, Implementations, Precision, Scalar

from ._decode import operations as engine
from ._decode.stream import Operands, Options
from ._partials import AttentionResult, merge

FUNCTION = "decode_attention"
CRITERIA = ("row_max", "elementwise")


class DecodeResult(NamedTuple):
    """Attention of every query of `decode_attention`, and statistics of its scores.

    Statistics have the dtype of the sums.

    Attributes:
        output: What the call without `return_statistics` returns.
        lse: Logsumexp of the scores, the sink included, in nats; -inf for none.
        max_score: Largest score of the keys (the sink is not one), or -inf. A constant
            to differentiation. `calibrate_unified_max` takes these.
        needs_recompute: True where the unified maximum was not usable and the running
            maximum was used instead; False everywhere without `phi`.
    """

    # Any: the fields may also be shardings.
    output: Any  # Float[Array, "*batch T N Hv"]
    lse: Any  # Float[Array, "*batch T N"]
    max_score: Any  # Float[Array, "*batch T N"]
    needs_recompute: Any  # Bool[Array, "*batch T N"]


# For type checkers: the return type depends on flags.
class _Options(TypedDict, total=False):
    key_value_seq_lengths: Array | None
    is_causal: bool
    scale: Scalar | None
    softcap: float | None
    sinks: Array | None
    phi: ArrayLike | None
    valid_range: tuple[ArrayLike, ArrayLike]
    criterion: Literal["row_max", "elementwise"]
    num_splits: int | None
    axis_name: AxisName | None
    precision: Precision
    implementation: Implementations


@overload
# pyrefly: ignore[inconsistent-overload]
def decode_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    return_lse: Literal[True],
    return_statistics: Literal[False] = False,
    **options: Unpack[_Options],
) -> AttentionResult: ...
@overload
# pyrefly: ignore[inconsistent-overload]
def decode_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    return_lse: Literal[False] = False,
    return_statistics: Literal[True],
    **options: Unpack[_Options],
) -> DecodeResult: ...
@overload
# pyrefly: ignore[inconsistent-overload]
def decode_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    return_lse: Literal[False] = False,
    return_statistics: Literal[False] = False,
    **options: Unpack[_Options],
) -> Array: ...
@array_arguments
def decode_attention(
    query: Float[Array, "*batch T N H"],
    key: Float[Array, "*batch S K H"],
    value: Float[Array, "*batch S K Hv"],
    *,
    key_value_seq_lengths: Integer[Array, "*batch"] | None = None,
    is_causal: bool = False,
    scale: Scalar | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    phi: ArrayLike | None = None,
    valid_range: tuple[ArrayLike, ArrayLike] = (-70.0, 80.0),
    criterion: Literal["row_max", "elementwise"] = "row_max",
    num_splits: int | None = None,
    axis_name: AxisName | None = None,
    precision: Precision = None,
    implementation: Implementations = None,
    return_lse: bool = False,
    return_statistics: bool = False,
) -> Float[Array, "*batch T N Hv"] | AttentionResult | DecodeResult:
    r"""Softmax attention of one or a few new tokens to the keys in a cache.

    $$o = \frac{\sum_j e^{z_j - \varphi} v_j}{\sum_j e^{z_j - \varphi}},
      \qquad z_j = c \tanh(s \, q \cdot k_j / c)$$

    over the first `key_value_seq_lengths` keys, for any $\varphi$. By default
    $\varphi$ is the running maximum, and partial sums are rescaled whenever it grows.
    With `phi`, a number known beforehand ("unified max"), partial sums merely add, over
    splits and over devices. Rows for which that number does not serve are computed
    again by the running maximum, so the result is right in every case and does not
    depend on `phi` beyond rounding.

    `N` is a multiple of `K`; query head `n` reads key head `n // (N // K)`, and the
    queries of one key head are the rows of one product.

    Args:
        query: The new tokens, `T` of them: 1, or as many as a draft holds.
        key: The cache; places beyond the length may hold anything, NaN too.
        value: Its values; their size `Hv` may differ from `H`.
        key_value_seq_lengths: How many keys each sequence has, from 0 to S. None means
            all. A length outside of that range makes its rows NaN.
        is_causal: Static. The queries are the last `T` positions of the sequence and do
            not see what follows them: query `t` sees the first `length - T + 1 + t`
            keys. False: every query sees every key.
        scale: $s$, static or traced. None means `H ** -0.5`.
        softcap: Static positive number $c$, the bound of the scores; None for
            none.
        sinks: A further score per query head, without a value: it takes weight only.
        phi: The unified reference, one number or one per query head, static or traced;
            None for the running maximum. See `calibrate_unified_max`.
        valid_range: $(a, b)$, numbers or one per query head: a row is computed again
            unless $a < \max_j z_j - \varphi < b$ (the default suits float32 sums), and
            in any case if its sums overflow or underflow. Read only with `phi`.
        criterion: Static. "row_max", or "elementwise" to want every score of the row in
            the range (the rule of the paper; stricter, not more accurate). Read only
            with `phi`.
        num_splits: Static; into how many parts the keys are cut, at most. None chooses
            from the shape. The implementation "xla" visits them one after the other.
        axis_name: Inside `jax.shard_map`, the mesh axis or axes over which the keys are
            divided, in the order of their positions; `query`, lengths and options are
            the same on all devices of the axis, and so is the result.
        precision: Of the matrix products, as in `jax.lax.dot_general`. The default is
            not float32 on every device.
        implementation: None chooses; see `softlib.explain`.
        return_lse: Static; returns `AttentionResult`, with the logsumexp.
        return_statistics: Static; returns `DecodeResult`, which holds lse too.

    Returns:
        The attention in the dtype of `query`; 0 for a query that sees no keys. lse is
        float32 (float64 if an argument is), -inf for such a query, or its sink.

    Raises:
        TypeError: A dtype is wrong.
        ValueError: Shapes do not fit, `num_splits` exceeds S, an option has none of its
            values, or both `return_lse` and `return_statistics` are set.
        NotImplementedError: A named implementation cannot run.

    Derivatives: forward and reverse mode, any order, in `query`, `key`, `value`,
    `scale` and `sinks`; zero in `phi` and `valid_range`, of which the result is
    independent. A derivative holds all scores at once, (B, N, T, S).
    Cost: `4 B S N T H` floating-point operations for the reading of `key` and `value`,
    of which parts behind the longest sequence are not read: memory decides. Beyond that
    one part of scores and float32 values, 1 MiB by default. With `phi`, a second pass
    whenever some row is flagged; under `jax.vmap` always, so put the batch in the
    arguments. Over devices one `psum` of sums, with `phi` no wait for the maximum.
    Source: "FlashDecoding++: Faster Large Language Model Inference on GPUs". The
    default criterion is weaker than the paper's, see `softlib.numerics.UnifiedMax`, and
    rows are computed again one by one rather than with their whole batch.

    Example:
        >>> query, cache = jnp.ones((2, 1, 4, 8)), jnp.ones((2, 16, 2, 8))
        >>> lengths = jnp.array([16, 0])
        >>> out, lse = softlib.attention.decode_attention(
        ...     query, cache, cache, key_value_seq_lengths=lengths, return_lse=True)
        >>> print(out[:, 0, 0, 0], lse[:, 0, 0].round(4))
        [1. 0.] [5.601   -inf]
    """
    query, key, value = jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)
    checks.require_floating(FUNCTION, query=query, key=key, value=value)
    _require_fitting(query, key, value)
    *batch, _, heads, size = query.shape
    count = key.shape[-3]
    lengths = _lengths(key_value_seq_lengths, tuple(batch))
    scale = size**-0.5 if scale is None and size else 1.0 if scale is None else scale
    checks.require_scalar(FUNCTION, "scale", scale, -float("inf"), float("inf"))
    if softcap is not None:
        checks.require_positive_number(FUNCTION, "softcap", softcap)
    if num_splits is not None:
        checks.require_positive_integer(FUNCTION, "num_splits", num_splits)
        if num_splits > max(count, 1):
            raise ValueError(
                f"{FUNCTION}: `num_splits` must be at most the number of keys, "
                f"{count}, got {num_splits}."
            )
    checks.require_one_of(FUNCTION, "criterion", criterion, CRITERIA)
    if return_lse and return_statistics:
        raise ValueError(
            f"{FUNCTION}: `return_lse` must be False with `return_statistics`, which "
            "returns lse, got True."
        )
    if sinks is not None:
        sinks = jnp.asarray(sinks)
        checks.require_floating(FUNCTION, sinks=sinks)
        checks.require_shape(FUNCTION, "sinks", sinks, (heads,), "one per query head")
    unified = None
    if phi is not None:
        low, high = _bounds(valid_range)
        unified = UnifiedMax(
            _per_head("phi", phi, heads),
            (
                _per_head("valid_range", low, heads),
                _per_head("valid_range", high, heads),
            ),
            criterion,
        )

    options = Options(softcap, num_splits, precision)
    call = functools.partial(
        _attend, implementation, options, axis_name, bool(is_causal)
    )
    arrays = (key, value, lengths, jnp.asarray(scale), sinks, unified)
    shared = functools.partial(_by_batch_and_heads, arrays)
    found = per_shard(call, shared, _specs, query, *arrays)
    if return_statistics:
        return found
    return AttentionResult(found.output, found.lse) if return_lse else found.output


def _by_batch_and_heads(
    arrays: tuple[Any, ...], spec: PartitionSpec
) -> tuple[Any, ...]:
    """Specs that divide every array by batch entries and heads, like the queries."""
    *batch, _, heads, _ = spec
    of_heads = PartitionSpec(*batch, None, heads, None)
    _, _, lengths, _, sinks, unified = arrays
    per_head = lambda array: PartitionSpec(heads) if array.ndim else PartitionSpec()
    of_lengths = None if lengths is None else PartitionSpec(*batch)
    return (
        of_heads,
        of_heads,
        of_heads,
        of_lengths,
        PartitionSpec(),
        jax.tree.map(per_head, sinks),
        jax.tree.map(per_head, unified),
    )


def _specs(spec: PartitionSpec) -> DecodeResult:
    per_query = PartitionSpec(*spec[:-1])
    output = PartitionSpec(*spec[:-1], None)
    return DecodeResult(output, per_query, per_query, per_query)


def _attend(
    implementation: Implementations,
    options: Options,
    axis_name: AxisName | None,
    is_causal: bool,
    query: Array,
    key: Array,
    value: Array,
    lengths: Int[Array, "*batch"] | None,
    scale: Array,
    sinks: Array | None,
    unified: UnifiedMax | None,
) -> DecodeResult:
    *batch, queries, heads, _ = query.shape
    count, groups = key.shape[-3], key.shape[-2]
    # No -1 in a shape: an axis may have no elements.
    flat = lambda array: array.reshape(math.prod(batch), *array.shape[len(batch) :])
    dtype = accumulator_dtype(query, key, value)
    everything, first = count, 0
    if axis_name is not None:
        everything = count * lax.axis_size(axis_name)
        first = count * lax.axis_index(axis_name)

    visible = None
    if lengths is not None or is_causal:
        total = jnp.asarray(everything, jnp.int32) if lengths is None else lengths
        total = jnp.broadcast_to(total, tuple(batch)).reshape(-1, 1)
        later = jnp.arange(queries, dtype=jnp.int32)[::-1] * int(is_causal)
        seen = total - first - later[None, :]
        visible = jnp.tile(seen, (1, heads // groups))
    if unified is not None:
        per_row = lambda number: _rows_of_heads(number, groups, queries)
        low, high = unified.valid_range
        unified = UnifiedMax(
            per_row(unified.phi), (per_row(low), per_row(high)), unified.criterion
        )
    operands = Operands(
        _packed(flat(query), groups),
        flat(key),
        flat(value),
        scale.astype(dtype),
        visible,
        None,
    )
    # The reference stays replicated over devices that share a sum.
    operands = match_varying(operands)._replace(unified=unified)
    found = engine.attend(implementation, options, axis_name, operands)

    shape = (*batch, queries, heads)
    unpack = lambda rows: _unpacked(rows, queries, heads).reshape(
        *shape, *rows.shape[3:]
    )
    out, lse = unpack(found.out), unpack(found.lse)
    if sinks is not None:
        # Added after the merge over devices, so that a sink counts once.
        sink = jnp.broadcast_to(sinks.astype(dtype), lse.shape)
        out, lse = merge(jnp.stack([out, jnp.zeros_like(out)]), jnp.stack([lse, sink]))
    top, again = unpack(found.max_score), unpack(found.recomputed) != 0
    if lengths is not None:
        bad = ((lengths < 0) | (lengths > everything))[..., None, None]
        out = jnp.where(bad[..., None], jnp.nan, out)
        lse, top = jnp.where(bad, jnp.nan, lse), jnp.where(bad, jnp.nan, top)
    return DecodeResult(out.astype(query.dtype), lse, top, again)


def _packed(
    query: Float[Array, "B T N H"], groups: int
) -> Float[Array, "B groups R H"]:
    """The queries of each key head as rows, grouped by query head."""
    batch, queries, heads, size = query.shape
    shared = heads // groups
    split = query.reshape(batch, queries, groups, shared, size)
    rows = split.transpose(0, 2, 3, 1, 4)
    return rows.reshape(batch, groups, shared * queries, size)


def _unpacked(rows: Array, queries: int, heads: int) -> Array:
    """Reshapes (B, K, R, ...) to (B, T, N, ...)."""
    batch, groups, _, *rest = rows.shape
    split = rows.reshape(batch, groups, heads // groups, queries, *rest)
    split = jnp.moveaxis(split, 3, 1)
    return split.reshape(batch, queries, heads, *rest)


def _rows_of_heads(per_head: ArrayLike, groups: int, queries: int) -> Array:
    """Repeats one number, or one per query head, for the rows (K, R)."""
    numbers = jnp.asarray(per_head)
    if numbers.ndim == 0:
        return numbers
    shared = numbers.size // groups
    return jnp.repeat(numbers.reshape(groups, shared), queries, axis=1)


def _require_fitting(query: Array, key: Array, value: Array) -> None:
    for name, array, axes in (
        ("query", query, "(*batch, T, N, H)"),
        ("key", key, "(*batch, S, K, H)"),
        ("value", value, "(*batch, S, K, Hv)"),
    ):
        checks.require_rank(FUNCTION, name, array, 3, axes)
    *batch, _, heads, size = query.shape
    if key.shape[:-3] != tuple(batch) or key.shape[-1] != size:
        axes = ", ".join(map(str, (*batch, "S", "K", size)))
        raise ValueError(
            f"{FUNCTION}: `key` must have shape ({axes}) (batch and H of `query`), got "
            f"{key.shape}."
        )
    if key.shape[-2] == 0 or heads % key.shape[-2]:
        raise ValueError(
            f"{FUNCTION}: `key` must have a number of heads that divides the {heads} "
            f"of `query`, got {key.shape[-2]}."
        )
    if value.shape[:-1] != key.shape[:-1]:
        axes = ", ".join(map(str, (*key.shape[:-1], "Hv")))
        raise ValueError(
            f"{FUNCTION}: `value` must have shape ({axes}) (batch, S and K of `key`), "
            f"got {value.shape}."
        )


def _lengths(lengths: ArrayLike | None, batch: tuple[int, ...]) -> Array | None:
    if lengths is None:
        return None
    lengths = signed(jnp.asarray(lengths))
    name = "key_value_seq_lengths"
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(
            f"{FUNCTION}: `{name}` must have an integer dtype, got {lengths.dtype}."
        )
    checks.require_shape(FUNCTION, name, lengths, batch, "the batch axes of `query`")
    # No cache has more keys than an int32 can hold.
    most = jnp.iinfo(jnp.int32)
    return jnp.clip(lengths, most.min, most.max).astype(jnp.int32)


def _bounds(valid_range: object) -> tuple[ArrayLike, ArrayLike]:
    if not isinstance(valid_range, tuple | list) or len(valid_range) != 2:
        raise ValueError(
            f"{FUNCTION}: `valid_range` must be a pair (a, b), got {valid_range!r}."
        )
    low, high = valid_range
    require_ordered(FUNCTION, low, high)
    return low, high


def _per_head(name: str, value: ArrayLike, heads: int) -> Array:
    numbers = jnp.asarray(value)
    if not jnp.issubdtype(numbers.dtype, jnp.number):
        raise TypeError(
            f"{FUNCTION}: `{name}` must have a floating dtype, got {numbers.dtype}."
        )
    checks.require_shape_in(
        FUNCTION, name, numbers, ((), (heads,)), "one number, or one per query head"
    )
    return numbers.astype(accumulator_dtype(numbers))
