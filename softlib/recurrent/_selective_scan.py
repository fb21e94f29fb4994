"""The selective state-space model (S6): a diagonal system controlled by its input."""

from typing import Literal, TypedDict, Unpack, overload

import jax.numpy as jnp
from jaxtyping import Array, Float

from softlib import _checks
from softlib._array_arguments import array_arguments
from softlib._compiled_once import compiled_once
from softlib._dtypes import accumulator_dtype
from softlib._sharding import match_varying
from softlib.typing import Precision

from . import _chunks as __chunks
from ._linear_recurrence import RecurrentResult
from ._states import segment_sums

# A fourth of linear attention's: the backward pass holds all states of a chunk.
CHUNK_SIZE = 32


class _Options(TypedDict, total=False):
    chunk_size: int | None
    initial_state: Array | None
    precision: Precision


# For type checkers: the return type depends on a flag.
@overload
# pyrefly: ignore[inconsistent-overload]
def selective_scan(
    u: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    *,
    return_state: Literal[True],
    **options: Unpack[_Options],
) -> RecurrentResult: ...
@overload
# pyrefly: ignore[inconsistent-overload]
def selective_scan(
    u: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    *,
    return_state: Literal[False] = False,
    **options: Unpack[_Options],
) -> Array: ...
@array_arguments
def selective_scan(
    u: Float[Array, "*batch T D"],
    delta: Float[Array, "*batch T D"],
    A: Float[Array, "D F"],
    B: Float[Array, "*batch T F"],
    C: Float[Array, "*batch T F"],
    D: Float[Array, " D"] | None = None,
    *,
    chunk_size: int | None = None,
    initial_state: Float[Array, "*batch D F"] | None = None,
    return_state: bool = False,
    precision: Precision = None,
) -> Float[Array, "*batch T D"] | RecurrentResult:
    r"""The selective state-space model (S6, the core of Mamba), channel by channel.

    With F states per channel d,

    $$h_i = e^{-\Delta_i A} \odot h_{i-1} + \Delta_i\, u_i\, B_i, \qquad
      y_i = C_i \cdot h_i + D\, u_i .$$

    The rates A are *positive*: the minus sign is in the formula. Code that stores the
    negative matrix of the continuous system passes its negative. In the terms of
    `linear_attention`, B is the key, C the query, and u the value with a decay of its
    own for every feature; the step $\Delta$ ties what is forgotten to what is added.

    Args:
        u: Inputs, one number per channel and step.
        delta: Steps $\Delta \geq 0$, usually a softplus; 0 passes over a token.
        A: Decay rates, per channel and state; 0 remembers for ever.
        B: What maps an input to the states; shared by the channels.
        C: What maps the states to an output; shared by the channels.
        D: Per channel, multiplies the input that skips the states. None is 0.
        chunk_size: Static number of steps whose states the backward pass has in memory
            at a time; None is 32. The result does not depend on it.
        initial_state: The states before the first step.
        return_state: Static; True returns a `RecurrentResult` whose state is $h_T$. A
            decoding step is a call with T = 1 and the state of the last one.
        precision: Static precision of the products with C, as in
            `jax.lax.dot_general`.

    Returns:
        The outputs, in the dtype of `u`; the state is float32 (float64 if an argument
        is float64).

    Raises:
        TypeError: An array is not floating, or `chunk_size` is not a Python int.
        ValueError: Shapes do not fit together, or `chunk_size` is below 1.

    Derivatives: forward and reverse mode, any order.
    Cost: O(T D F) time, T steps one after the other. Memory for D F numbers; the
        backward pass keeps the arguments and T / Q states, recomputes the rest in
        chunks of Q steps, and holds the Q D F numbers of one.
    Source: "Understanding the differences in Foundation Models: Attention, State Space
        Models, and Recurrent Neural Networks". The convolution, the gate and the
        projections around it are left to the caller.

    Example:
        >>> u, one = jnp.ones((3, 1)), jnp.ones((1, 1))
        >>> y = softlib.recurrent.selective_scan(u, u, jnp.log(2) * one, u, u)
        >>> print(y[:, 0])
        [1.   1.5  1.75]
    """
    function = "selective_scan"
    _require(function, "u", u, A, B, C, D)
    _checks.require_floating(function, delta=delta, initial_state=initial_state)
    _checks.require_shape(function, "delta", delta, u.shape, "the shape of `u`")
    _checks.require_shape(
        function,
        "initial_state",
        initial_state,
        (*u.shape[:-2], *A.shape),
        "(*batch, D, F)",
    )
    __chunks.require_chunk_size(function, chunk_size)
    dtype = accumulator_dtype(u, delta, A, B, C, D, initial_state)
    axis = u.ndim - 2
    wide = lambda array: None if array is None else array.astype(dtype)
    (A, D, start), sequence = match_varying(
        ((wide(A), wide(D), wide(initial_state)), (u, delta, B, C))
    )
    if not u.shape[axis]:
        shape = (*u.shape[:-2], *A.shape)
        start = jnp.zeros(shape, dtype) if start is None else start
        return RecurrentResult(u, start) if return_state else u

    size = chunk_size or CHUNK_SIZE
    state, output = _scanned(size, precision, A, D, start, sequence)
    return RecurrentResult(output, state) if return_state else output


@compiled_once(0, 1)
def _scanned(
    size: int,
    precision: Precision,
    A: Float[Array, "D F"],
    D: Float[Array, " D"] | None,
    start: Float[Array, "*batch D F"] | None,
    sequence: tuple[Array, Array, Array, Array],
) -> tuple[Array, Array]:
    """The last state and the outputs; A has the dtype of the arithmetic."""
    dtype, axis = A.dtype, sequence[0].ndim - 2
    # Channels last, since there are many more of them than states: fuller vectors.
    rates = A.T.reshape((1,) * axis + A.T.shape)
    start = None if start is None else jnp.swapaxes(start, -1, -2)

    def step(state, now):
        u, delta, B, C = (array.astype(dtype) for array in now)
        added = B[..., :, None] * (delta * u)[..., None, :]  # (..., F, D)
        if state is not None:
            added += jnp.exp(-delta[..., None, :] * rates) * state
        output = jnp.einsum(
            "...fd,...f->...d",
            added,
            C,
            precision=precision,
            preferred_element_type=dtype,
        )
        if D is not None:
            output += jnp.broadcast_to(D, u.shape) * u
        return added, output.astype(now[0].dtype)

    state, output = __chunks.fold_steps(step, start, sequence, axis=axis, size=size)
    return jnp.swapaxes(state, -1, -2), output


@array_arguments
def selective_scan_matrix(
    delta: Float[Array, "*batch T D"],
    A: Float[Array, "D F"],
    B: Float[Array, "*batch T F"],
    C: Float[Array, "*batch T F"],
    D: Float[Array, " D"] | None = None,
    *,
    precision: Precision = None,
) -> Float[Array, "*batch D T T"]:
    r"""The coefficient of every input in every output of `selective_scan`, per channel.

    $K_{ij} = \sum_f C_{if}\, e^{-A_f (\Delta_{j+1} + \dots + \Delta_i)}\, B_{jf}\,
    \Delta_j$ for $j \leq i$, plus D on the diagonal, so that channel by channel
    $y = K u$. For plots and tests.

    Args:
        delta, A, B, C, D, precision: As in `selective_scan`.

    Returns:
        The matrices, float32 (float64 if an argument is float64).

    Raises:
        TypeError: An array is not floating.  ValueError: Shapes do not fit together.

    Derivatives: forward and reverse mode, any order.
    Cost: memory and time for T x T x F numbers per channel.
    Source: "Understanding the differences in Foundation Models: Attention, State Space
        Models, and Recurrent Neural Networks".

    Example:
        >>> one = jnp.ones((3, 1))
        >>> rates = jnp.log(jnp.full((1, 1), 2.0))
        >>> print(softlib.recurrent.selective_scan_matrix(one, rates, one, one)[0])
        [[1.   0.   0.  ]
         [0.5  1.   0.  ]
         [0.25 0.5  1.  ]]
    """
    function = "selective_scan_matrix"
    _require(function, "delta", delta, A, B, C, D)
    dtype = accumulator_dtype(delta, A, B, C, D)
    delta, A, B, C = (array.astype(dtype) for array in (delta, A, B, C))
    steps = jnp.swapaxes(delta, -1, -2)  # (..., D, T)
    between = segment_sums(steps)[..., None]  # (..., D, i, j, 1)
    rates = A.reshape((1,) * (steps.ndim - 2) + (A.shape[0], 1, 1, A.shape[1]))
    kernel = jnp.einsum(
        "...dijf,...if,...jf->...dij",
        jnp.exp(-between * rates),
        C,
        B,
        precision=precision,
        preferred_element_type=dtype,
    )
    kernel *= steps[..., None, :]
    seen = jnp.tri(delta.shape[-2], dtype=bool)
    kernel = jnp.where(jnp.broadcast_to(seen, kernel.shape), kernel, 0)
    if D is None:
        return kernel
    diagonal = (
        D.astype(dtype)[:, None, None] * jnp.eye(delta.shape[-2], dtype=dtype)[None]
    )
    return kernel + jnp.broadcast_to(diagonal, kernel.shape)


def _require(
    function: str,
    name: str,
    channels: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None,
) -> None:
    _checks.require_floating(function, **{name: channels}, A=A, B=B, C=C, D=D)
    _checks.require_rank(function, name, channels, 2, "(..., T, D)")
    if A.ndim != 2 or A.shape[0] != channels.shape[-1]:
        raise ValueError(
            f"{function}: `A` must have shape ({channels.shape[-1]}, F), one row per "
            f"channel, got {A.shape}."
        )
    per_step = (*channels.shape[:-1], A.shape[1])
    _checks.require_shape(function, "B", B, per_step, "(*batch, T, F)")
    _checks.require_shape(function, "C", C, per_step, "(*batch, T, F)")
    _checks.require_shape(function, "D", D, channels.shape[-1:], "one per channel")
