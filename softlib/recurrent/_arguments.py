"""Arguments of linear attention: checked, and grouped by state."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from softlib import _checks
from softlib._dtypes import accumulator_dtype
from softlib._sharding import match_varying
from softlib.typing import Precision

from . import _feature_maps, _states as __states
from ._feature_maps import FeatureMap
from ._states import Keys, LinearAttentionState, Options, Queries


def prepare(
    function: str,
    query: Array,
    key: Array,
    value: Array,
    *,
    feature_map: FeatureMap,
    normalizer: Any,
    is_causal: bool,
    log_decay: Array | None,
    mask: Array | None,
    initial_state: LinearAttentionState | None,
    precision: Precision,
) -> tuple[Options, LinearAttentionState | None, Queries, Keys]:
    """Checks all arguments and groups query heads by the state that they read.

    The factor of the queries is the normaliser as given, if it is an array.
    """
    given = None if isinstance(normalizer, str) else normalizer
    _checks.require_floating(
        function,
        query=query,
        key=key,
        value=value,
        normalizer=given,
        log_decay=log_decay,
    )
    _checks.require_boolean(function, mask=mask)
    _checks.require_rank(function, "query", query, 3, "(..., T, N, H)")
    *batch, length, heads, size = query.shape
    if key.shape[:-3] != tuple(batch) or key.ndim != query.ndim:
        raise ValueError(
            f"{function}: `key` must have the axes (*{tuple(batch)}, S, K, H), "
            f"got shape {key.shape}."
        )
    key_length, key_heads = key.shape[-3:-1]
    _checks.require_shape(
        function, "key", key, (*batch, key_length, key_heads, size), "H of `query`"
    )
    if value.shape[:-1] != key.shape[:-1]:
        raise ValueError(
            f"{function}: `value` must have the shape (*{key.shape[:-1]}, D), "
            f"got {value.shape}."
        )
    if not key_heads or heads % key_heads:
        raise ValueError(
            f"{function}: `query` must have a multiple of the {key_heads} heads of "
            f"`key`, got {heads}."
        )
    if is_causal and length != key_length:
        raise ValueError(
            f"{function}: `key` must be as long as `query` ({length}) if `is_causal`, "
            f"got {key_length}."
        )
    if not is_causal and log_decay is not None:
        raise ValueError(
            f"{function}: `log_decay` must be None unless `is_causal`, "
            f"got shape {log_decay.shape}."
        )
    if given is None:
        _checks.require_one_of(function, "normalizer", normalizer, ("sum", "none"))
    _checks.require_shape(
        function, "normalizer", given, query.shape[:-1], "(*batch, T, N)"
    )
    per_step = (*batch, key_length)
    _checks.require_shape_in(
        function,
        "log_decay",
        log_decay,
        [(*per_step, key_heads), (*per_step, heads)],
        "one per step and key head, or query head",
    )
    _checks.require_shape(function, "mask", mask, per_step, "(*batch, S)")
    features = _feature_maps.resolve(function, feature_map)
    if is_sum := given is None and normalizer == "sum":
        _feature_maps.require_positive(function, feature_map)

    leaves = jax.tree.leaves(initial_state)
    dtype = accumulator_dtype(query, key, value, given, log_decay, *leaves)
    is_own = isinstance(feature_map, str)
    options = Options(features, is_own, is_sum, dtype, query.dtype, precision)
    groups = heads // key_heads
    if log_decay is not None and log_decay.shape[-1] != key_heads:
        # Every query head has a state of its own.
        key, value = (jnp.repeat(array, groups, axis=-2) for array in (key, value))
        key_heads, groups = heads, 1
    if initial_state is not None:
        initial_state = _checked_state(function, options, initial_state, key, value)
    grouped = (*batch, length, key_heads, groups)
    queries = Queries(
        query.reshape(*grouped, size),
        None if given is None else given.astype(dtype).reshape(grouped),
    )
    keys = Keys(key, value, log_decay, mask)
    return options, *match_varying((initial_state, queries, keys))


def inverted(queries: Queries) -> Queries:
    """The queries with the reciprocal of their factor."""
    factor = queries.factor
    if factor is None:
        return queries
    return queries._replace(factor=__states.reciprocal(factor))


def _checked_state(
    function: str,
    options: Options,
    state: LinearAttentionState,
    key: Array,
    value: Array,
) -> LinearAttentionState:
    found = jax.eval_shape(options.features, key.astype(options.dtype)).shape[-1]
    heads = (*key.shape[:-3], key.shape[-2])
    _checks.require_floating(function, initial_state=state.memory)
    _checks.require_shape(
        function,
        "initial_state.memory",
        state.memory,
        (*heads, found, value.shape[-1]),
        "(*batch, heads, features, D)",
    )
    normalizer = state.normalizer
    if options.is_divided_by_sum != (normalizer is not None):
        needed = "an array" if options.is_divided_by_sum else "None"
        raise ValueError(
            f"{function}: `initial_state.normalizer` must be {needed} with this "
            f"`normalizer`, got {'None' if normalizer is None else normalizer.shape}."
        )
    _checks.require_shape(
        function, "initial_state.normalizer", normalizer, (*heads, found), "no D"
    )
    return jax.tree.map(lambda array: array.astype(options.dtype), state)
