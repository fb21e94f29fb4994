r"""StableMax: a map to probabilities whose weights grow linearly, not exponentially."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from softlib._array_arguments import array_arguments
from softlib._stable_weight import distance, log_stable_weight, stable_weight

from ._entries import Axis, Entries, moderating


@array_arguments
def stablemax(
    x: Float[Array, "*shape"],
    axis: Axis = -1,
    *,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*shape"]:
    r"""$s(x_i) / \sum_j s(x_j)$, with $s(x) = x + 1$ from 0 on and $1 / (1 - x)$ below.

    A softmax of $\mathrm{sign}(x) \log(1 + |x|)$: it is the largest for the largest
    score, but a score has to be a thousand times as large, not 7 more, to be a thousand
    times as probable, so that float32 does not round the other probabilities away. It
    is not invariant to a shift of the scores.

    Args:
        x: Scores. -inf never counts; NaN or +inf make their row NaN.
        axis: Static; the axis or axes of a row, None for all.
        where: True for the entries that count, broadcasts; others may hold anything.

    Returns:
        Probabilities in the dtype of `x`, 0 where an entry does not count.

    Raises:
        TypeError: `x` is no floating array, or `where` is not boolean.
        ValueError: `axis` is no axis of `x`, or `where` does not broadcast.

    Derivatives: forward and reverse mode, any order, from the result; that of $\log s$
        is $1 / (1 + |x|)$, 1 at 0. The second derivative of $s$ jumps from 2 to 0 at 0,
        where it is 0.
    Cost: two passes over `x`, no maximum; the result is kept for the backward pass.
    Source: "Grokking at the Edge of Numerical Stability".

    Example:
        >>> print(softlib.softmax.stablemax(jnp.array([2.0, 0.0, -jnp.inf])))
        [0.75 0.25 0.  ]
    """
    entries = Entries.of("stablemax", x, axis, where)
    return entries.result(_stablemax(entries.axes, entries.scores))


@array_arguments
def log_stablemax(
    x: Float[Array, "*shape"],
    axis: Axis = -1,
    *,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*shape"]:
    r"""$\log s(x_i) - \log \sum_j s(x_j)$, the logarithm of `stablemax`.

    With $\log s(x) = \mathrm{sign}(x) \log(1 + |x|)$. For the loss of a label use
    `softlib.losses.stablemax_cross_entropy`, which does not round to 0 where the label
    has nearly all the probability.

    Args:
        x, axis, where: As in `stablemax`.

    Returns:
        Log-probabilities in the dtype of `x`, -inf where an entry does not count.

    Raises:
        TypeError, ValueError: As `stablemax`.

    Derivatives: forward and reverse mode, any order, as those of `stablemax`; 0 where
        an entry does not count.
    Cost: two passes over `x`; the scores are kept for the backward pass.
    Source: "Grokking at the Edge of Numerical Stability". Deviation: nothing is added
        to $1 - x$, which is never below 1.

    Example:
        >>> log_p = softlib.softmax.log_stablemax(jnp.array([2.0, 0.0, -jnp.inf]))
        >>> print(log_p.round(4))
        [-0.2877 -1.3863    -inf]
    """
    entries = Entries.of("log_stablemax", x, axis, where)
    return entries.result(_log_stablemax(entries.axes, entries.scores))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _stablemax(axes: tuple[int, ...], x: Array) -> Array:
    s = stable_weight(x)
    s = s * moderating(s.max(axes, keepdims=True, initial=0))
    return s / _positive(s.sum(axes, keepdims=True))


@_stablemax.defjvp
def _(axes, primals, tangents):
    (x,), (dx,) = primals, tangents
    p = _stablemax(axes, x)
    # Not through s: the square of its sum overflows.
    dlog = dx / distance(x)
    return p, p * (dlog - (p * dlog).sum(axes, keepdims=True))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _log_stablemax(axes: tuple[int, ...], x: Array) -> Array:
    s = stable_weight(x)
    factor = moderating(s.max(axes, keepdims=True, initial=0))
    total = (s * factor).sum(axes, keepdims=True)
    return log_stable_weight(x) - (jnp.log(_positive(total)) - jnp.log(factor))


@_log_stablemax.defjvp
def _(axes, primals, tangents):
    (x,), (dx,) = primals, tangents
    dlog = dx / distance(x)
    p = _stablemax(axes, x)
    change = dlog - (p * dlog).sum(axes, keepdims=True)
    return _log_stablemax(axes, x), jnp.where(x == -jnp.inf, 0, change)


def _positive(total: Array) -> Array:
    """The sum of s as a divisor: 1 in a row without entries, NaN if it overflowed."""
    return jnp.where(total == jnp.inf, jnp.nan, jnp.where(total == 0, 1, total))
