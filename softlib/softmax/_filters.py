"""Filters of a sampler: logits of -inf for what must not be drawn."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from softlib import _checks as checks
from softlib.typing import PerRow

from ._entries import Axis, Entries
from ._top_k import first_of_largest


def top_k_logits(
    x: Float[Array, "*shape"],
    k: PerRow,
    axis: Axis = -1,
    *,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*shape"]:
    r"""The $k$ largest logits of a row as they are, -inf elsewhere.

    Filters compose: softmax of filtered logits is renormalised, so that
    `min_p_logits(top_p_logits(top_k_logits(x / temperature, 30), 0.95), 0.02)` filters
    as samplers of language models do, each on what the one before left.

    Args:
        x: Logits. -inf never counts; NaN or +inf make their row NaN.
        k: An int (static), at least 1, or an integer array with a value per row
            (traced), of which those below 1 count as 1. Above the number of entries
            that count nothing is filtered.
        axis: Static; the axis or axes of a row, None for all.
        where: True for the entries that count; broadcasts to `x`. Others may hold
            anything, NaN included.

    Returns:
        Logits in the dtype of `x`. Of equal entries those with the lower index are kept
        first, so that exactly $k$ remain. A row without an entry that counts is -inf.

    Raises:
        TypeError: `x` is no floating array, `where` is not boolean, or `k` is neither
            an int nor an integer array.
        ValueError: `axis` is no axis of `x`, `where` or `k` does not broadcast, or `k`
            is a number below 1.

    Derivatives: 1 where an entry is kept, 0 elsewhere; any order.
    Cost: a partial sort for a static `k`, a sort for a traced one.

    Example:
        >>> print(softlib.softmax.top_k_logits(jnp.array([1.0, 3.0, 1.0, 1.0]), 2))
        [  1.   3. -inf -inf]
    """
    function = "top_k_logits"
    filtered = _Filtered(function, x, axis, where)
    if isinstance(k, int):
        checks.require_positive_integer(function, "k", k)
    else:
        k = jnp.asarray(k)
        if not jnp.issubdtype(k.dtype, jnp.integer):
            raise TypeError(
                f"{function}: `k` must be an int or an integer array, got {k.dtype}."
            )
        k = jnp.maximum(filtered.per_row("k", k), 1)
    return filtered.keep(first_of_largest(filtered.scores, k))


def top_p_logits(
    x: Float[Array, "*shape"],
    p: PerRow,
    axis: Axis = -1,
    *,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*shape"]:
    r"""The largest logits that together have the probability $p$, -inf elsewhere.

    Nucleus sampling: an entry is kept if the entries before it, from the most probable
    on, have less than $p$ together.

    Args:
        x: Logits. -inf never counts; NaN or +inf make their row NaN.
        p: A number (static) in $[0, 1]$ or an array with a value per row (traced). At
            most 0 keeps the best entry only, at least 1 keeps all.
        axis: Static; the axis or axes of a row, None for all.
        where: True for the entries that count; broadcasts to `x`. Others may hold
            anything, NaN included.

    Returns:
        Logits in the dtype of `x`. Of equal entries those with the lower index come
        first. At least one entry of a row is kept, if any counts. A row with NaN for
        `p` is NaN.

    Raises:
        TypeError: `x` or `p` is not floating, or `where` is not boolean.
        ValueError: `axis` is no axis of `x`, `where` or `p` does not broadcast, or `p`
            is a number outside $[0, 1]$.

    Derivatives: 1 where an entry is kept, 0 elsewhere; any order. None by `p`.
    Cost: a sort. Probabilities are summed in float32, over 150,000 entries to about
        1e-5, whatever the dtype of `x`.
    Source: "The Curious Case of Neural Text Degeneration".

    Example:
        >>> x = jnp.log(jnp.array([0.5, 0.125, 0.25, 0.125]))
        >>> print(softlib.softmax.top_p_logits(x, 0.7) > -jnp.inf)
        [ True False  True False]
    """
    function = "top_p_logits"
    filtered = _Filtered(function, x, axis, where)
    share = filtered.share("p", p)
    scores = filtered.scores
    if scores.shape[-1] == 0:
        return x
    # Sorted by the largest first; a stable sort leaves equal entries in order.
    order = jnp.argsort(-scores, axis=-1, stable=True)
    ordered = jnp.take_along_axis(scores, order, axis=-1)
    weights = jnp.exp(ordered - jnp.where(filtered.any, ordered[..., :1], 0))
    until = jnp.cumsum(weights, axis=-1)
    # Rounding of the sum never drops an entry when all are asked for.
    later = (until[..., :-1] < share * until[..., -1:]) | (share >= 1)
    taken = jnp.concatenate([filtered.any, later], axis=-1)
    # Entries that are taken come first: their number says which, ties included.
    return filtered.keep(first_of_largest(scores, taken.sum(-1)), bad=jnp.isnan(share))


def min_p_logits(
    x: Float[Array, "*shape"],
    p: PerRow,
    axis: Axis = -1,
    *,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*shape"]:
    r"""The logits whose probability is at least $p$ times the largest, -inf elsewhere.

    Args:
        x: Logits. -inf never counts; NaN or +inf make their row NaN.
        p: A number (static) in $[0, 1]$ or an array with a value per row (traced). At
            most 0 keeps all; at least 1 keeps the entries that equal the largest.
        axis: Static; the axis or axes of a row, None for all.
        where: True for the entries that count; broadcasts to `x`. Others may hold
            anything, NaN included.

    Returns:
        Logits in the dtype of `x`; the largest are always kept, and so is an entry at
        the bound. A row with NaN for `p` is NaN.

    Raises:
        TypeError: `x` or `p` is not floating, or `where` is not boolean.
        ValueError: `axis` is no axis of `x`, `where` or `p` does not broadcast, or `p`
            is a number outside $[0, 1]$.

    Derivatives: 1 where an entry is kept, 0 elsewhere; any order. None by `p`.
    Cost: two passes over `x`: the difference to the largest logit is compared with
        $\log p$.
    Source: "Turning Up the Heat: Min-p Sampling for Creative and Coherent LLM Outputs".

    Example:
        >>> print(softlib.softmax.min_p_logits(jnp.array([0.0, -1.0, -4.0]), 0.1))
        [  0.  -1. -inf]
    """
    filtered = _Filtered("min_p_logits", x, axis, where)
    share = filtered.share("p", p)
    scores = filtered.scores
    top = scores.max(-1, keepdims=True, initial=-jnp.inf)
    below = scores - jnp.where(filtered.any, top, 0)
    # -inf for 0: everything is kept.
    kept = below >= jnp.log(jnp.clip(share, 0, 1))
    return filtered.keep(kept & (scores > -jnp.inf), bad=jnp.isnan(share))


class _Filtered:
    """Rows of logits, and the logits with what was not kept at -inf."""

    def __init__(self, function: str, x: Array, axis: Axis, where: Array | None):
        self._x, self._function = x, function
        self._entries = entries = Entries.of(function, x, axis, where)
        scores = lax.stop_gradient(entries.rows(entries.scores))
        bad = jnp.isnan(scores) | (scores == jnp.inf)
        self._bad = bad.any(-1, keepdims=True)
        self.scores = jnp.where(self._bad, 0, scores)
        self.any = (self.scores > -jnp.inf).any(-1, keepdims=True)

    def per_row(self, name: str, value: Array) -> Array:
        rows = self.scores.shape[:-1]
        why = "a number, or one value per row"
        checks.require_broadcastable(self._function, name, value, rows, why)
        value = value.reshape((1,) * (len(rows) - value.ndim) + value.shape)
        return jnp.broadcast_to(value, rows)

    def share(self, name: str, value: PerRow) -> Array:
        """(*rows, 1), in the dtype of the sums."""
        if isinstance(value, int | float):
            checks.require_scalar(self._function, name, value, 0, 1)
            return jnp.asarray(value, self.scores.dtype)
        value = jnp.asarray(value)
        checks.require_floating(self._function, **{name: value})
        value = lax.stop_gradient(self.per_row(name, value)[..., None])
        return value.astype(self.scores.dtype)

    def keep(self, kept: Array, bad: Array | bool = False) -> Array:
        bad = jnp.broadcast_to(self._bad | bad, self.scores.shape)
        kept, bad = self._entries.unrows(kept), self._entries.unrows(bad)
        return jnp.where(bad, jnp.nan, jnp.where(kept, self._x, -jnp.inf))
