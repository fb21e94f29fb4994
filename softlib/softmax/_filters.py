"""Filters of a sampler: logits of -inf for what must not be drawn."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._compiled_once import compiled_once
from softlib._nan import nan_where
from softlib._threshold import cut, first_of_largest, is_bad, number_of, threshold
from softlib.typing import PerRow

from ._entries import Axis, Entries


@array_arguments
def top_k_logits(
    x: Float[Array, "*shape"],
    axis: Axis = -1,
    *,
    k: PerRow,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*shape"]:
    r"""The $k$ largest logits of a row as they are, -inf elsewhere.

    Filters compose: softmax of filtered logits is renormalised, so that
    `min_p_logits(top_p_logits(top_k_logits(x / temperature, k=30), p=0.95), p=0.02)`
    filters as samplers of language models do, each on what the one before left.

    Args:
        x: Logits. -inf never counts; NaN or +inf make their row NaN.
        k: An int (static), at least 1, or an integer array with a value per row
            (traced), of which those below 1 count as 1. Above the number of entries
            that count nothing is filtered.
        axis: Static; the axis or axes of a row, None for all.
        where: True for the entries that count, broadcasts; others may hold anything.

    Returns:
        Logits in the dtype of `x`. Of equal entries those with the lower index are kept
        first, so that exactly $k$ remain. A row without an entry that counts is -inf.

    Raises:
        TypeError: `x` is no floating array, `where` is not boolean, or `k` is neither
            an int nor an integer array.
        ValueError: `axis` is no axis of `x`, `where` or `k` does not broadcast, or `k`
            is a number below 1.

    Derivatives: 1 where an entry is kept, 0 elsewhere; any order.
    Cost: a partial sort for a static `k` up to 128, else 32 passes over `x` (64 for
        float64).

    Example:
        >>> print(softlib.softmax.top_k_logits(jnp.array([1.0, 3.0, 1.0, 1.0]), k=2))
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


@array_arguments
def top_p_logits(
    x: Float[Array, "*shape"],
    axis: Axis = -1,
    *,
    p: PerRow,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*shape"]:
    r"""The largest logits that together have the probability $p$, -inf elsewhere.

    Nucleus sampling: an entry is kept if the entries before it, from the most probable
    on, have less than $p$ together.

    Args:
        x, axis, where: As in `top_k_logits`.
        p: A number (static) in $[0, 1]$ or an array with a value per row (traced). At
            most 0 keeps the best entry only, at least 1 keeps all.

    Returns:
        Logits in the dtype of `x`. Of equal entries those with the lower index come
        first. At least one entry of a row is kept, if any counts. A row with NaN for
        `p` is NaN.

    Raises:
        TypeError: `x` or `p` is not floating, or `where` is not boolean.
        ValueError: `axis` is no axis of `x`, `where` or `p` does not broadcast, or `p`
            is a number outside $[0, 1]$.

    Derivatives: 1 where an entry is kept, 0 elsewhere; any order. None by `p`.
    Cost: 32 passes over `x` (64 for float64), where a sort takes several times as long.
        Probabilities are summed in float32, over 150,000 entries to about 1e-5,
        whatever the dtype of `x`.
    Source: "The Curious Case of Neural Text Degeneration".

    Example:
        >>> x = jnp.log(jnp.array([0.5, 0.125, 0.25, 0.125]))
        >>> print(softlib.softmax.top_p_logits(x, p=0.7) > -jnp.inf)
        [ True False  True False]
    """
    function = "top_p_logits"
    filtered = _Filtered(function, x, axis, where)
    share = filtered.share("p", p)
    scores = filtered.scores
    if scores.shape[-1] == 0:
        return x
    kept = _of_weight(scores, filtered.top, share)
    return filtered.keep(kept, bad=jnp.isnan(share))


@compiled_once()
def _of_weight(
    scores: Float[Array, "*rows V"], top: Array, share: Array
) -> Bool[Array, "*rows V"]:
    """True for the fewest largest entries whose weights add up to the share."""
    weights = jnp.exp(scores - top)
    weight = lambda kept: jnp.where(kept, weights, 0).sum(-1, keepdims=True)
    # At least the best entry is kept.
    wanted = share * weights.sum(-1, keepdims=True)
    wanted = jnp.maximum(wanted, jnp.finfo(weights.dtype).tiny)
    least = threshold(scores, lambda kept: weight(kept) >= wanted)
    # With a share of 1, rounding of the sum must not drop an entry.
    least = jnp.where(share >= 1, -jnp.inf, least)

    def room(above: Array, equal: Array) -> Array:
        """Number of the equal entries that are needed."""
        each = jnp.where(equal, weights, 0).max(-1, keepdims=True)
        missing = (wanted - weight(above)) / jnp.where(each > 0, each, 1)
        return jnp.clip(jnp.ceil(missing), 1, scores.shape[-1]).astype(jnp.int32)

    crowded = number_of(scores == least) > 1
    last = jnp.where(crowded, jnp.int32(-1), scores.shape[-1])
    return cut(scores, least, last, crowded, room).kept(scores)


@array_arguments
def min_p_logits(
    x: Float[Array, "*shape"],
    axis: Axis = -1,
    *,
    p: PerRow,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*shape"]:
    r"""The logits whose probability is at least $p$ times the largest, -inf elsewhere.

    Args:
        x, axis, where: As in `top_k_logits`.
        p: A number (static) in $[0, 1]$ or an array with a value per row (traced). At
            most 0 keeps all; at least 1 keeps the entries that equal the largest.

    Returns:
        Logits in the dtype of `x`; the largest are always kept, and so is an entry at
        the bound. A row with NaN for `p` is NaN.

    Raises:
        TypeError, ValueError: As `top_p_logits`.

    Derivatives: 1 where an entry is kept, 0 elsewhere; any order. None by `p`.
    Cost: two passes over `x`: the difference to the largest logit is compared with
        $\log p$.
    Source: "Turning Up the Heat: Min-p Sampling for Creative and Coherent LLM Outputs".

    Example:
        >>> x = jnp.array([0.0, -1.0, -4.0])
        >>> print(softlib.softmax.min_p_logits(x, p=0.1))
        [  0.  -1. -inf]
    """
    filtered = _Filtered("min_p_logits", x, axis, where)
    share = filtered.share("p", p)
    scores = filtered.scores
    below = scores - filtered.top
    # -inf for 0: everything is kept.
    kept = below >= jnp.log(jnp.clip(share, 0, 1))
    return filtered.keep(kept & (scores > -jnp.inf), bad=jnp.isnan(share))


class _Filtered:
    """Rows of logits, and the logits with -inf for entries that are not kept."""

    def __init__(self, function: str, x: Array, axis: Axis, where: Array | None):
        self._x, self._function = x, function
        self._entries = entries = Entries.of(function, x, axis, where)
        self.scores = lax.stop_gradient(entries.rows(entries.scores))
        self._bad = is_bad(self.scores)

    @property
    def top(self) -> Array:
        """The largest score, (*rows, 1); 0 if none counts."""
        top = self.scores.max(-1, keepdims=True, initial=-jnp.inf)
        return jnp.where(top > -jnp.inf, top, 0)

    def per_row(self, name: str, value: Array) -> Array:
        rows = self.scores.shape[:-1]
        why = "a number, or one value per row"
        checks.require_broadcastable(self._function, name, value, rows, why)
        value = value.reshape((1,) * (len(rows) - value.ndim) + value.shape)
        return jnp.broadcast_to(value, rows)

    def share(self, name: str, value: PerRow) -> Array:
        """The checked share, (*rows, 1), in the dtype of the sums."""
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
        return nan_where(bad, jnp.where(kept, self._x, -jnp.inf))
