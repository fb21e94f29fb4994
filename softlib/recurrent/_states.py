r"""Attention without the exponential, as a state that a chunk of the sequence updates.

Per key head, with features phi and decays a_i = exp(l_i):

    M_i = a_i M_{i-1} + phi(k_i) v_i^T,    z_i = a_i z_{i-1} + phi(k_i)
    y_i = M_i^T phi(q_i) / eta_i,          eta_i = phi(q_i) . z_i, or given, or 1

or, unrolled over a chunk that starts from the state (M, z),

    eta_i y_i = e^{S_i} M^T phi(q_i) + sum_{j <= i} e^{S_ij} phi(q_i) . phi(k_j) v_j
    S_ij = l_{j+1} + ... + l_i,            S_i = S_{i, start}

so that chunks of one step are the recurrence and one chunk is the parallel form. The
S_ij are sums of their own terms and not differences of cumulative sums: those lose
their digits in long chunks, and a decay of 0 would make them inf - inf.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from softlib._compiled_once import compiled_once
from softlib.typing import Precision

from . import _chunks as __chunks


class LinearAttentionState(NamedTuple):
    """The state of linear attention, of constant size.

    There is one entry per key head, or per query head if the decays are per query head.

    Fields:
        memory: Decayed sum of the outer products of key features and values, float32
            or float64.
        normalizer: The same sum of the key features alone; None unless outputs are
            divided by the sum of their scores.
    """

    memory: Float[Array, "*batch heads features D"]
    normalizer: Float[Array, "*batch heads features"] | None = None


class Queries(NamedTuple):
    """Queries with axes batch, time, K key heads, G queries per key head."""

    query: Array  # (..., T, K, G, H)
    factor: Array | None  # (..., T, K, G): multiplies the output

    def by_heads(self) -> "Queries":
        """The queries with time behind the heads, for matrix products."""
        factor = None if self.factor is None else jnp.moveaxis(self.factor, -3, -1)
        return Queries(jnp.moveaxis(self.query, -4, -2), factor)


class Keys(NamedTuple):
    """Keys and values with axes batch, time, K key heads."""

    key: Array  # (..., T, K, H)
    value: Array  # (..., T, K, D)
    log_decay: Array | None  # (..., T, K)
    mask: Array | None  # (..., T): False removes the token

    def by_heads(self) -> "Keys":
        """The keys with time behind the heads; the mask is (..., 1, T)."""
        key, value = (jnp.moveaxis(x, -3, -2) for x in (self.key, self.value))
        log_decay, mask = self.log_decay, self.mask
        log_decay = None if log_decay is None else jnp.swapaxes(log_decay, -1, -2)
        return Keys(key, value, log_decay, None if mask is None else mask[..., None, :])


@dataclasses.dataclass(frozen=True)
class Options:
    features: Callable[[Array], Array]
    is_own: bool  # whether the features are softlib's, not a function of the caller
    is_divided_by_sum: bool
    dtype: DTypeLike  # of the arithmetic and of the state
    output_dtype: DTypeLike
    precision: Precision

    def product(self, formula: str, *operands: Array) -> Array:
        return jnp.einsum(
            formula,
            *operands,
            precision=self.precision,
            preferred_element_type=self.dtype,
        )


def evaluate(
    options: Options,
    is_causal: bool,
    axis: int,
    size: int,
    state: LinearAttentionState | None,
    queries: Queries,
    keys: Keys,
) -> tuple[LinearAttentionState, Array]:
    """The final state and the output, (..., T, K, G, D)."""
    evaluated = _evaluated_once if options.is_own else _evaluated
    return evaluated(options, is_causal, axis, size, state, queries, keys)


def _evaluated(
    options: Options,
    is_causal: bool,
    axis: int,
    size: int,
    state: LinearAttentionState | None,
    queries: Queries,
    keys: Keys,
) -> tuple[LinearAttentionState, Array]:
    of_chunks = causal if is_causal else bidirectional
    return of_chunks(options, state, queries, keys, axis=axis, size=size)


_evaluated_once = compiled_once(0, 1, 2, 3)(_evaluated)


def causal(
    options: Options,
    state: LinearAttentionState | None,
    queries: Queries,
    keys: Keys,
    *,
    axis: int,
    size: int,
) -> tuple[LinearAttentionState, Array]:
    """Linear attention where every query sees the keys up to its own."""

    def step(state, chunk):
        queries, keys = chunk
        query = options.features(queries.query.astype(options.dtype))
        key, value, log_decay = _prepared(options, keys)
        decays = None if log_decay is None else _decays(log_decay)
        weights = _causal_weights(options, query, key, decays)
        numerator = options.product("...gij,...jd->...gid", weights, value)
        scores = weights.sum(-1) if options.is_divided_by_sum else None
        if state is not None:
            past, past_scores = _read(options, state, query)
            left = None if decays is None else decays.from_start[..., None, :]
            numerator += _times(past, left)
            scores = None if scores is None else scores + _times(past_scores, left)
        if decays is not None:
            key = _times(key, decays.to_end)
            state = None if state is None else _decayed(state, decays.whole)
        output = _output(options, numerator, _factor(scores, queries.factor))
        return _with(options, state, key, value), output

    return __chunks.fold(
        step,
        state,
        (queries, keys),
        axis=axis,
        size=size,
        before=lambda chunk: (chunk[0].by_heads(), chunk[1].by_heads()),
        after=_by_time,
    )


def bidirectional(
    options: Options,
    state: LinearAttentionState | None,
    queries: Queries,
    keys: Keys,
    *,
    axis: int,
    size: int,
) -> tuple[LinearAttentionState, Array]:
    """Linear attention where every query sees every key; lengths may differ."""

    def add(state, keys):
        key, value, _ = _prepared(options, keys)
        return _with(options, state, key, value), ()

    state, _ = __chunks.fold(
        add, state, keys, axis=axis, size=size, before=Keys.by_heads
    )

    def read(state, queries):
        query = options.features(queries.query.astype(options.dtype))
        numerator, scores = _read(options, state, query)
        return state, _output(options, numerator, _factor(scores, queries.factor))

    return __chunks.fold(
        read,
        state,
        queries,
        axis=axis,
        size=size,
        before=Queries.by_heads,
        after=_by_time,
    )


def one_step(
    options: Options, state: LinearAttentionState | None, queries: Queries, keys: Keys
) -> tuple[LinearAttentionState, Array]:
    """Adds one token (T = 1) to the state, then reads it."""
    queries, keys = queries.by_heads(), keys.by_heads()
    query = options.features(queries.query.astype(options.dtype))
    key, value, log_decay = _prepared(options, keys)
    if state is not None and log_decay is not None:
        state = _decayed(state, jnp.exp(jnp.squeeze(log_decay, -1)))
    state = _with(options, state, key, value)
    numerator, scores = _read(options, state, query)
    output = _output(options, numerator, _factor(scores, queries.factor))
    return state, _by_time(output)


def matrix(
    options: Options, queries: Queries, keys: Keys, *, is_causal: bool
) -> Float[Array, "*batch K G T S"]:
    """The coefficient of every value in every output."""
    queries, keys = queries.by_heads(), keys.by_heads()
    query = options.features(queries.query.astype(options.dtype))
    key, _, log_decay = _prepared(options, keys)
    if is_causal:
        decays = None if log_decay is None else _decays(log_decay)
        weights = _causal_weights(options, query, key, decays)
    else:
        weights = options.product("...gis,...js->...gij", query, key)
    scores = weights.sum(-1) if options.is_divided_by_sum else None
    factor = _factor(scores, queries.factor)
    return _times(weights, factor).astype(options.output_dtype)


def _prepared(options: Options, keys: Keys) -> tuple[Array, Array, Array | None]:
    """Features of keys, values, log decays; all 0 for tokens that the mask removes."""
    key, value = keys.key.astype(options.dtype), keys.value.astype(options.dtype)
    log_decay = keys.log_decay
    log_decay = None if log_decay is None else log_decay.astype(options.dtype)
    if keys.mask is None:
        return options.features(key), value, log_decay
    # Masked before the feature map as well: a removed token may hold NaN.
    key = _where(keys.mask, options.features(_where(keys.mask, key)))
    if log_decay is not None:
        log_decay = _where(keys.mask, log_decay)
    return key, _where(keys.mask, value), log_decay


class _Decays(NamedTuple):
    """Products of decays within a chunk."""

    between: Array  # (..., K, i, j): decays j+1 ... i; 1 for i <= j
    from_start: Array  # (..., K, i): decays up to i
    to_end: Array  # (..., K, j): decays after j
    whole: Array  # (..., K): all decays


def _decays(log_decay: Array) -> _Decays:
    between = jnp.exp(segment_sums(log_decay))
    # The last row, as a sum since an empty chunk has no last row.
    to_end = between[..., -1:, :].sum(-2)
    from_start = jnp.exp(jnp.cumsum(log_decay, axis=-1))
    return _Decays(between, from_start, to_end, jnp.exp(log_decay.sum(-1)))


def segment_sums(terms: Float[Array, "*batch T"]) -> Float[Array, "*batch T T"]:
    """The sums S_ij of the terms j+1 ... i; 0 for i <= j."""
    shape = (*terms.shape, terms.shape[-1])
    later = jnp.broadcast_to(jnp.tri(*shape[-2:], k=-1, dtype=bool), shape)  # i > j
    return jnp.cumsum(jnp.where(later, terms[..., None], 0), axis=-2)


def _causal_weights(
    options: Options, query: Array, key: Array, decays: _Decays | None
) -> Array:
    """Decayed scores, (..., K, G, i, j), 0 for j > i."""
    weights = options.product("...gis,...js->...gij", query, key)
    if decays is not None:
        weights *= decays.between[..., None, :, :]
    seen = jnp.tri(*weights.shape[-2:], dtype=bool)
    return jnp.where(jnp.broadcast_to(seen, weights.shape), weights, 0)


def _by_time(output: Array) -> Array:
    """Transposes (..., K, G, i, D) to (..., i, K, G, D)."""
    return jnp.moveaxis(output, -2, -4)


def _read(
    options: Options, state: LinearAttentionState, query: Array
) -> tuple[Array, Array | None]:
    """The product of the state with queries, and the sum of scores (None: not kept)."""
    numerator = options.product("...gis,...sd->...gid", query, state.memory)
    if state.normalizer is None:
        return numerator, None
    return numerator, options.product("...gis,...s->...gi", query, state.normalizer)


def _decayed(state: LinearAttentionState, decay: Array) -> LinearAttentionState:
    normalizer = state.normalizer
    return LinearAttentionState(
        _times(state.memory, decay),
        None if normalizer is None else _times(normalizer, decay),
    )


def _with(
    options: Options, state: LinearAttentionState | None, key: Array, value: Array
) -> LinearAttentionState:
    """The state with more tokens added."""
    memory = options.product("...js,...jd->...sd", key, value)
    normalizer = key.sum(-2) if options.is_divided_by_sum else None
    added = LinearAttentionState(memory, normalizer)
    return added if state is None else jax.tree.map(jnp.add, state, added)


def _factor(scores: Array | None, given: Array | None) -> Array | None:
    """1 / eta, 0 where eta is 0 (a query that sees no key)."""
    if scores is None:
        return given
    empty = scores == 0
    return jnp.where(empty, 0, reciprocal(jnp.where(empty, 1, scores)))


# The derivative of a division squares the denominator, which underflows for sums of
# small features.
@jax.custom_jvp
def reciprocal(x: Array) -> Array:
    return 1 / x


@reciprocal.defjvp
def _reciprocal_jvp(primals, tangents):
    value = reciprocal(*primals)
    return value, -(tangents[0] * value) * value


def _output(options: Options, numerator: Array, factor: Array | None) -> Array:
    return _times(numerator, factor).astype(options.output_dtype)


def _times(array: Array | None, factor: Array | None) -> Array:
    """The product with a factor of the leading axes of `array`; None is 1."""
    assert array is not None
    if factor is None:
        return array
    missing = (1,) * (array.ndim - factor.ndim)
    return array * factor.astype(array.dtype).reshape(*factor.shape, *missing)


def _where(mask: Array, array: Array) -> Array:
    """`array` where the mask over its leading axes is True, else 0."""
    kept = mask.reshape(*mask.shape, *(1,) * (array.ndim - mask.ndim))
    return jnp.where(jnp.broadcast_to(kept, array.shape), array, 0)
