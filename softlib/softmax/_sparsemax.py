r"""Sparsemax and entmax 1.5, and the Newton iteration behind them.

Both are powers of what is above a threshold: with $d = z - \max z$ and a whole n,
$p_i = (c + d_i / n)_+^n$ where $c$ is such that $\sum_i p_i = 1$; n is 1 for sparsemax
and 2 for entmax 1.5. The norm $(\sum_i p_i)^{1/n}$ is a convex and increasing function
of c, so that Newton's iteration from c = 1 falls to the root without ever passing it,
quadratically, and in one step if all scores are equal. Nothing is sorted.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from softlib._array_arguments import array_arguments
from softlib._compiled_once import compiled_once
from softlib._sharding import match_varying

from ._entries import Axis, Entries


class Solution(NamedTuple):
    """Probabilities and the logarithm of the largest before rounding; rows are last.

    The logarithm is not differentiated: the derivatives of its users are known.
    """

    p: Float[Array, "*rows V"]
    log_top: Float[Array, "*rows"]


@array_arguments
def sparsemax(
    x: Float[Array, "*shape"],
    axis: Axis = -1,
    *,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*shape"]:
    r"""The distribution nearest to the scores: $\arg\min_p |p - x|^2$ on the simplex.

    $p_i = \max(0, x_i - \tau)$ with one $\tau$ per row such that $\sum_i p_i = 1$.
    Scores more than 1 below the largest get exactly 0, and often many more do; where
    softmax is smooth everywhere this map is piecewise linear.

    Args:
        x: Scores. -inf never counts; NaN or +inf make their row NaN.
        axis: Static; the axis or axes of a row, None for all.
        where: True for the entries that count; broadcasts to `x`. Others may hold
            anything, NaN included.

    Returns:
        Probabilities in the dtype of `x`, 0 where an entry does not count. A row
        without an entry that counts is 0.

    Raises:
        TypeError: `x` is no floating array, or `where` is not boolean.
        ValueError: `axis` is no axis of `x`, or `where` does not broadcast.

    Derivatives: forward and reverse mode, any order. The Jacobian is
        $\mathrm{diag}(s) - s s^\top / \sum s$ with $s$ the indicator of the support; an
        entry that is 0 has none, at the boundary of the support too.
    Cost: one pass over `x` per step of Newton's iteration, 3 to 12 in practice and at
        most 64 in float32; the result is kept for the backward pass.
    Source: "From Softmax to Sparsemax: A Sparse Model of Attention and Multi-Label
        Classification". The threshold is found by Newton's iteration, not by sorting;
        each step adds what the sum over the support is off, so that no running sums
        cancel.

    Example:
        >>> print(softlib.softmax.sparsemax(jnp.array([1.5, 1.0, 0.25, -jnp.inf])))
        [0.75 0.25 0.   0.  ]
    """
    entries = Entries.of("sparsemax", x, axis, where)
    return of_rows(entries, power_map(1, entries.rows(entries.scores)))


@array_arguments
def entmax15(
    x: Float[Array, "*shape"],
    axis: Axis = -1,
    *,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*shape"]:
    r"""Entmax with $\alpha = 1.5$: between softmax and sparsemax, with a smooth edge.

    $p_i = \max(0, x_i / 2 - \tau)^2$ with one $\tau$ per row such that
    $\sum_i p_i = 1$. Scores more than 2 below the largest get exactly 0.

    Args:
        x: Scores. -inf never counts; NaN or +inf make their row NaN.
        axis: Static; the axis or axes of a row, None for all.
        where: True for the entries that count; broadcasts to `x`. Others may hold
            anything, NaN included.

    Returns:
        Probabilities in the dtype of `x`, 0 where an entry does not count. A row
        without an entry that counts is 0.

    Raises:
        TypeError: `x` is no floating array, or `where` is not boolean.
        ValueError: `axis` is no axis of `x`, or `where` does not broadcast.

    Derivatives: forward and reverse mode, any order where no entry is at the edge of
        the support. The Jacobian is $\mathrm{diag}(s) - s s^\top / \sum s$ with
        $s = \sqrt p$, continuous everywhere.
    Cost: as `sparsemax`.
    Source: "Sparse Sequence-to-Sequence Models", with Newton's iteration for the
        sorting.

    Example:
        >>> print(softlib.softmax.entmax15(jnp.array([2.0, 2.0, -0.5])))
        [0.5 0.5 0. ]
    """
    entries = Entries.of("entmax15", x, axis, where)
    return of_rows(entries, power_map(2, entries.rows(entries.scores)))


@array_arguments
def support_size(
    p: Float[Array, "*shape"],
    axis: Axis = -1,
    *,
    where: Bool[Array, "..."] | None = None,
) -> Int[Array, "..."]:
    r"""How many entries of a row are not 0.

    What a sparse map keeps, $|\{i : p_i \neq 0\}|$.

    Args:
        p: Probabilities, of any map.
        axis: Static; the axis or axes of a row, None for all.
        where: True for the entries that count; broadcasts to `p`.

    Returns:
        int32, in the shape of `p` without `axis`. NaN counts as not 0.

    Raises:
        TypeError: `p` is no floating array, or `where` is not boolean.
        ValueError: `axis` is no axis of `p`, or `where` does not broadcast.

    Derivatives: none; the result is an integer.
    Cost: one pass over `p`.

    Example:
        >>> p = softlib.softmax.sparsemax(jnp.array([1.5, 1.0, 0.25]))
        >>> print(softlib.softmax.support_size(p))
        2
    """
    entries = Entries.of("support_size", p, axis, where, "p")
    counts = p != 0
    if entries.where is not None:
        counts = counts & entries.where
    return counts.sum(entries.axes, dtype=jnp.int32)


def of_rows(entries: Entries, solution: Solution) -> Array:
    return entries.result(entries.unrows(solution.p))


# --------------------------------------------------------------------- rows of a matrix
@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
@compiled_once(0)
def power_map(n: int, z: Float[Array, "*rows V"]) -> Solution:
    """Entmax with alpha = 1 + 1 / n."""
    d = (z - top_score(z)) / n
    c = _root(n, d)
    p = jnp.maximum(c[..., None] + d, 0) ** n
    return Solution(normalized(p), jnp.log(c) * n)


@power_map.defjvp
def _(n, primals, tangents):
    (z,), (dz,) = primals, tangents
    solution = power_map(n, z)
    p = solution.p
    on = p > 0
    # p^(2 - alpha), whose own derivative is infinite at 0.
    slope = on.astype(p.dtype)
    if n > 1:
        slope = jnp.where(on, jnp.where(on, p, 1) ** (1 - 1 / n), 0)
    return solution, Solution(
        through(slope, jnp.where(on, dz, 0)), jnp.zeros_like(solution.log_top)
    )


def through(slope: Array, dz: Array) -> Array:
    """The product (diag(s) - s s^T / sum(s)) dz."""
    total = slope.sum(-1, keepdims=True)
    mean = (slope * dz).sum(-1, keepdims=True) / jnp.where(total == 0, 1, total)
    return slope * (dz - mean)


def top_score(z: Float[Array, "*rows V"]) -> Float[Array, "*rows 1"]:
    """The largest entry, to be subtracted: 0 in an empty row, NaN in a bad one."""
    top = z.max(-1, keepdims=True, initial=-jnp.inf)
    # inf - inf would be NaN for the largest entries only, not for the whole row.
    top = jnp.where(top == jnp.inf, jnp.nan, top)
    return jnp.where(top == -jnp.inf, 0, top)


def normalized(p: Float[Array, "*rows V"]) -> Float[Array, "*rows V"]:
    total = p.sum(-1, keepdims=True)
    return p / jnp.where(total == 0, 1, total)


def _root(n: int, d: Float[Array, "*rows V"]) -> Float[Array, "*rows"]:
    """The c for which the sum of (c + d)_+^n is 1."""
    blocks = cut(d)
    least = max(d.shape[-1], 1) ** (-1 / n)  # of equal scores

    def step(c):
        w = jnp.maximum(c[..., None, None] + blocks, 0)
        slope = w ** (n - 1) if n > 1 else (w > 0).astype(w.dtype)
        total, slopes = sums(w**n, slope)
        excess = total - (1 if n == 1 else total ** (1 - 1 / n))
        # Rounding may pass the root slightly; the next step then goes back up.
        new = jnp.maximum(c - excess / jnp.where(slopes == 0, 1, slopes), least)
        return new, jnp.abs(new - c) > TOLERANCE * jnp.finfo(c.dtype).eps * c

    return iterate(step, jnp.ones_like(row_of(d)), most_steps(d.dtype))


def most_steps(dtype) -> int:
    """Number of Newton steps that suffices for a convex function of any scores.

    Each step divides the product of value and slope by at least 4: from the squared
    length of a row (below 2^64) down to rounding.
    """
    return (64 + jnp.finfo(dtype).nmant) // 2 + 20


def iterate(step, start: Array, most: int) -> Array:
    """Applies `step(value) -> (new value, go on)` to each row until it says False.

    Finished rows do not change, so that rows do not depend on each other.
    """

    def body(state):
        value, active, count = state
        new, more = step(value)
        return jnp.where(active, new, value), active & more, count + 1

    def unfinished(state):
        _, active, count = state
        return active.any() & (count < most)

    state = match_varying((start, jnp.ones_like(start, bool)), start)
    value, *_ = lax.while_loop(unfinished, body, (*state, 0))
    return jnp.asarray(value)


def row_of(d: Float[Array, "*rows V"]) -> Float[Array, "*rows"]:
    """An array with one entry per row and the rows' sharding; its values are unused."""
    return d.max(-1, initial=0)


TOLERANCE = 8  # in ulps, about the error of the sum of a long row
BLOCK = 1024  # entries that are added in sequence, before the sums of blocks are


def cut(d: Float[Array, "*rows V"]) -> Float[Array, "*rows K L"]:
    """Rows cut into blocks, the last padded with -inf."""
    length = d.shape[-1]
    if length <= 2 * BLOCK:
        return d[..., None, :]
    count = math.ceil(length / BLOCK)
    padding = [(0, 0)] * (d.ndim - 1) + [(0, count * BLOCK - length)]
    d = jnp.pad(d, padding, constant_values=-jnp.inf)
    return d.reshape(*d.shape[:-1], count, BLOCK)


def sums(*terms: Float[Array, "*rows K L"]) -> list[Float[Array, "*rows"]]:
    """The sums of several arrays of blocks, in one pass over their common input."""
    # Separate sums would each recompute or re-read it.
    zeros = tuple(jnp.zeros((), term.dtype) for term in terms)
    add = lambda a, b: tuple(map(jnp.add, a, b))
    return [
        total.sum(-1) for total in lax.reduce(terms, zeros, add, (terms[0].ndim - 1,))
    ]
