"""The gated recurrent unit that resets its state before the product with a kernel."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from softlib import _checks
from softlib._array_arguments import array_arguments
from softlib._compiled_once import compiled_once
from softlib._dtypes import accumulator_dtype
from softlib._sharding import match_varying

from ._linear_recurrence import RecurrentResult


@array_arguments
def gru(
    x: Float[Array, "*batch T D"],
    gate_kernel: Float[Array, "D_and_H two_H"],
    candidate_kernel: Float[Array, "D_and_H H"],
    *,
    gate_bias: Float[Array, " two_H"] | None = None,
    candidate_bias: Float[Array, " H"] | None = None,
    initial_state: Float[Array, "*batch H"] | None = None,
) -> RecurrentResult:
    r"""A gated recurrent unit over a sequence, with the reset before the product.

    $$[r, u] = \sigma([x, h] W_g + b_g), \qquad
      c = \tanh([x, r \odot h] W_c + b_c), \qquad
      h' = u \odot h + (1 - u) \odot c .$$

    The original unit, and that of TensorFlow. cuDNN and the cells of Flax multiply by
    $r$ after the product with the kernel: another function of the same weights. The
    state is not linear in the past, so that steps follow each other; `quasi_lstm` runs
    in parallel.

    Args:
        x: The inputs.
        gate_kernel: $W_g$; rows for the inputs, then for the state; columns for the
            reset gate, then for the update gate.
        candidate_kernel: $W_c$; rows as those of `gate_kernel`.
        gate_bias: $b_g$; None is 0. Ones keep the state at the start of training.
        candidate_bias: $b_c$; None is 0.
        initial_state: The state before the first step; None is 0.

    Returns:
        `RecurrentResult`: the states after every step, in the dtype of `x`, and the
        last, float32 (float64 if an argument is float64).

    Raises:
        TypeError: An argument is not floating.
        ValueError: Shapes do not fit together.

    Derivatives: forward and reverse mode, any order; reverse mode keeps the gates of
        every step.
    Cost: 3 (D + H) H multiplications per step and sequence; those of the inputs are one
        product for all steps.
    Source: "A Neural Network Architecture Combining Gated Recurrent Unit (GRU) and
        Support Vector Machine (SVM) for Intrusion Detection in Network Traffic Data".

    Example:
        >>> x, zero = jnp.ones((3, 1)), jnp.zeros((2, 2))
        >>> found = softlib.recurrent.gru(x, zero, jnp.array([[1.0], [0.0]]))
        >>> print(f"{found.output[0, 0]:.3f} {found.state[0]:.3f}")
        0.381 0.666
    """
    function = "gru"
    given = {"gate_bias": gate_bias, "candidate_bias": candidate_bias}
    _checks.require_floating(
        function, x=x, gate_kernel=gate_kernel, candidate_kernel=candidate_kernel
    )
    _checks.require_floating(function, **given, initial_state=initial_state)
    _checks.require_rank(function, "x", x, 2, "(..., T, D)")
    if candidate_kernel.ndim != 2 or candidate_kernel.shape[0] != (
        x.shape[-1] + candidate_kernel.shape[1]
    ):
        raise ValueError(
            f"{function}: `candidate_kernel` must have shape (D + H, H) for D = "
            f"{x.shape[-1]} inputs, got {candidate_kernel.shape}."
        )
    size = candidate_kernel.shape[1]
    kernel_shape = (x.shape[-1] + size, 2 * size)
    _checks.require_shape(
        function, "gate_kernel", gate_kernel, kernel_shape, "(D + H, 2 H)"
    )
    _checks.require_shape(function, "gate_bias", gate_bias, (2 * size,), "(2 H,)")
    _checks.require_shape(function, "candidate_bias", candidate_bias, (size,), "(H,)")
    state_shape = (*x.shape[:-2], size)
    _checks.require_shape(
        function, "initial_state", initial_state, state_shape, "(*batch, H)"
    )
    dtype = accumulator_dtype(
        x, gate_kernel, candidate_kernel, *given.values(), initial_state
    )
    zeros = jnp.zeros(state_shape, dtype)
    start = zeros if initial_state is None else initial_state.astype(dtype)
    kernels = jnp.concatenate(
        [gate_kernel.astype(dtype), candidate_kernel.astype(dtype)], 1
    )
    bias = jnp.zeros(3 * size, dtype)
    if gate_bias is not None:
        bias = bias.at[: 2 * size].set(gate_bias.astype(dtype))
    if candidate_bias is not None:
        bias = bias.at[2 * size :].set(candidate_bias.astype(dtype))
    states, last = _states(x.astype(dtype), kernels, bias, start)
    return RecurrentResult(states.astype(x.dtype), last)


@compiled_once()
def _states(x: Array, kernels: Array, bias: Array, start: Array) -> tuple[Array, Array]:
    features, size = x.shape[-1], start.shape[-1]
    dot = lambda a, b: jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
    from_input = dot(x, kernels[:features])
    from_input = from_input + jnp.broadcast_to(bias, from_input.shape)
    of_gates, of_candidate = (
        kernels[features:, : 2 * size],
        kernels[features:, 2 * size :],
    )

    def step(h: Array, given: Array) -> tuple[Array, Array]:
        gates = jax.nn.sigmoid(given[..., : 2 * size] + dot(h, of_gates))
        reset, update = gates[..., :size], gates[..., size:]
        candidate = jnp.tanh(given[..., 2 * size :] + dot(reset * h, of_candidate))
        # Not u h + (1 - u) c: the difference of equal numbers is exactly 0.
        h = candidate + update * (h - candidate)
        return h, h

    start, steps = match_varying((start, jnp.moveaxis(from_input, -2, 0)), kernels)
    last, states = lax.scan(step, start, steps)
    return jnp.moveaxis(states, 0, -2), last
