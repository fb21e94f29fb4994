"""Gates that move from all experts to few: by a temperature, then by a threshold."""

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._nan import nan_where
from softlib._threshold import first_of_largest
from softlib.typing import PerRow

from ._entries import Axis, Entries
from ._softmax import softmax


@array_arguments
def dense_to_sparse_gate(
    x: Float[Array, "*shape"],
    axis: Axis = -1,
    *,
    temperature: PerRow,
    bias: Float[Array, "..."] | None = None,
    activation: Callable[[Array], Array] | None = None,
    bias_scaled_by_temperature: bool = True,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*shape"]:
    r"""Softmax of $(\sigma(x) + b) / \tau$: all experts at first, one as $\tau$ falls.

    Without an `activation` $\sigma$ the gate does not change when `x`, `bias` and
    `temperature` are all multiplied by one number. A temperature that is learned has no
    value of its own then, and estimates of it hardly improve with more data. A bounded,
    curved activation such as `jax.nn.sigmoid` before the bias removes that freedom;
    over inputs so narrow that it looks like a line there, it does not help.

    Args:
        x: Scores of the experts. -inf never counts; NaN or +inf make their row NaN.
        temperature: $\tau > 0$: a number (static), or an array with a value per row
            (traced, differentiable; NaN unless positive). No value is too small: the
            quotients are taken relative to the largest score.
        axis: Static; the axis or axes of a row, None for all.
        bias: Added after the activation; broadcasts to `x`; differentiable. An entry
            with the bias -inf gets the weight 0.
        activation: Static; applied to `x` element by element, None for the identity.
        bias_scaled_by_temperature: Static; without it $\sigma(x) / \tau + b$.
        where: True for the entries that count, broadcasts; others may hold anything.

    Returns:
        Weights in the dtype of `x`, 0 where an entry does not count. A row without an
        entry that counts is 0.

    Raises:
        TypeError: An array argument has the wrong kind of dtype.
        ValueError: `axis` is no axis of `x`, an argument does not broadcast, or the
            temperature is a number that is not positive.

    Derivatives: forward and reverse mode, any order that `activation` has, with respect
        to `x`, `temperature` and `bias`. They vanish as the gate becomes certain.
    Cost: a few passes over `x`.
    Source: "Is Temperature Sample Efficient for Softmax Gaussian Mixture of Experts?".
        That the bias is divided by the temperature is a choice, hence the option.

    Example:
        >>> gate = softlib.softmax.dense_to_sparse_gate
        >>> x = jnp.array([0.0, 1.0])
        >>> print(gate(x, temperature=1e6).round(3), gate(x, temperature=1e-3))
        [0.5 0.5] [0. 1.]
    """
    function = "dense_to_sparse_gate"
    entries = Entries.of(function, x, axis, where)
    tau = temperature_of_rows(function, entries, temperature)
    counts = entries.scores != -jnp.inf
    scores = jnp.where(counts, entries.scores, 0)
    bad = jnp.isnan(scores) | (scores == jnp.inf)  # before an activation bounds it
    if activation is not None:
        scores = activation(scores)
        checks.require_shape(function, "activation(x)", scores, x.shape, "that of `x`")
    if bias is not None:
        checks.require_floating(function, bias=bias)
        why = "the shape of `x`"
        checks.require_broadcastable(function, "bias", bias, x.shape, why)
        bias = bias.reshape((1,) * (x.ndim - bias.ndim) + bias.shape)
        bias = jnp.where(counts, bias.astype(scores.dtype), 0)
        scores = scores + (bias if bias_scaled_by_temperature else tau * bias)
    scores = jnp.where(counts, nan_where(bad, scores), -jnp.inf)
    return entries.result(softmax(tempered(entries, scores, tau), entries.axes))


@array_arguments
def sparsify_gates(
    gates: Float[Array, "*shape"],
    axis: Axis = -1,
    *,
    threshold: PerRow | None = None,
    top_k: int | None = None,
    renormalize: bool = True,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*shape"]:
    r"""Gates that are large enough, divided by their sum; 0 elsewhere.

    For the last part of a training that started dense: when few gates are above the
    threshold, only these experts need to be computed.

    Args:
        gates: Weights, not negative, as a gate returns them; NaN makes its row NaN.
        axis: Static; the axis or axes of a row, None for all.
        threshold: Gates below it are cut, one that equals it stays: a number (static)
            in $[0, 1]$, or an array with a value per row (traced).
        top_k: Static; at most so many gates stay, of equal ones those with the lower
            index. With a threshold too, both must hold.
        renormalize: Static; whether what stays is divided by its sum.
        where: True for the gates that count; broadcasts to `gates`. Others may hold
            anything, NaN included.

    Returns:
        Gates in the dtype of `gates`. The largest of a row stays in any case; a row of
        zeros stays one.

    Raises:
        TypeError: `gates` or an array `threshold` is not floating, `where` is not
            boolean, or `top_k` is no int.
        ValueError: Neither `threshold` nor `top_k` is given, one of them is out of
            range, `axis` is no axis of `gates`, or an argument does not broadcast.

    Derivatives: forward and reverse mode, any order, for the selection as it is; a gate
        that was cut has none.
    Cost: a few passes over `gates`, and a partial sort with `top_k`.
    Source: "Is Temperature Sample Efficient for Softmax Gaussian Mixture of Experts?",
        on the training of dense-to-sparse gates.

    Example:
        >>> gates = jnp.array([0.375, 0.125, 0.375, 0.125])
        >>> print(softlib.softmax.sparsify_gates(gates, threshold=0.2))
        [0.5 0.  0.5 0. ]
    """
    function = "sparsify_gates"
    if threshold is None and top_k is None:
        raise ValueError(
            f"{function}: `threshold` or `top_k` must be given, got None for both."
        )
    entries = Entries.of(function, gates, axis, where, "gates")
    values = (
        entries.x if entries.where is None else jnp.where(entries.where, entries.x, 0)
    )
    values = entries.rows(values)
    bad = jnp.isnan(values).any(-1, keepdims=True)
    sized = jnp.where(bad, 0, values)
    sized = jnp.where(sized > 0, sized, -jnp.inf)  # 0 is never selected
    kept = sized > -jnp.inf
    if top_k is not None:
        checks.require_positive_integer(function, "top_k", top_k)
        kept = kept & first_of_largest(sized, top_k)
    if threshold is not None:
        if isinstance(threshold, int | float):
            checks.require_scalar(function, "threshold", threshold, 0, 1)
            bound = jnp.asarray(threshold, values.dtype)
        else:
            bound = jnp.asarray(threshold)
            checks.require_floating(function, threshold=bound)
            rows = values.shape[:-1]
            why = "a number, or one value per row"
            checks.require_broadcastable(function, "threshold", bound, rows, why)
            bound = bound.reshape((1,) * (len(rows) - bound.ndim) + bound.shape)
            bound = bound[..., None].astype(values.dtype)
        kept = kept & ((values >= bound) | first_of_largest(sized, 1))
    result = jnp.where(kept, values, 0)
    if renormalize:
        total = result.sum(-1, keepdims=True)
        result = result / jnp.where(total > 0, total, 1)
    return entries.result(entries.unrows(jnp.where(bad, jnp.nan, result)))


def temperature_schedule(
    initial: float,
    final: float,
    *,
    num_steps: int,
    kind: Literal["exponential", "linear"] = "exponential",
) -> Callable[[ArrayLike], Float[Array, "..."]]:
    r"""A temperature for each step of a training, from `initial` to `final`.

    $\tau_0 (\tau_1 / \tau_0)^{s}$ or $\tau_0 + s (\tau_1 - \tau_0)$ with $s$ the step
    divided by `num_steps`, from 0 to 1. What it returns is a schedule as optax has
    them, and needs no optax.

    Args:
        initial: Static, positive.
        final: Static, positive; usually below `initial`.
        num_steps: Static, at least 1: after so many `final` is reached.
        kind: Static; "exponential" falls by the same factor in each step, "linear" by
            the same amount.

    Returns:
        A function of the step, an integer or an array of them (traced); it returns
        float32. Steps below 0 count as 0.

    Raises:
        TypeError: A temperature is no number, or `num_steps` no int.
        ValueError: One of them is not positive, or `kind` is unknown.

    Derivatives: steps are counts and have none.
    Cost: a few operations.
    Source: "Is Temperature Sample Efficient for Softmax Gaussian Mixture of Experts?",
        on annealing.

    Example:
        >>> temperature = softlib.softmax.temperature_schedule(4.0, 1.0, num_steps=2)
        >>> print(temperature(jnp.arange(4)))
        [4. 2. 1. 1.]
    """
    function = "temperature_schedule"
    checks.require_positive_number(function, "initial", initial)
    checks.require_positive_number(function, "final", final)
    checks.require_positive_integer(function, "num_steps", num_steps)
    checks.require_one_of(function, "kind", kind, ("exponential", "linear"))

    def temperature(step: ArrayLike) -> Array:
        share = jnp.clip(jnp.asarray(step) / num_steps, 0, 1).astype(jnp.float32)
        if kind == "linear":
            value = initial * (1 - share) + final * share
        else:
            value = initial * (final / initial) ** share
        return jnp.where(share == 1, jnp.float32(final), value)

    return temperature


def temperature_of_rows(
    function: str, entries: Entries, temperature: PerRow
) -> float | Array:
    """The checked temperature: a number, or an array that broadcasts to the scores."""
    if isinstance(temperature, int | float):
        checks.require_positive_number(function, "temperature", temperature)
        return float(temperature)
    temperature = entries.beside(entries.per_row(function, "temperature", temperature))
    return jnp.where(temperature > 0, temperature, jnp.nan)


def tempered(entries: Entries, scores: Array, tau: float | Array) -> Array:
    """`scores / tau` minus their largest of the row, which softmax does not see.

    At no temperature do the quotients or their derivatives overflow.
    """
    counts = scores != -jnp.inf
    scores = jnp.where(counts, scores, 0)
    top = jnp.where(counts, scores, -jnp.inf)
    top = lax.stop_gradient(top.max(entries.axes, keepdims=True, initial=-jnp.inf))
    below = scores - jnp.where(top == -jnp.inf, 0, top)
    # The exponential of less is 0. (NaN is not less.)
    least = math.log(jnp.finfo(scores.dtype).smallest_subnormal) - 1
    near = counts & ~(below < least * tau)
    tau = jnp.asarray(tau, scores.dtype)
    return jnp.where(near, _quotient(jnp.where(near, below, 0), tau), -jnp.inf)


@jax.custom_jvp
def _quotient(x: Array, tau: Array) -> Array:
    return x / tau


@_quotient.defjvp
def _(primals, tangents):
    (x, tau), (dx, dtau) = primals, tangents
    # Never by the square of the temperature, which may be 0.
    y = _quotient(x, tau)
    return y, (dx - y * dtau) / tau
