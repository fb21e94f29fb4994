"""A diagonal linear recurrence, evaluated step by step, as a tree, or in chunks."""

from typing import Any, Literal, NamedTuple, TypedDict, Unpack, overload

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from softlib import _checks
from softlib._array_arguments import array_arguments
from softlib._compiled_once import compiled_once
from softlib._dtypes import accumulator_dtype
from softlib._sharding import match_varying

from . import _chunks as __chunks

METHODS = ("associative", "chunked", "sequential")
CHUNK_SIZE = 128


class RecurrentResult(NamedTuple):
    """Outputs of a recurrence together with the state that continues it.

    Fields:
        output: What the call without `return_state` returns.
        state: The state after the last step; pass it as `initial_state` to go on.
    """

    output: Array
    state: Any


class _Options(TypedDict, total=False):
    initial_state: Array | None
    axis: int
    reverse: bool
    method: Literal["associative", "chunked", "sequential"]
    chunk_size: int | None


# For type checkers: the return type depends on a flag.
@overload
# pyrefly: ignore[inconsistent-overload]
def linear_recurrence(
    decay: Array,
    inputs: Array,
    *,
    return_state: Literal[True],
    **options: Unpack[_Options],
) -> RecurrentResult: ...
@overload
# pyrefly: ignore[inconsistent-overload]
def linear_recurrence(
    decay: Array,
    inputs: Array,
    *,
    return_state: Literal[False] = False,
    **options: Unpack[_Options],
) -> Array: ...
@array_arguments
def linear_recurrence(
    decay: Float[Array, "..."],
    inputs: Float[Array, "..."],
    *,
    initial_state: Float[Array, "..."] | None = None,
    axis: int = 0,
    reverse: bool = False,
    method: Literal["associative", "chunked", "sequential"] = "associative",
    chunk_size: int | None = None,
    return_state: bool = False,
) -> Float[Array, "..."] | RecurrentResult:
    r"""All states of a linear recurrence with elementwise decays.

    $$h_i = a_i h_{i-1} + b_i, \qquad h_0 = \text{initial state or } 0$$

    for decays $a$ and inputs $b$ that vary in time. The three methods compute the same
    states: step by step; as a tree, since $(a_1, b_1)(a_2, b_2) = (a_1 a_2, a_2 b_1 +
    b_2)$ is associative; or by chunks, trees inside and steps between them.

    Decays are factors, not logarithms: products of factors keep their relative
    accuracy, underflow to 0, and need no case for a decay of 0, which forgets all that
    came before. Any sign and size is allowed; a product of decays above 1 can overflow.

    Args:
        decay: Factor of the state before step i; every axis has the size of that of
            `inputs` or 1.
        inputs: What step i adds.
        initial_state: The state before the first step, of the shape of `inputs` without
            `axis`.
        axis: Static; the axis of time.
        reverse: Static; True runs from the last step to the first, and the initial
            state is that behind the last.
        method: Static. "sequential" has the least work and a depth of T steps,
            "associative" a depth of log T, "chunked" the least memory for a gradient.
        chunk_size: Static number of steps per chunk, 128 if None; only for "chunked".
        return_state: Static; True returns a `RecurrentResult` with the state
            after the last step that is run.

    Returns:
        The state after every step, of the shape of `inputs`, float32 (float64 if an
        argument is float64).

    Raises:
        TypeError: An array is not floating, or `chunk_size` is not a Python int.
        ValueError: Shapes do not fit together, or an option is out of range.

    Derivatives: forward and reverse mode, any order.
    Cost: O(T) time per element, twice that of the sequence for the tree. For the
        backward pass "sequential" keeps the states, "associative" the levels of the
        tree, "chunked" one state per chunk.
    Source: "Understanding the differences in Foundation Models: Attention, State Space
        Models, and Recurrent Neural Networks".

    Example:
        >>> decay, inputs = jnp.array([0.5, 0.5, 0.0]), jnp.array([1.0, 1.0, 1.0])
        >>> print(softlib.recurrent.linear_recurrence(decay, inputs))
        [1.  1.5 1. ]
    """
    function = "linear_recurrence"
    _checks.require_floating(
        function, decay=decay, inputs=inputs, initial_state=initial_state
    )
    _checks.require_rank(function, "inputs", inputs, 1, "(one of them time)")
    _checks.require_axes(function, "axis", axis, inputs.ndim)
    axis = axis % inputs.ndim
    if decay.ndim != inputs.ndim:
        raise ValueError(
            f"{function}: `decay` must have as many axes as `inputs` (of its size or "
            f"1), {inputs.ndim}, got shape {decay.shape}."
        )
    _checks.require_broadcastable(
        function, "decay", decay, inputs.shape, "the shape of `inputs`"
    )
    without_time = (*inputs.shape[:axis], *inputs.shape[axis + 1 :])
    _checks.require_shape(
        function, "initial_state", initial_state, without_time, "no axis of time"
    )
    require_method(function, method, chunk_size)

    dtype = accumulator_dtype(decay, inputs, initial_state)
    wide = lambda array: None if array is None else array.astype(dtype)
    decay, inputs, start = match_varying(
        (wide(decay), wide(inputs), wide(initial_state))
    )
    if not inputs.shape[axis]:
        start = jnp.zeros(without_time, dtype) if start is None else start
        return RecurrentResult(inputs, start) if return_state else inputs
    # Time in front, with the length of the inputs; other axes may stay 1.
    decay = jnp.broadcast_to(
        decay, (*decay.shape[:axis], inputs.shape[axis], *decay.shape[axis + 1 :])
    )
    decay, inputs = (jnp.moveaxis(array, axis, 0) for array in (decay, inputs))
    if reverse:
        decay, inputs = (jnp.flip(array, 0) for array in (decay, inputs))
    if method == "sequential":
        final, states = _sequential(start, decay, inputs)
    elif method == "associative":
        final, states = tree(start, (decay, inputs))
    else:
        size = chunk_size or CHUNK_SIZE
        final, states = _chunked(size, start, decay, inputs)
    states = jnp.flip(states, 0) if reverse else states
    states = jnp.moveaxis(states, 0, axis)
    return RecurrentResult(states, final) if return_state else states


def require_method(function: str, method: str, chunk_size: int | None) -> None:
    _checks.require_one_of(function, "method", method, METHODS)
    __chunks.require_chunk_size(function, chunk_size)
    if chunk_size is not None and method != "chunked":
        raise ValueError(
            f"{function}: `chunk_size` must be None with `method` {method!r}, "
            f"got {chunk_size}."
        )


def tree(
    state: Array | None, chunk: tuple[Array, Array], axis: int = 0
) -> tuple[Array, Array]:
    """(last state, all states) by a parallel scan; decays and inputs broadcast."""

    def then(first, second):
        return first[0] * second[0], second[0] * first[1] + second[1]

    decay, states = lax.associative_scan(then, chunk, axis=axis)
    if state is not None:
        states += decay * jnp.expand_dims(state, axis)
    return lax.index_in_dim(states, -1, axis, keepdims=False), states


@compiled_once(0)
def _chunked(
    size: int, state: Array | None, decay: Array, inputs: Array
) -> tuple[Array, Array]:
    return __chunks.fold(tree, state, (decay, inputs), axis=0, size=size)


@compiled_once()
def _sequential(
    state: Array | None, decay: Array, inputs: Array
) -> tuple[Array, Array]:
    def step(state, now):
        decay, added = now
        state = decay * state + added
        return state, state

    # The first step is outside: without an initial state it depends on no decay.
    first = inputs[0] if state is None else step(state, (decay[0], inputs[0]))[0]
    final, states = lax.scan(step, first, (decay[1:], inputs[1:]))
    return final, jnp.concatenate([first[None], states])
