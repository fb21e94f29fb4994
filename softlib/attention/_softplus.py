"""Softplus attention, plain (LSSA) and re-weighted (LSSAR), on the attention engine."""

from typing import Any, Literal, NamedTuple, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype
from softlib.masks import Mask
from softlib.typing import Implementations, Precision

from ._arguments import Shapes, are_given, planned, run, values_and_array
from ._engine.plan import BlockPlan
from ._engine.scores import LogSoftplus, Reweighted, Softplus, SoftplusMoments
from ._engine.tiles import Operands, Options


class SoftplusResult(NamedTuple):
    r"""Softplus attention of every query, and statistics of its row.

    Statistics are float32 or wider.

    Attributes:
        output: What the call without `return_statistics` returns.
        mean: Mean of $\varphi = \log(1 + e^s)$ over the keys of the row; 0 without any.
        max: Largest $\varphi$ of the row; a constant to differentiation.
        normalizer: The divisor of the weights: the sum of $\varphi$, or of the
            re-weighted entries, which are relative to their maximum.
    """

    output: Float[Array, "*batch T N E"]
    mean: Float[Array, "*batch T N"]
    max: Float[Array, "*batch T N"]
    normalizer: Float[Array, "*batch T N"]


# For type checkers, as in `dot_product_attention`.
class _Options(TypedDict, total=False):
    mask: Any
    power: float | None
    offset_rows: int
    query_offset: ArrayLike
    query_seq_lengths: ArrayLike | None
    key_value_seq_lengths: ArrayLike | None
    normalize_qk: bool
    scale: ArrayLike | None
    block_query: int | None
    block_key: int | None
    precision: Precision
    implementation: Implementations


@overload
# pyrefly: ignore[inconsistent-overload]
def softplus_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    return_statistics: Literal[True],
    **options: Unpack[_Options],
) -> SoftplusResult: ...
@overload
# pyrefly: ignore[inconsistent-overload]
def softplus_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    return_statistics: Literal[False] = False,
    **options: Unpack[_Options],
) -> Array: ...
@array_arguments
def softplus_attention(
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
    power: float | None = None,
    offset_rows: int = 3,
    query_offset: ArrayLike = 0,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    normalize_qk: bool = True,
    scale: ArrayLike | None = None,
    return_statistics: bool = False,
    block_query: int | None = None,
    block_key: int | None = None,
    precision: Precision = None,
    implementation: Implementations = None,
) -> Float[Array, "*batch T N E"] | SoftplusResult:
    r"""Softplus attention with a length scale, optionally re-weighted (LSSA, LSSAR).

    With $\hat q, \hat k$ of norm 1, $N_i$ the number of keys that query $i$ may attend
    to and $s_{ij} = \log H \log N_i \langle \hat q_i, \hat k_j \rangle$, the weights
    are $\varphi_{ij} / \sum_j \varphi_{ij}$, $\varphi = \log(1 + e^s)$. With a `power`
    p they become $x_{ij}^p / \sum_j x_{ij}^p$, $x = \max(0, \varphi - \bar\varphi_i)$:
    only keys above the mean of their row count, which keeps attention sharp on
    sequences far longer than those of training. Causal through `mask=Causal()`.

    Args:
        query: Any leading batch axes, or none.
        key: K key heads; query head n reads key head `n // (N // K)`.
        value: Its feature size E may differ from H.
        mask: As in `dot_product_attention`. It also decides $N_i$.
        power: Static number of at least 1, or None for plain softplus attention. The
            paper uses 15 for length extrapolation and 3 at the training length.
        offset_rows: Static; rows with at most so many keys are re-weighted without
            subtracting their mean. A row with one key would have no weight otherwise.
        query_offset: Absolute position of the first query, as in
            `dot_product_attention`: a decoding step then equals its row of the whole.
        query_seq_lengths: Integers, `*batch`; queries at or beyond it have the output
            0.
        key_value_seq_lengths: Integers, `*batch`; keys at or beyond it are not read
            and not counted.
        normalize_qk: Static; whether to divide queries and keys by their norms.
        scale: Replaces $\log H \log N_i$: a number, or an array that broadcasts to
            `*batch T N`; traced and differentiable.
        return_statistics: Static; returns `SoftplusResult`.
        block_query: Static queries per block; None chooses by mask and shape. Kernels
            have blocks of their own: where sizes or a `BlockPlan` are given, none runs.
        block_key: Static keys per block.
        precision: Of the matrix products, as in `jax.lax.dot_general`.
        implementation: Static; see `softlib.explain`.

    Returns:
        The output in the dtype of `query`, and the statistics if asked for. A query
        without keys has the output 0, and so has a re-weighted row whose entries are
        all equal: within rounding of that, rounding decides.

    Raises:
        TypeError: An argument has the wrong kind of dtype or type.
        ValueError: Shapes do not fit together, or an option is out of range.
        NotImplementedError: No implementation that was named can run.

    Derivatives: as `dot_product_attention`, with respect to `query`, `key`, `value` and
        `scale`; counts are constants. Keys below the mean of a row get a gradient
        through the mean. A vector of norm 0 is not normalised and has gradient 0.
    Cost: as `dot_product_attention`; re-weighting streams over the keys twice,
        $2 P N (2 H + E)$ flop forward for P pairs. No exponential of a score is kept,
        so no running maximum is needed, except with a given scale or without
        normalisation.
    Source: "Softplus Attention with Re-weighting Boosts Length Extrapolation in Large
        Language Models". The second normalisation is applied to $\varphi -
        \bar\varphi$ relative to its maximum, equal in exact arithmetic, without the
        overflow and the epsilon of the printed order; counts $N_i$ and the offset rule
        are those of any mask.

    Example:
        >>> query = key = jnp.eye(4)[:, None, :]
        >>> attend = softlib.attention.softplus_attention
        >>> out = attend(query, key, key, power=15)
        >>> print(out[0, 0].round(3))
        [1. 0. 0. 0.]
    """
    function = "softplus_attention"
    shapes = Shapes.of(function, query, key, value)
    _require_power(function, power)
    if not isinstance(offset_rows, int) or offset_rows < 1:
        raise ValueError(
            f"{function}: `offset_rows` must be an int of at least 1, got "
            f"{offset_rows!r}."
        )
    mask, dense = values_and_array(function, shapes, mask)
    plan = planned(
        function,
        shapes,
        mask,
        query_offset=query_offset,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        blocks=(block_query, block_key),
        all_partial=dense is not None,
    )
    out_dtype = query.dtype
    wide = accumulator_dtype(query, key, value)
    query, key, value = shapes.flat(query, key, value)
    if query_seq_lengths is not None:
        query = shapes.without_padding(query, query_seq_lengths)
    if key_value_seq_lengths is not None:
        key, value = (
            shapes.without_padding(x, key_value_seq_lengths) for x in (key, value)
        )
    # Scores are float32 even for narrower arguments, because differences cancel.
    query, key = query.astype(wide), key.astype(wide)
    if normalize_qk:
        query, key = _normalized(query), _normalized(key)
    count = _row_count(shapes, plan, dense).astype(wide)
    bounded = normalize_qk and scale is None
    if scale is None:
        scale = length_log_scale(count, query.shape[-1])
    else:
        scale = shapes.on_rows(function, "scale", jnp.asarray(scale)).astype(wide)
    query = query * scale[..., None]
    given = are_given(mask, block_query, block_key)

    def call(kind: Any, value: Any, rows: Any = ()) -> Any:
        options = Options(kind, 1.0, None, precision, out_dtype, has_given_blocks=given)
        operands = Operands(query, key, value, plan, dense, rows=rows)
        return run(function, implementation, options, operands)

    # A whole row can underflow only if scores are unbounded.
    plain = Softplus() if bounded else LogSoftplus()
    if power is None:
        found = call(plain, value)
        out, normalizer = found.out, found.normalizer
        if not return_statistics:
            return shapes.unflat(out)
        moments = call(SoftplusMoments(), None)
        normalizer = jnp.exp(normalizer) if plain.is_log else normalizer
        mean = moments.normalizer / jnp.maximum(count, 1)
    else:
        moments = call(SoftplusMoments(), None)
        mean = moments.normalizer / jnp.maximum(count, 1)
        offset = jnp.where(count <= offset_rows, 0, mean)
        largest = lax.stop_gradient(moments.max - offset)
        inverse = jnp.where(largest > 0, 1 / jnp.where(largest > 0, largest, 1), 0)
        found = call(Reweighted(float(power)), value, (offset, inverse))
        out, normalizer = found.out, found.normalizer
        if not return_statistics:
            return shapes.unflat(out)
    top = lax.stop_gradient(moments.max)
    return SoftplusResult(*map(shapes.unflat, (out, mean, top, normalizer)))


@array_arguments
def softplus_weights(
    logits: Float[Array, "..."],
    *,
    axis: int = -1,
    where: Bool[Array, "..."] | None = None,
    power: float | None = None,
    offset_rows: int = 3,
) -> Float[Array, "..."]:
    r"""The weights of softplus attention for given scores; a relative of softmax.

    $\varphi / \sum \varphi$ with $\varphi = \log(1 + e^z)$, or $x^p / \sum x^p$ with
    $x$ the part of $\varphi$ above its mean. The rows sum to 1, or are 0: those without
    entries and, with a power, those whose entries are all equal.

    Args:
        logits: Scores; scaling by length is the caller's.
        axis: Static; along which the weights sum to 1.
        where: True for entries that count; broadcasts to `logits`.
        power: Static number of at least 1; None for plain softplus weights.
        offset_rows: Static; with at most so many entries the mean is not subtracted.

    Returns:
        Weights in the dtype of `logits`.

    Raises:
        TypeError: `logits` is not floating or `where` not boolean.
        ValueError: `power` is below 1, or shapes do not fit.

    Derivatives: forward and reverse mode, of any order where the entries differ from
        their mean.
    Cost: a few arrays of the shape of `logits`.
    Source: "Softplus Attention with Re-weighting Boosts Length Extrapolation in Large
        Language Models".

    Example:
        >>> logits = jnp.array([0.0, 1.0, 3.0, 4.0])
        >>> weights = softlib.attention.softplus_weights(logits, power=3)
        >>> print(jnp.round(100 * weights).astype(int))
        [ 0  0  8 92]
    """
    function = "softplus_weights"
    logits = jnp.asarray(logits)
    checks.require_floating(function, logits=logits)
    checks.require_axes(function, "axis", axis, logits.ndim)
    _require_power(function, power)
    ok = jnp.ones(logits.shape, bool)
    if where is not None:
        checks.require_boolean(function, where=where)
        why = "the shape of `logits`"
        checks.require_broadcastable(function, "where", where, logits.shape, why)
        ok = jnp.broadcast_to(where, logits.shape)
    wide = accumulator_dtype(logits)
    z = jnp.where(ok, logits.astype(wide), 0)
    total = lambda x: jnp.where(ok, x, 0).sum(axis, keepdims=True)
    if power is None:
        # In the log domain a row far below 0 becomes a softmax, not 0 / 0.
        entries = jnp.where(ok, LogSoftplus().entries(z, ()), -jnp.inf)
        top = entries.max(axis, keepdims=True, initial=-jnp.inf)
        entries = jnp.exp(
            entries - jnp.where(top == -jnp.inf, 0, lax.stop_gradient(top))
        )
    else:
        kind, phi = Reweighted(float(power)), jax.nn.softplus(z)
        count = ok.sum(axis, keepdims=True, dtype=wide)
        mean = total(phi) / jnp.maximum(count, 1)
        offset = jnp.where(count <= offset_rows, 0, mean)
        above = jnp.where(ok, lax.stop_gradient(phi - offset), 0)
        largest = above.max(axis, keepdims=True, initial=0)
        inverse = jnp.where(largest > 0, 1 / jnp.where(largest > 0, largest, 1), 0)
        entries = kind.entries(z, (offset, inverse))
    entries = jnp.where(ok, entries, 0)
    normalizer = entries.sum(axis, keepdims=True)
    return (entries / jnp.where(normalizer == 0, 1, normalizer)).astype(logits.dtype)


@array_arguments
def length_log_scale(row_count: ArrayLike, head_dim: int) -> Float[Array, "..."]:
    r"""The scale $\log d\, \log N$ of softplus attention, per row.

    It replaces $1 / \sqrt d$ and keeps the entropy of the weights in proportion as the
    number of keys grows.

    Args:
        row_count: How many keys each query may attend to, as `mask.row_count` returns
            it. Below 1 counts as 1.
        head_dim: Static size d of a head.

    Returns:
        float32 for integers, else the dtype of `row_count`; 0 for a single key.

    Raises:
        TypeError: `head_dim` is no int.
        ValueError: `head_dim` is below 1.

    Derivatives: counts are constants.
    Cost: one logarithm per row.
    Source: "Softplus Attention with Re-weighting Boosts Length Extrapolation in Large
        Language Models".

    Example:
        >>> count = softlib.masks.Causal().row_count(3)
        >>> print(softlib.attention.length_log_scale(count, 16).round(1))
        [0.  1.9 3. ]
    """
    checks.require_positive_integer("length_log_scale", "head_dim", head_dim)
    count = jnp.asarray(row_count)
    if not jnp.issubdtype(count.dtype, jnp.floating):
        count = count.astype(jnp.float32)
    return np.log(head_dim).astype(count.dtype) * jnp.log(jnp.maximum(count, 1))


def _require_power(function: str, power: float | None) -> None:
    if power is None:
        return
    checks.require_positive_number(function, "power", power)
    if power < 1:
        raise ValueError(
            f"{function}: `power` must be None or at least 1, got {power}."
        )


def _normalized(x: Array) -> Array:
    square = (x * x).sum(-1, keepdims=True)
    zero = square == 0
    return x * jnp.where(zero, 0, lax.rsqrt(jnp.where(zero, 1, square)))


def _row_count(shapes: Shapes, plan: BlockPlan, dense: Array | None) -> Array:
    """Number of keys that each query may attend to, (B, T, N)."""
    query_length, key_length = plan.lengths
    full = (shapes.size, query_length, shapes.heads)
    if dense is None:
        count = jnp.asarray(plan.mask.row_count(query_length, key_length))
        count = count if count.ndim == 2 else count[None]
        return jnp.broadcast_to(count[..., None], full)
    ok = jnp.asarray(plan.mask.materialize(query_length, key_length))
    ok = ok[:, None] if ok.ndim == 3 else ok[None, None]
    return jnp.broadcast_to(jnp.moveaxis((ok & dense).sum(-1), 1, 2), full)
