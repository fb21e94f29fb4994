"""Soft top-k: independent sigmoids with one threshold, so that a row sums to k."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._compiled_once import compiled_once
from softlib._threshold import kth_largest, number_of
from softlib.typing import PerRow

from ._entries import Axis, Entries
from ._softmax import softmax


@array_arguments
def soft_top_k(
    x: Float[Array, "*shape"],
    axis: Axis = -1,
    *,
    k: PerRow,
    alpha: PerRow = 1.0,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*shape"]:
    r"""Numbers in $(0, 1)$ that sum to $k$ over a row and grow with the entries.

    $$z_i = \sigma(\alpha (x_i + t)), \qquad t \text{ such that } \sum_i z_i = k .$$

    A differentiable stand-in for "is entry $i$ among the $k$ largest", which it becomes
    as $\alpha$ grows; equal entries share equally. Unlike $k$ times softmax no $z_i$
    exceeds 1, so that $k$ entries can all be chosen for certain.

    Args:
        x: Scores. -inf never counts; NaN or +inf make their row NaN.
        k: A number (static), or an array with a value per row (traced); positive, not
            necessarily whole. From the number of entries that count on, all of these
            are 1; an array may hold 0 or less, which makes its row 0.
        axis: Static; the axis or axes of a row, None for all.
        alpha: Sharpness, positive, like an inverse temperature: a number (static), or
            an array with a value per row (traced). NaN unless positive and finite.
        where: True for the entries that count, broadcasts; others may hold anything.

    Returns:
        In the dtype of `x`; 0 where an entry does not count.

    Raises:
        TypeError: `x`, or an array `k` or `alpha`, is not floating, or `where` is not
            boolean.
        ValueError: `axis` is no axis of `x`, an argument does not broadcast, or `k` or
            `alpha` is a number that is not positive.

    Derivatives: forward and reverse mode, any order, with respect to `x`, `k` and
        `alpha`; from the implicit function theorem, not through the search: with
        $v_i = z_i (1 - z_i)$ the Jacobian by $x$ is $\alpha (\operatorname{diag}(v) -
        v v^\top / \sum v)$, symmetric with rows that sum to 0. Where all of `k` is
        certain within the precision (all $v$ are 0), that by `k` is 0.
    Cost: five to ten passes over `x`, by Newton's method with a bracket; up to 60 where
        the sigmoids are steps (twice as many in float64). Backward three.
    Source: "Dual-Encoders for Extreme Multi-Label Classification". The bracket of the
        search follows from $k$ and the length of the row, so that no sum over many
        small terms falls outside; $k$ may reach the length.

    Example:
        >>> x = jnp.array([3.0, 1.0, 1.0, -jnp.inf])
        >>> print(softlib.softmax.soft_top_k(x, k=2, alpha=100.0).round(3))
        [1.  0.5 0.5 0. ]
    """
    entries, solved = _solve("soft_top_k", x, k, axis, alpha, where)
    z = jnp.where(solved.inside, jax.nn.sigmoid(solved.u), solved.whole)
    return entries.result(entries.unrows(jnp.where(solved.bad, jnp.nan, z)))


@array_arguments
def log_soft_top_k(
    x: Float[Array, "*shape"],
    axis: Axis = -1,
    *,
    k: PerRow,
    alpha: PerRow = 1.0,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*shape"]:
    r"""The logarithm of `soft_top_k`, exact where that rounds to 0.

    $\log z_i = -\log(1 + e^{-\alpha (x_i + t)})$, for losses.

    Args:
        x, k, axis, alpha, where: As in `soft_top_k`.

    Returns:
        In the dtype of `x`; -inf where an entry does not count.

    Raises:
        TypeError, ValueError: As `soft_top_k`.

    Derivatives: as `soft_top_k`, with slopes that do not vanish as $z_i$ falls to 0.
    Cost: as `soft_top_k`.
    Source: "Dual-Encoders for Extreme Multi-Label Classification".

    Example:
        >>> x = jnp.array([400.0, 0.0])
        >>> print(-softlib.softmax.log_soft_top_k(x, k=1))
        [  0. 200.]
    """
    entries, solved = _solve("log_soft_top_k", x, k, axis, alpha, where)
    log_z = jnp.where(
        solved.inside, jax.nn.log_sigmoid(solved.u), jnp.log(solved.whole)
    )
    return entries.result(entries.unrows(jnp.where(solved.bad, jnp.nan, log_z)))


# Most quick steps, whose sums are inexact where sigmoids saturate; 3 to 5 are usual.
_QUICK = 6


class _Solved(NamedTuple):
    """The arguments of the sigmoids, and the entries that are 0 or 1 instead.

    Attributes:
        u: Arguments of the sigmoids, finite; 0 where not `inside`.
        inside: True where the value is the sigmoid of `u`.
        whole: The value elsewhere, 0 or 1.
        bad: Rows that are NaN.
    """

    u: Array
    inside: Array
    whole: Array
    bad: Array


def _solve(
    function: str, x: Array, k: PerRow, axis: Axis, alpha: PerRow, where: Array | None
) -> tuple[Entries, _Solved]:
    entries = Entries.of(function, x, axis, where)
    scores = entries.rows(entries.scores)
    rank = math.ceil(k) if isinstance(k, int | float) and math.isfinite(k) else None
    k = _per_row(function, "k", k, scores)
    alpha = _per_row(function, "alpha", alpha, scores)
    bad = (jnp.isnan(scores) | (scores == jnp.inf)).any(-1, keepdims=True)
    bad = bad | jnp.isnan(k) | ~((alpha > 0) & (alpha < jnp.inf))
    counts = (scores > -jnp.inf) & ~bad
    number = counts.sum(-1, keepdims=True, dtype=scores.dtype)
    split = (k > 0) & (k < number)  # rows for which there is a threshold
    inside = counts & split
    x = jnp.where(inside, scores, -jnp.inf)
    k_inside = jnp.where(split, k, 0.5)
    anchor = _of_rank(x, jnp.ceil(k_inside) if rank is None else rank)
    u = _sigmoid_arguments(x, k_inside, jnp.where(bad, 1, alpha), anchor)
    whole = (counts & (k >= number)).astype(scores.dtype)
    return entries, _Solved(jnp.where(inside, u, 0), inside, whole, bad)


def _per_row(function: str, name: str, value: PerRow, scores: Array) -> Array:
    """A checked per-row option, (*rows, 1), in the dtype of the scores."""
    if isinstance(value, int | float):
        checks.require_positive_number(function, name, value)
        value = jnp.asarray(value, scores.dtype)
    value = jnp.asarray(value)
    if name == "alpha" or not jnp.issubdtype(value.dtype, jnp.integer):
        checks.require_floating(function, **{name: value})
    rows = scores.shape[:-1]
    why = "a number, or one value per row"
    checks.require_broadcastable(function, name, value, rows, why)
    value = value.reshape((1,) * (len(rows) - value.ndim) + value.shape)
    return jnp.broadcast_to(value, rows)[..., None].astype(scores.dtype)


def _of_rank(x: Array, rank: int | Array) -> Array:
    """The entry of this rank, (*rows, 1); 0 in a row where it is -inf."""
    if x.shape[-1] == 0:
        return jnp.zeros((*x.shape[:-1], 1), x.dtype)
    if not isinstance(rank, int):
        rank = jnp.clip(rank, 1, x.shape[-1]).astype(jnp.int32)
    found = kth_largest(lax.stop_gradient(x), rank)
    return jnp.where(found > -jnp.inf, found, 0)


@jax.custom_jvp
@compiled_once()
def _sigmoid_arguments(x: Array, k: Array, alpha: Array, anchor: Array) -> Array:
    """The `alpha (x + t)` of each row; -inf for entries of -inf, which do not count.

    `anchor` is any number near the threshold; it only affects rounding.
    """
    if x.shape[-1] == 0:
        return x
    number = number_of(x > -jnp.inf).astype(x.dtype)
    # Relative to the entry of rank k, which is near the threshold: so a constant added
    # to all scores does not affect the search.
    y = alpha * (x - anchor)
    # Below `low` no term of the sum reaches k / number, above `high` all do.
    top = y.max(-1, keepdims=True)
    bottom = jnp.where(y > -jnp.inf, y, jnp.inf).min(-1, keepdims=True)
    some = number > 0
    low = jnp.where(some, -top - jnp.log(number / k), 0)
    high = jnp.where(some, -bottom + jnp.log(number / (number - k)), 0)
    t = jnp.clip(jnp.zeros_like(low), low, high)
    # First with quick sums, which cost a third.
    t = _root(lambda t: _quick_step(y + t, k), low, high, t, _QUICK)
    t = _root(lambda t: _newton_step(y + t, k), low, high, t)
    return y + t


def _root(
    step: Callable[[Array], tuple[Array, Array]],
    low: Array,
    high: Array,
    t: Array,
    most: int | None = None,
) -> Array:
    """The root in [low, high] of a rising function, by bracketed Newton steps from t.

    `step(t)` gives Newton's step, and whether the root lies below t, which maintains
    the bracket. A step that leaves the bracket, or is longer than half the one before,
    is replaced by bisection. Finished rows do not change, so that rows do not depend on
    each other.
    """
    eps = jnp.finfo(low.dtype).eps
    most = 4 * jnp.finfo(low.dtype).bits if most is None else most

    def unfinished(state):
        *_, is_open, count = state
        return is_open.any() & (count < most)

    def move(state):
        t, low, high, last, is_open, count = state
        by, below = step(t)
        low, high = jnp.where(below, low, t), jnp.where(below, t, high)
        # The error after a step is about its square plus the rounding of t.
        size = eps * jnp.maximum(1, abs(t))
        near = abs(by) <= jnp.maximum(eps**0.5 / 2, 2 * size)
        inside = (t + by > low) & (t + by < high) & (abs(by) <= last / 2)
        middle = low + (high - low) / 2
        new = jnp.where(inside | near, jnp.clip(t + by, low, high), middle)
        ended = near | (high - low <= size)
        old = (t, *state[1:4])
        moved = (new, low, high, abs(new - t))
        kept = (jnp.where(is_open, b, a) for a, b in zip(old, moved, strict=True))
        return *kept, is_open & ~ended, count + 1

    state = (t, low, high, jnp.full_like(low, jnp.inf), low < high, 0)
    return lax.while_loop(unfinished, move, state)[0]


@_sigmoid_arguments.defjvp
def _(primals, tangents):
    (x, _, alpha, _), (dx, dk, dalpha, _) = primals, tangents
    u = _sigmoid_arguments(*primals)
    counts = x > -jnp.inf
    safe = jnp.where(counts, u, 0)
    log_v = jax.nn.log_sigmoid(safe) + jax.nn.log_sigmoid(-safe)
    log_v = jnp.where(counts, log_v, -jnp.inf)
    share = softmax(log_v)  # v / sum v, also where all v are 0
    du = alpha * dx + safe / alpha * dalpha
    total = jnp.exp(jnp.where(counts, log_v, -jnp.inf)).sum(-1, keepdims=True)
    by_k = jnp.where(total > 0, dk / jnp.where(total > 0, total, 1), 0)
    du = jnp.where(counts, du - (share * du).sum(-1, keepdims=True) + by_k, 0)
    return u, du


def _quick_step(u: Array, k: Array) -> tuple[Array, Array]:
    """`_newton_step`, inexact where sigmoids round to 0 or 1."""
    z = jax.nn.sigmoid(u)
    total = z.sum(-1, keepdims=True)
    slope = total - (z * z).sum(-1, keepdims=True)
    return -jnp.log(total / k) * total / slope, total > k


def _newton_step(u: Array, k: Array) -> tuple[Array, Array]:
    """Newton's step of all `u` for sigmoids that sum to k, and whether it is negative.

    Exact also where all sigmoids round to 0 or 1: each is 0 or 1 plus a small rest, and
    rests are kept relative to the largest of them. The number of ones and the rests of
    either sign give the excess over k, `more`, and the deficit, `less`. The logarithm
    of their ratio is nearly linear, with a slope of at least 1/2.
    """
    far = abs(u)
    near = far.min(-1, keepdims=True)
    near = jnp.where(jnp.isfinite(near), near, 0)
    rest = jnp.exp(near - far)
    rest = rest / (1 + rest * jnp.exp(-near))
    # Negative where the sigmoid rounds to 1.
    rest = jnp.where(u > 0, -rest, rest)
    total = lambda y: y.sum(-1, keepdims=True)
    difference, both = total(rest), total(abs(rest))
    differences, squares = total(rest * abs(rest)), total(rest * rest)
    # Bounded well above the rests, since exp(near) may overflow.
    scale = jnp.exp(jnp.minimum(near, math.log(1e30)))
    whole = scale * (number_of(u > 0).astype(k.dtype) - k)
    # Sums over one sign are (sum ± difference) / 2; the slope of a rest is
    # rest (1 - rest).
    more = (both + difference) / 2 + jnp.maximum(whole, 0)
    less = (both - difference) / 2 + jnp.maximum(-whole, 0)
    unscaled = jnp.exp(-near)
    rising = (both + difference - unscaled * (squares + differences)) / 2
    falling = (both - difference - unscaled * (squares - differences)) / 2
    slope = rising / more + falling / less
    return -jnp.log(more / less) / slope, whole + difference > 0
