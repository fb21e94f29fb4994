"""Budget sparsemax and normmax: relatives of sparsemax with other constraints."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._compiled_once import compiled_once
from softlib._entmax_rows import cut, normalized, solution, sums, top_score
from softlib._sharding import match_varying
from softlib.typing import PerRow

from ._entmax import row_values
from ._entries import Axis, Entries


@array_arguments
def budget_sparsemax(
    x: Float[Array, "*shape"],
    axis: Axis = -1,
    *,
    budget: PerRow,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*shape"]:
    r"""Sparsemax that selects several: entries in $[0, 1]$ that sum to a budget B.

    $$p = \arg\max_p \langle p, x \rangle - \tfrac12 |p|^2
    \quad \text{with } 0 \leq p_i \leq 1, \ \sum_i p_i = B,$$

    that is $p_i = \min(1, \max(0, x_i - \tau))$ with one $\tau$ per row. A relaxation
    of the choice of the B largest entries; with B = 1 it is `sparsemax`.

    Args:
        x: Scores. -inf never counts; NaN or +inf make their row NaN.
        axis: Static; the axis or axes of a row, None for all.
        budget: B > 0: a number (static), or an array with a value per row, that is in
            the shape of `x` without `axis`, or one that broadcasts to it; traced and
            differentiable. If it is not below the number of entries that count, they
            are all 1. An array's value below 0 makes its rows NaN.
        where: True for the entries that count, broadcasts; others may hold anything.

    Returns:
        Numbers in $[0, 1]$ in the dtype of `x`, 0 where an entry does not count.

    Raises:
        TypeError: `x` or an array `budget` is not floating, or `where` is not boolean.
        ValueError: `axis` is no axis of `x`, `where` or `budget` does not broadcast, or
            the budget is a number that is not positive.

    Derivatives: forward and reverse mode, any order, with respect to `x` and `budget`.
        The Jacobian is that of sparsemax on the entries strictly between 0 and 1, which
        also share a change of the budget equally; 0 if there are none.
    Cost: one pass over `x` per step of Newton's iteration, which takes turns with
        bisection: about 10, and at most three times the bits of the dtype. The result
        is kept for the backward pass.
    Source: "SparseMAP: Differentiable Sparse Structured Inference", its budget
        constraint.

    Example:
        >>> x = jnp.array([1.0, 0.75, 0.5, 0.25, 0.0])
        >>> print(softlib.softmax.budget_sparsemax(x, budget=2.0))
        [0.875 0.625 0.375 0.125 0.   ]
    """
    function = "budget_sparsemax"
    entries = Entries.of(function, x, axis, where)
    if isinstance(budget, int | float):
        checks.require_positive_number(function, "budget", budget)
        budget = jnp.asarray(budget, entries.x.dtype)
    rows = row_values(function, "budget", entries, budget)
    z = entries.rows(entries.scores)
    p = _budget_sparsemax(z, *match_varying((rows,), z))
    return entries.result(entries.unrows(p))


@array_arguments
def normmax(
    x: Float[Array, "*shape"],
    axis: Axis = -1,
    *,
    alpha: PerRow = 2.0,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*shape"]:
    r"""The distribution that weighs the score against its own $\alpha$-norm.

    $$p = \arg\max_p \langle p, x \rangle - |p|_\alpha$$

    on the simplex: $p \propto (x - \tau)_+^{1 / (\alpha - 1)}$ with the $\tau$ for
    which $\sum_i (x_i - \tau)_+^{\alpha / (\alpha - 1)} = 1$. As $\alpha$ grows it
    becomes uniform on its support. It equals $P^{1 / \alpha} / \sum P^{1 / \alpha}$
    with $P$ the `entmax` of $x \alpha / (\alpha - 1)$ for $2 - 1 / \alpha$, which is
    how it is computed.

    Args:
        x: Scores. -inf never counts; NaN or +inf make their row NaN.
        axis: Static; the axis or axes of a row, None for all.
        alpha: $\alpha > 1$: a number (static), or an array with a value per row, that
            is in the shape of `x` without `axis`, or one that broadcasts to it; traced
            and differentiable. An array's value of 1 or less makes its rows NaN.
        where: True for the entries that count, broadcasts; others may hold anything.

    Returns:
        Probabilities in the dtype of `x`, 0 where an entry does not count.

    Raises:
        TypeError: `x` or an array `alpha` is not floating, or `where` is not boolean.
        ValueError: `axis` is no axis of `x`, `where` or `alpha` does not broadcast, or
            `alpha` is a number that is not above 1.

    Derivatives: forward and reverse mode with respect to `x` and `alpha`, any order
        where no entry is at the edge of the support.
    Cost: as `entmax`.
    Source: the norm-regularised maps of "Hopfield-Fenchel-Young Networks: A Unified
        Framework for Associative Memory Retrieval".

    Example:
        >>> x = jnp.array([2.0, 2.0, -1.0, -jnp.inf])
        >>> print(jnp.round(100 * softlib.softmax.normmax(x)).astype(int))
        [50 50  0  0]
    """
    function = "normmax"
    entries = Entries.of(function, x, axis, where)
    z = entries.rows(entries.scores)
    if isinstance(alpha, int | float):
        checks.require_positive_number(function, "alpha", alpha)
        if alpha <= 1:
            raise ValueError(f"{function}: `alpha` must be above 1, got {alpha}.")
        scale, power, own = alpha / (alpha - 1), 1 / alpha, 2 - 1 / alpha
    else:
        alpha = row_values(function, "alpha", entries, alpha)
        alpha = jnp.where(alpha > 1, alpha, jnp.nan)
        scale, power = (alpha / (alpha - 1))[..., None], 1 / alpha[..., None]
        own = 2 - 1 / alpha
    # Subtracts the maximum before scaling, so that only differences are rounded.
    d = z - lax.stop_gradient(top_score(z))
    counts = d != -jnp.inf  # an infinite score has no derivative by the scale
    d = jnp.where(counts, jnp.where(counts, d, 0) * scale, -jnp.inf)
    p = solution(d, own).p
    on = p != 0
    p = jnp.where(on, jnp.exp(jnp.log(jnp.where(on, p, 1)) * power), 0)
    return entries.result(entries.unrows(normalized(p)))


# --------------------------------------------------------------------- rows of a matrix
@jax.custom_jvp
@compiled_once()
def _budget_sparsemax(
    z: Float[Array, "*rows V"], budget: Float[Array, "*rows"]
) -> Float[Array, "*rows V"]:
    top = top_score(z)
    counts = z > -jnp.inf
    full = budget >= counts.sum(-1, dtype=budget.dtype)
    level = _level(z - top, budget, ~full)
    # Relative to the threshold, not to the maximum: far below that, differences are too
    # coarse to add up to the budget. `shift` is the rounding error of the threshold.
    threshold = top - level[..., None]
    about = z - threshold
    shift = level - (top - threshold)[..., 0]
    blocks = cut(about)
    for _ in range(2):
        shift = _newton(blocks, shift, budget)[0]
    p = jnp.clip(shift[..., None] + about, 0, 1)
    p = jnp.where(full[..., None], counts.astype(p.dtype), p)
    bad = jnp.isnan(top) | ~(budget >= 0)[..., None]
    return jnp.where(bad, jnp.nan, p)


def _budget_sparsemax_jvp(primals, tangents):
    (z, budget), (dz, dbudget) = primals, tangents
    p = _budget_sparsemax(z, budget)
    free = (p > 0) & (p < 1)
    count = jnp.maximum(free.sum(-1, keepdims=True), 1).astype(p.dtype)
    dz = jnp.where(free, dz, 0)
    mean = (dz.sum(-1, keepdims=True) - dbudget[..., None]) / count
    return p, jnp.where(free, dz - mean, 0)


_budget_sparsemax.defjvp(_budget_sparsemax_jvp)


def _newton(blocks: Array, c: Array, budget: Array) -> tuple[Array, Array]:
    """Newton's step for the sum of clip(c + d, 0, 1) to be the budget, and the sum."""
    w = c[..., None, None] + blocks
    free = (w > 0) & (w < 1)
    total, count = sums(jnp.clip(w, 0, 1), free.astype(w.dtype))
    return c - (total - budget) / jnp.where(count == 0, jnp.inf, count), total


def _level(
    d: Float[Array, "*rows V"],
    budget: Float[Array, "*rows"],
    active: Bool[Array, "*rows"],
) -> Float[Array, "*rows"]:
    """The c for which the sum of clip(c + d, 0, 1) is the budget, up to rounding."""
    blocks, eps = cut(d), jnp.finfo(d.dtype).eps

    def step(state):
        value, low, high, active, count = state
        newton, total = _newton(blocks, value, budget)
        low = jnp.where(total < budget, value, low)
        high = jnp.where(total < budget, high, value)
        inside = (newton > low) & (newton < high) & (count % 2 == 0)
        new = jnp.where(inside, newton, (low + high) / 2)
        off = jnp.abs(total - budget) > 2 * eps * budget
        active = active & off & (high - low > eps * high)
        return jnp.where(active, new, value), low, high, active, count + 1

    lowest = jnp.where(d > -jnp.inf, d, 0).min(-1, initial=0)
    one = jnp.ones_like(lowest)
    state = (one, jnp.zeros_like(one), 1 - lowest, active)
    most = 3 * jnp.finfo(d.dtype).nmant + 20
    unfinished = lambda state: state[-2].any() & (state[-1] < most)
    state = (*match_varying(state, d), 0)
    level, *_ = lax.while_loop(unfinished, step, state)
    return jnp.asarray(level)
