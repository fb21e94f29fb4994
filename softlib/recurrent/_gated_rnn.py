"""The long short-term memory whose gates see the input only, so that it is linear."""

import math
from typing import Literal, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from softlib import _checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype
from softlib.typing import Scalar

from ._linear_recurrence import RecurrentResult, linear_recurrence, require_method
from ._states import segment_sums


class _Options(TypedDict, total=False):
    alpha: Scalar | Array | None
    method: Literal["associative", "chunked", "sequential"]
    chunk_size: int | None
    initial_state: Array | None


# For type checkers: the return type depends on a flag.
@overload
# pyrefly: ignore[inconsistent-overload]
def quasi_lstm(
    f: Array,
    i: Array,
    o: Array,
    z: Array,
    *,
    return_state: Literal[True],
    **options: Unpack[_Options],
) -> RecurrentResult: ...
@overload
# pyrefly: ignore[inconsistent-overload]
def quasi_lstm(
    f: Array,
    i: Array,
    o: Array,
    z: Array,
    *,
    return_state: Literal[False] = False,
    **options: Unpack[_Options],
) -> Array: ...
@array_arguments
def quasi_lstm(
    f: Float[Array, "*batch T D"],
    i: Float[Array, "*batch T D"],
    o: Float[Array, "*batch T D"],
    z: Float[Array, "*batch T D"],
    *,
    alpha: Scalar | Float[Array, " D"] | None = None,
    method: Literal["associative", "chunked", "sequential"] = "associative",
    chunk_size: int | None = None,
    initial_state: Float[Array, "*batch D"] | None = None,
    return_state: bool = False,
) -> Float[Array, "*batch T D"] | RecurrentResult:
    r"""A long short-term memory without recurrent gates (qLSTM): a diagonal system.

    With the logistic function $\sigma$,

    $$h_t = \sigma(f_t)\, h_{t-1} + \sigma(i_t)\, z_t, \qquad
      y_t = \sigma(o_t)\, h_t .$$

    The gates depend on the input of step t alone, so the state is linear in the past
    and need not be computed step by step. With `alpha` the decay is that of a selective
    state-space model ("reversed sigmoid"),

    $$\sigma(-f_t)^\alpha = e^{-\alpha\, \mathrm{softplus}(f_t)} .$$

    Args:
        f: Forget gate before its sigmoid.
        i: Input gate before its sigmoid.
        o: Output gate before its sigmoid.
        z: The values that are gated and added; no nonlinearity is applied.
        alpha: None for the forget gate $\sigma(f)$; else the non-negative exponent of
            the reversed gate, a number, a scalar array or one per channel; traced and
            differentiable.
        method, chunk_size: Static; see `linear_recurrence`.
        initial_state: The state before the first step.
        return_state: Static; True returns a `RecurrentResult` whose state is $h_T$. A
            decoding step is a call with T = 1 and the state of the last one.

    Returns:
        The outputs, in the dtype of `f`; the state is float32 (float64 if an argument
        is float64).

    Raises:
        TypeError: An array is not floating, or `chunk_size` is not a Python int.
        ValueError: Shapes do not fit together, or an option is out of range.

    Derivatives: forward and reverse mode, any order.
    Cost: as `linear_recurrence` of `z`.
    Source: "Understanding the differences in Foundation Models: Attention, State Space
        Models, and Recurrent Neural Networks". The convolution in front of the gates
        and the gated output projection of its experiments are left to the caller.

    Example:
        >>> zero, z = jnp.zeros((3, 1)), jnp.ones((3, 1))
        >>> print(softlib.recurrent.quasi_lstm(zero, zero, zero, z)[:, 0])
        [0.25   0.375  0.4375]
    """
    function = "quasi_lstm"
    exponent = _exponent(function, f, alpha)
    _require_gates(function, f, i=i, o=o, z=z)
    batch_and_channels = (*f.shape[:-2], f.shape[-1])
    _checks.require_floating(function, initial_state=initial_state)
    _checks.require_shape(
        function, "initial_state", initial_state, batch_and_channels, "(*batch, D)"
    )
    require_method(function, method, chunk_size)

    dtype = accumulator_dtype(f, i, o, z, exponent, initial_state)
    wide_i, wide_o, wide_z = (array.astype(dtype) for array in (i, o, z))
    found = linear_recurrence(
        jnp.exp(_log_decay(f.astype(dtype), exponent)),
        jax.nn.sigmoid(wide_i) * wide_z,
        initial_state=initial_state,
        axis=-2,
        method=method,
        chunk_size=chunk_size,
        return_state=True,
    )
    output = (jax.nn.sigmoid(wide_o) * found.output).astype(f.dtype)
    return RecurrentResult(output, found.state) if return_state else output


@array_arguments
def quasi_lstm_matrix(
    f: Float[Array, "*batch T D"],
    i: Float[Array, "*batch T D"],
    o: Float[Array, "*batch T D"],
    *,
    alpha: Scalar | Float[Array, " D"] | None = None,
) -> Float[Array, "*batch D T T"]:
    r"""The coefficient of every value in every output of `quasi_lstm`, per channel.

    $K_{ts} = \sigma(o_t)\, \sigma(f_t) \cdots \sigma(f_{s+1})\, \sigma(i_s)$ for
    $s \leq t$, so that channel by channel $y = K z$. For plots and tests.

    Args:
        f: Forget gate before its sigmoid.
        i: Input gate before its sigmoid.
        o: Output gate before its sigmoid.
        alpha: As in `quasi_lstm`.

    Returns:
        The matrices, float32 (float64 if an argument is float64).

    Raises:
        TypeError: An array is not floating.  ValueError: Shapes do not fit together.

    Derivatives: forward and reverse mode, any order.
    Cost: memory and time for T x T numbers per channel.
    Source: "Understanding the differences in Foundation Models: Attention, State Space
        Models, and Recurrent Neural Networks".

    Example:
        >>> zero = jnp.zeros((3, 1))
        >>> print(softlib.recurrent.quasi_lstm_matrix(zero, zero, zero)[0])
        [[0.25   0.     0.    ]
         [0.125  0.25   0.    ]
         [0.0625 0.125  0.25  ]]
    """
    function = "quasi_lstm_matrix"
    exponent = _exponent(function, f, alpha)
    _require_gates(function, f, i=i, o=o)
    dtype = accumulator_dtype(f, i, o, exponent)
    log_decay = jnp.swapaxes(_log_decay(f.astype(dtype), exponent), -1, -2)
    gate = lambda x: jnp.swapaxes(jax.nn.sigmoid(x.astype(dtype)), -1, -2)
    products = jnp.exp(segment_sums(log_decay))
    seen = jnp.tri(f.shape[-2], dtype=bool)
    products = jnp.where(jnp.broadcast_to(seen, products.shape), products, 0)
    return gate(o)[..., :, None] * products * gate(i)[..., None, :]


def _log_decay(f: Array, alpha: Array | None) -> Array:
    """The logarithm of the forget gate, which keeps the digits of gates near 1."""
    if alpha is None:
        return jax.nn.log_sigmoid(f)
    # Not a power of the sigmoid, which may underflow first.
    return -jnp.broadcast_to(alpha.astype(f.dtype), f.shape) * jax.nn.softplus(f)


def _require_gates(function: str, f: Array, **others: Array) -> None:
    _checks.require_floating(function, f=f, **others)
    _checks.require_rank(function, "f", f, 2, "(..., T, D)")
    for name, array in others.items():
        _checks.require_shape(function, name, array, f.shape, "the shape of `f`")


def _exponent(function: str, f: Array, alpha: Scalar | Array | None) -> Array | None:
    if alpha is None:
        return None
    if isinstance(alpha, int | float):
        _checks.require_scalar(function, "alpha", alpha, 0, math.inf)
        return jnp.asarray(alpha, f.dtype)
    _checks.require_floating(function, alpha=alpha)
    _checks.require_shape_in(
        function, "alpha", alpha, [(), f.shape[-1:]], "a scalar or one per channel"
    )
    return alpha
