"""Linear attention and its relatives: one state, three ways to normalise and decay."""

from typing import Literal, TypedDict, Unpack, overload

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from softlib import _checks
from softlib._array_arguments import array_arguments
from softlib.typing import Precision

from . import _chunks as __chunks, _states as __states
from ._arguments import inverted, prepare
from ._feature_maps import FeatureMap
from ._linear_recurrence import CHUNK_SIZE, RecurrentResult
from ._states import Keys, LinearAttentionState, Options, Queries


class _GatedOptions(TypedDict, total=False):
    mask: Array | None
    chunk_size: int | None
    initial_state: LinearAttentionState | None
    precision: Precision


class _NormalizedOptions(_GatedOptions, total=False):
    is_causal: bool
    log_decay: Array | None


class _Options(_NormalizedOptions, total=False):
    feature_map: FeatureMap
    normalizer: Literal["sum", "none"] | Array


# For type checkers: the return type depends on a flag. (A TypedDict may have more keys
# than it names, hence the ignored errors.)
@overload
# pyrefly: ignore[inconsistent-overload]
def linear_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    return_state: Literal[True],
    **options: Unpack[_Options],
) -> RecurrentResult: ...
@overload
# pyrefly: ignore[inconsistent-overload]
def linear_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    return_state: Literal[False] = False,
    **options: Unpack[_Options],
) -> Array: ...
@array_arguments
def linear_attention(
    query: Float[Array, "*batch T N H"],
    key: Float[Array, "*batch S K H"],
    value: Float[Array, "*batch S K D"],
    *,
    feature_map: FeatureMap = "elu1",
    normalizer: Literal["sum", "none"] | Float[Array, "*batch T N"] = "sum",
    is_causal: bool = True,
    log_decay: Float[Array, "*batch S heads"] | None = None,
    mask: Bool[Array, "*batch S"] | None = None,
    chunk_size: int | None = None,
    initial_state: LinearAttentionState | None = None,
    return_state: bool = False,
    precision: Precision = None,
) -> Float[Array, "*batch T N D"] | RecurrentResult:
    r"""Attention whose scores are inner products of features, in linear time.

    $$y_i = \frac{1}{\eta_i} \sum_{j \leq i} a_{j+1} \cdots a_i\,
      \bigl( \phi(q_i) \cdot \phi(k_j) \bigr)\, v_j$$

    The sum needs only the state $M_i = a_i M_{i-1} + \phi(k_i) v_i^T$ of a fixed size.
    Softmax attention is the case of the infinitely many features of the exponential;
    "taylor2" are the first three terms of it.

    One algorithm evaluates it: chunks of the sequence, quadratic inside and recurrent
    between them. With chunks of one step it is the recurrence, with one chunk the
    parallel form, and the results are equal up to rounding.

    Args:
        query: Queries; scale them first if the scores need a scale.
        key: Keys. Key head k serves the N / K query heads from k N / K on.
        value: Values, of any size.
        feature_map: Static; the $\phi$ of queries and keys: "elu1" (elu + 1), "relu",
            "exp" (elementwise; overflows as the exponential does), "identity",
            "taylor2" or another order (see `taylor_feature_map`), or a function
            (..., H) -> (..., features), which is applied to parts of the sequence.
        normalizer: The $\eta$: "sum", the sum of the (decayed) scores, for feature maps
            without negative scores; a function as feature map is trusted in that.
            "none" is 1. An array is divided by, whatever it holds.
        is_causal: Static; False lets every query see every key. S may then differ from
            T.
        log_decay: Logarithms of the decays $a$, one per step and key head, or per query
            head; 0 keeps everything, -inf forgets all that came before the step. Only
            for causal attention.
        mask: True for the tokens that exist. The result is that of a sequence without
            the others, whatever their key, value and decay hold; their queries still
            see the past.
        chunk_size: Static number of steps per chunk; None is 128, or fewer if the
            sequence is shorter.
        initial_state: The state before the first token, from an earlier part of the
            sequence; key features and values are those of the earlier call.
        return_state: Static; True returns a `RecurrentResult` with a
            `LinearAttentionState`, to go on with (see `decode_step`).
        precision: Static precision of the products, as in `jax.lax.dot_general`.

    Returns:
        The outputs, in the dtype of `query`. 0 where the sum of the scores is 0, as
        before the first token of the mask. The state is float32 (float64 if an argument
        is float64), whatever the inputs are. Without a mask, a NaN in a key or value
        reaches the outputs of its chunk that precede it.

    Raises:
        TypeError: An array has the wrong kind of dtype, or `chunk_size` is no integer.
        ValueError: Shapes or options do not fit together; "sum" was asked for with a
            feature map that has negative scores ("identity", an odd Taylor order).

    Derivatives: forward and reverse mode, any order. No derivative flows where the sum
        of the scores is 0, or through a decay of 0.
    Cost: with F features and chunks of Q steps, 2 T (Q (F + D) + 2 F D) operations per
        head. The backward pass keeps the arguments and T / Q states of F D numbers, and
        recomputes the rest chunk by chunk. With N / K > 1 and decays per query head,
        keys and values are repeated for every query head.
    Source: "Understanding the differences in Foundation Models: Attention, State Space
        Models, and Recurrent Neural Networks". The sum of the scores divides the output
        and is not part of the recurrence, where it cancels.

    Example:
        >>> x = jax.random.normal(jax.random.key(0), (3, 1, 5, 2, 4))
        >>> whole = softlib.recurrent.linear_attention(*x, return_state=True)
        >>> half = softlib.recurrent.linear_attention(*x[:, :, :3], return_state=True)
        >>> rest = softlib.recurrent.linear_attention(
        ...     *x[:, :, 3:], initial_state=half.state)
        >>> print(abs(whole.output[:, 3:] - rest).max() < 1e-5)
        True
    """
    function = "linear_attention"
    options, state, queries, keys = prepare(
        function,
        query,
        key,
        value,
        feature_map=feature_map,
        normalizer=normalizer,
        is_causal=is_causal,
        log_decay=log_decay,
        mask=mask,
        initial_state=initial_state,
        precision=precision,
    )
    queries = inverted(queries)
    return _evaluate(
        function, options, state, queries, keys, is_causal, chunk_size, return_state
    )


@overload
# pyrefly: ignore[inconsistent-overload]
def normalized_attention(
    query: Array,
    key: Array,
    value: Array,
    log_normalizer: Array,
    *,
    return_state: Literal[True],
    **options: Unpack[_NormalizedOptions],
) -> RecurrentResult: ...
@overload
# pyrefly: ignore[inconsistent-overload]
def normalized_attention(
    query: Array,
    key: Array,
    value: Array,
    log_normalizer: Array,
    *,
    return_state: Literal[False] = False,
    **options: Unpack[_NormalizedOptions],
) -> Array: ...
@array_arguments
def normalized_attention(
    query: Float[Array, "*batch T N H"],
    key: Float[Array, "*batch S K H"],
    value: Float[Array, "*batch S K D"],
    log_normalizer: Float[Array, "*batch T N"],
    *,
    is_causal: bool = True,
    log_decay: Float[Array, "*batch S heads"] | None = None,
    mask: Bool[Array, "*batch S"] | None = None,
    chunk_size: int | None = None,
    initial_state: LinearAttentionState | None = None,
    return_state: bool = False,
    precision: Precision = None,
) -> Float[Array, "*batch T N D"] | RecurrentResult:
    r"""Linear attention of plain scores, divided by a number that is learned.

    $$y_i = e^{-n_i} \sum_{j \leq i} (q_i \cdot k_j)\, v_j$$

    Scores have any sign, so their sum is no normaliser; $n_i$ is a function of token i
    (in the paper a linear one per head). `linear_attention` with the identity as
    feature map and $e^n$ as normaliser; the derivative with respect to $n_i$ is $-y_i$.

    Args:
        query, key, value: As in `linear_attention`.
        log_normalizer: $n$, one number per query. Nothing is subtracted or clipped: the
            output grows like $e^{-n}$.
        is_causal, log_decay, mask, chunk_size, initial_state: As in `linear_attention`.
        return_state, precision: As in `linear_attention`.

    Returns:
        As `linear_attention`.

    Raises:
        TypeError: As `linear_attention`.  ValueError: As `linear_attention`.

    Derivatives: forward and reverse mode, any order.
    Cost: as `linear_attention` with H features.
    Source: "Understanding the differences in Foundation Models: Attention, State Space
        Models, and Recurrent Neural Networks".

    Example:
        >>> x, n = jnp.ones((3, 1, 1)), jnp.log(jnp.array([[1.0], [2.0], [4.0]]))
        >>> print(softlib.recurrent.normalized_attention(x, x, x, n)[:, 0, 0])
        [1.   1.   0.75]
    """
    function = "normalized_attention"
    _checks.require_floating(function, log_normalizer=log_normalizer)
    _checks.require_shape(
        function, "log_normalizer", log_normalizer, query.shape[:-1], "(*batch, T, N)"
    )
    options, state, queries, keys = prepare(
        function,
        query,
        key,
        value,
        feature_map="identity",
        normalizer=log_normalizer,
        is_causal=is_causal,
        log_decay=log_decay,
        mask=mask,
        initial_state=initial_state,
        precision=precision,
    )
    assert queries.factor is not None
    queries = queries._replace(factor=jnp.exp(-queries.factor))
    return _evaluate(
        function, options, state, queries, keys, is_causal, chunk_size, return_state
    )


@overload
# pyrefly: ignore[inconsistent-overload]
def gated_linear_attention(
    query: Array,
    key: Array,
    value: Array,
    log_decay: Array,
    *,
    return_state: Literal[True],
    **options: Unpack[_GatedOptions],
) -> RecurrentResult: ...
@overload
# pyrefly: ignore[inconsistent-overload]
def gated_linear_attention(
    query: Array,
    key: Array,
    value: Array,
    log_decay: Array,
    *,
    return_state: Literal[False] = False,
    **options: Unpack[_GatedOptions],
) -> Array: ...
@array_arguments
def gated_linear_attention(
    query: Float[Array, "*batch T N H"],
    key: Float[Array, "*batch T K H"],
    value: Float[Array, "*batch T K D"],
    log_decay: Float[Array, "*batch T heads"],
    *,
    mask: Bool[Array, "*batch T"] | None = None,
    chunk_size: int | None = None,
    initial_state: LinearAttentionState | None = None,
    return_state: bool = False,
    precision: Precision = None,
) -> Float[Array, "*batch T N D"] | RecurrentResult:
    r"""Linear attention of plain scores that forgets: a scalar decay per head and step.

    $$M_i = a_i M_{i-1} + k_i v_i^T, \qquad y_i = M_i^T q_i, \qquad a_i = e^{\ell_i}$$

    `linear_attention` with the identity as feature map and no normaliser. The scalar
    state-space model (SSD, Mamba-2) is this function with decays $e^{-\Delta_i a}$ and
    values (or keys) times $\Delta_i$.

    Args:
        query, key, value: As in `linear_attention`.
        log_decay: $\ell$, one number per step and key head, or query head. The decay of
            step i multiplies the state before token i is added; -inf forgets it.
        mask, chunk_size, initial_state, return_state: As in `linear_attention`.
        precision: As in `linear_attention`.

    Returns:
        As `linear_attention`.

    Raises:
        TypeError: As `linear_attention`.  ValueError: As `linear_attention`.

    Derivatives: forward and reverse mode, any order.
    Cost: as `linear_attention` with H features.
    Source: "Understanding the differences in Foundation Models: Attention, State Space
        Models, and Recurrent Neural Networks".

    Example:
        >>> x, log_decay = jnp.ones((3, 1, 1)), jnp.log(jnp.full((3, 1), 0.5))
        >>> print(softlib.recurrent.gated_linear_attention(x, x, x, log_decay)[:, 0, 0])
        [1.   1.5  1.75]
    """
    function = "gated_linear_attention"
    prepared = prepare(
        function,
        query,
        key,
        value,
        feature_map="identity",
        normalizer="none",
        is_causal=True,
        log_decay=log_decay,
        mask=mask,
        initial_state=initial_state,
        precision=precision,
    )
    return _evaluate(function, *prepared, True, chunk_size, return_state)


@array_arguments
def decode_step(
    state: LinearAttentionState | None,
    query: Float[Array, "*batch N H"],
    key: Float[Array, "*batch K H"],
    value: Float[Array, "*batch K D"],
    *,
    feature_map: FeatureMap = "elu1",
    normalizer: Literal["sum", "none"] | Float[Array, "*batch N"] = "sum",
    log_decay: Float[Array, "*batch heads"] | None = None,
    precision: Precision = None,
) -> RecurrentResult:
    r"""One more token of linear attention, in time and memory that do not grow.

    The recurrence $M \leftarrow a M + \phi(k) v^T$, $y = M^T \phi(q) / \eta$, with the
    options of `linear_attention` that belong to one token. Steps from the first token
    on, or from the state of a prefix, give the outputs of the whole sequence.

    For `normalized_attention` pass "identity" and `jnp.exp(log_normalizer)`, for
    `gated_linear_attention` "identity" and "none". The step of `selective_scan` and
    `quasi_lstm` is a call of theirs with T = 1.

    Args:
        state: The state of the tokens before, None if there are none.
        query: Query of the token.
        key: Key of the token.
        value: Value of the token.
        feature_map: As in `linear_attention`.
        normalizer, log_decay: As in `linear_attention`, without time.
        precision: As in `linear_attention`.

    Returns:
        A `RecurrentResult`: the output (..., N, D) in the dtype of `query`, and the new
        state.

    Raises:
        TypeError: As `linear_attention`.  ValueError: As `linear_attention`.

    Derivatives: forward and reverse mode, any order.
    Cost: 2 F D operations per head with F features; the state.
    Source: "Understanding the differences in Foundation Models: Attention, State Space
        Models, and Recurrent Neural Networks".

    Example:
        >>> x, state = jax.random.normal(jax.random.key(0), (3, 6, 2, 4)), None
        >>> for i in range(6):
        ...     output, state = softlib.recurrent.decode_step(state, *x[:, i])
        >>> print(abs(output - softlib.recurrent.linear_attention(*x)[-1]).max() < 1e-5)
        True
    """
    function = "decode_step"
    axes = "(..., heads, size)"
    for name, array in (("query", query), ("key", key), ("value", value)):
        _checks.require_rank(function, name, array, 2, axes)
    at_time = lambda array: None if array is None else jnp.expand_dims(array, -2)
    options, state, queries, keys = prepare(
        function,
        *(jnp.expand_dims(array, -3) for array in (query, key, value)),
        feature_map=feature_map,
        normalizer=normalizer if isinstance(normalizer, str) else at_time(normalizer),
        is_causal=True,
        log_decay=at_time(log_decay),
        mask=None,
        initial_state=state,
        precision=precision,
    )
    queries = inverted(queries)
    state, output = __states.one_step(options, state, queries, keys)
    return RecurrentResult(output.reshape(*query.shape[:-1], output.shape[-1]), state)


@array_arguments
def attention_matrix(
    query: Float[Array, "*batch T N H"],
    key: Float[Array, "*batch S K H"],
    *,
    feature_map: FeatureMap = "elu1",
    normalizer: Literal["sum", "none"] | Float[Array, "*batch T N"] = "sum",
    is_causal: bool = True,
    log_decay: Float[Array, "*batch S heads"] | None = None,
    mask: Bool[Array, "*batch S"] | None = None,
    precision: Precision = None,
) -> Float[Array, "*batch N T S"]:
    r"""The coefficient of every value in every output of linear attention.

    The kernel $K_{ij} = a_{j+1} \cdots a_i\, \phi(q_i) \cdot \phi(k_j) / \eta_i$ of
    `linear_attention`, whose output is $y = K v$ per head, for plots and tests. For
    `normalized_attention` pass "identity" and `jnp.exp(log_normalizer)`, for
    `gated_linear_attention` "identity" and "none"; `selective_scan_matrix` and
    `quasi_lstm_matrix` are those of the others.

    Args:
        query, key, feature_map, normalizer, is_causal: As in `linear_attention`.
        log_decay, mask, precision: As in `linear_attention`.

    Returns:
        The matrices, float32 (float64 if an argument is float64).

    Raises:
        TypeError: As `linear_attention`.  ValueError: As `linear_attention`.

    Derivatives: forward and reverse mode, any order.
    Cost: memory and time for T x S numbers per head.
    Source: "Understanding the differences in Foundation Models: Attention, State Space
        Models, and Recurrent Neural Networks".

    Example:
        >>> x = jnp.array([1.0, 2.0, 3.0])[:, None, None]
        >>> print(softlib.recurrent.attention_matrix(x, x, feature_map="relu")[0])
        [[1.         0.         0.        ]
         [0.33333334 0.6666667  0.        ]
         [0.16666667 0.33333334 0.5       ]]
    """
    options, _, queries, keys = prepare(
        "attention_matrix",
        query,
        key,
        key,
        feature_map=feature_map,
        normalizer=normalizer,
        is_causal=is_causal,
        log_decay=log_decay,
        mask=mask,
        initial_state=None,
        precision=precision,
    )
    found = __states.matrix(options, inverted(queries), keys, is_causal=is_causal)
    return found.reshape(*query.shape[:-3], query.shape[-2], *found.shape[-2:])


def _evaluate(
    function: str,
    options: Options,
    state: LinearAttentionState | None,
    queries: Queries,
    keys: Keys,
    is_causal: bool,
    chunk_size: int | None,
    return_state: bool,
) -> Array | RecurrentResult:
    __chunks.require_chunk_size(function, chunk_size)
    axis, size = queries.query.ndim - 4, chunk_size or CHUNK_SIZE
    state, output = __states.evaluate(
        options, is_causal, axis, size, state, queries, keys
    )
    *batch, length, heads, groups, size = output.shape
    output = output.reshape(*batch, length, heads * groups, size)
    return RecurrentResult(output, state) if return_state else output
