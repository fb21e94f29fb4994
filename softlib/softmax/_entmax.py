r"""Entmax with any alpha, and tempered softmax, which is the same map.

With $s = \alpha - 1$ and $d = z - \max z$ the probabilities are

$$p_i = c^{1/s} (1 + s d_i / c)_+^{1/s}, \qquad
\log p_i = \ell + \mathrm{log1p}(s e^{-s\ell} d_i) / s$$

with the logarithm $\ell = \log c / s$ of the largest as the one unknown. In this form
nothing cancels for flat scores, where c is small, nor for s near 0, where entmax is
softmax and $\ell$ the logarithm of its largest probability. The power mean
$(\sum_i p_i)^s$ is a convex function of c for 0 < s <= 1 and a concave one for s < 0:
Newton's iteration from c = 1 goes to the root without passing it.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._compiled_once import compiled_once
from softlib._sharding import match_varying
from softlib.typing import PerRow

from ._entries import Axis, Entries
from ._sparsemax import (
    TOLERANCE,
    Solution,
    cut,
    most_steps,
    normalized,
    of_rows,
    power_map,
    row_of,
    sums,
    through,
    top_score,
)


@array_arguments
def entmax(
    x: Float[Array, "*shape"],
    axis: Axis = -1,
    *,
    alpha: PerRow = 1.5,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*shape"]:
    r"""The family from softmax to sparsemax and beyond: regularised by Tsallis entropy.

    $$p = \arg\max_p \langle p, x \rangle + H_\alpha(p), \qquad
    H_\alpha(p) = \frac{1 - \sum_i p_i^\alpha}{\alpha (\alpha - 1)},$$

    that is $p_i = \max(0, (\alpha - 1) x_i - \tau)^{1 / (\alpha - 1)}$ with one $\tau$
    per row such that $\sum_i p_i = 1$. $\alpha = 1$ is softmax, 1.5 `entmax15`, 2
    `sparsemax`. For $\alpha > 1$ scores more than $1 / (\alpha - 1)$ below the largest
    get exactly 0; for $\alpha < 1$ the tails are heavier than those of softmax.

    Args:
        x: Scores. -inf never counts; NaN or +inf make their row NaN.
        axis: Static; the axis or axes of a row, None for all.
        alpha: $\alpha > 0$: a number (static), or an array with a value per row, that
            is in the shape of `x` without `axis`, or one that broadcasts to it; traced
            and differentiable. Every value is fine, 1 and its neighbours included; an
            array's value of 0 or less makes its rows NaN. For $\alpha > 2$ the edge
            of the support is steep: a score that is off by e there changes $p$ by
            $e^{1 / (\alpha - 1)}$, rounding included.
        where: True for the entries that count; broadcasts to `x`. Others may hold
            anything, NaN included.

    Returns:
        Probabilities in the dtype of `x`, 0 where an entry does not count. A row
        without an entry that counts is 0.

    Raises:
        TypeError: `x` or an array `alpha` is not floating, or `where` is not boolean.
        ValueError: `axis` is no axis of `x`, `where` or `alpha` does not broadcast, or
            `alpha` is a number that is not positive.

    Derivatives: forward and reverse mode with respect to `x` and `alpha`, any order
        where no entry is at the edge of the support. With $s = p^{2 - \alpha}$ on the
        support the Jacobian is $\mathrm{diag}(s) - s s^\top / \sum s$. For
        $\alpha > 2$ it has no bound near the edge; $s$ is cut off at the fourth root of
        the largest number of the dtype.
    Cost: one pass over `x` per step of Newton's iteration, 3 to 12 in practice, with a
        logarithm and an exponential for each entry unless $1 / (\alpha - 1)$ is a
        number 1, 2, 3 or 4. With $\alpha > 2$ it takes turns with bisection, up to
        twice the bits of the dtype. The result is kept for the backward pass.
    Source: "Sparse Sequence-to-Sequence Models" and "Adaptively Sparse Transformers",
        with Newton's iteration on the logarithm of the largest probability for their
        bisection, and a derivative by $\alpha$ that is exact around 1.

    Example:
        >>> x, alpha = jnp.array([[1.0, 0.0, 0.0]] * 2), jnp.array([2.0, 4.0])
        >>> print(softlib.softmax.entmax(x, alpha=alpha))
        [[1. 0. 0.]
         [1. 0. 0.]]
    """
    entries = Entries.of("entmax", x, axis, where)
    if isinstance(alpha, int | float):
        checks.require_positive_number("entmax", "alpha", alpha)
    else:
        alpha = row_values("entmax", "alpha", entries, alpha)
    return of_rows(entries, solution(entries.rows(entries.scores), alpha))


@array_arguments
def tempered_softmax(
    x: Float[Array, "*shape"],
    axis: Axis = -1,
    *,
    t: PerRow,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*shape"]:
    r"""Softmax with the tempered exponential: heavy tails for $t > 1$.

    $p_i = \exp_t(x_i - \lambda)$ with $\exp_t(u) = [1 + (1 - t) u]_+^{1 / (1 - t)}$ and
    one $\lambda$ per row such that $\sum_i p_i = 1$. It is `entmax` with
    $\alpha = 2 - t$ in the notation of the bi-tempered loss: $t = 1$ is softmax, 0
    sparsemax, and between 1 and 2 the probabilities fall like a power of the score,
    which tolerates outliers.

    Args:
        x: Scores. -inf never counts; NaN or +inf make their row NaN.
        axis: Static; the axis or axes of a row, None for all.
        t: $t < 2$: a number (static), or an array with a value per row, that is in the
            shape of `x` without `axis`, or one that broadcasts to it; traced and
            differentiable. An array's value of 2 or more makes its rows NaN.
        where: True for the entries that count; broadcasts to `x`. Others may hold
            anything, NaN included.

    Returns:
        Probabilities in the dtype of `x`, 0 where an entry does not count. A row
        without an entry that counts is 0.

    Raises:
        TypeError: `x` or an array `t` is not floating, or `where` is not boolean.
        ValueError: `axis` is no axis of `x`, `where` or `t` does not broadcast, or `t`
            is a number that is not below 2.

    Derivatives: as `entmax`, with respect to `x` and `t`.
    Cost: as `entmax`.
    Source: "Robust Bi-Tempered Logistic Loss Based on Bregman Divergences".

    Example:
        >>> p = softlib.softmax.tempered_softmax(jnp.array([0.25, 0.0, -1.0]), t=0.0)
        >>> print(p)
        [0.625 0.375 0.   ]
    """
    function = "tempered_softmax"
    entries = Entries.of(function, x, axis, where)
    if isinstance(t, int | float):
        require_below_two(function, "t", t)
        return of_rows(entries, solution(entries.rows(entries.scores), 2 - t))
    t = row_values(function, "t", entries, t)
    return of_rows(entries, solution(entries.rows(entries.scores), 2 - t))


def require_below_two(function: str, name: str, value: float) -> None:
    if not -math.inf < value < 2:
        raise ValueError(
            f"{function}: `{name}` must be finite and below 2, got {value}."
        )


def row_values(
    function: str, name: str, entries: Entries, value: ArrayLike
) -> Float[Array, "*rows"]:
    """One number per row, in the dtype of the sums."""
    value = entries.per_row(function, name, value)
    return jnp.broadcast_to(value, entries.row_shape)


# --------------------------------------------------------------------- rows of a matrix
WHOLE_POWERS = {1 + 1 / n: n for n in range(1, 5)}


def solution(
    z: Float[Array, "*rows V"], alpha: float | Float[Array, "*rows"]
) -> Solution:
    if isinstance(alpha, int | float):
        if alpha in WHOLE_POWERS:
            return power_map(WHOLE_POWERS[alpha], z)
        s = jnp.full_like(row_of(z), alpha - 1)
    else:
        s = jnp.where(alpha > 0, alpha, jnp.nan) - 1
    return _entmax(z, *match_varying((s,), z))


@jax.custom_jvp
@compiled_once()
def _entmax(z: Float[Array, "*rows V"], s: Float[Array, "*rows"]) -> Solution:
    d = z - top_score(z)
    log_top = _log_top(d, s)
    log_p, on, _ = log_probability(d, s[..., None], log_top[..., None])
    # A NaN of scores or alpha counts as outside the support.
    bad = jnp.isnan(d) | jnp.isnan(s)[..., None]
    p = jnp.where(on, jnp.exp(log_p), jnp.where(bad, jnp.nan, 0))
    return Solution(normalized(p), log_top)


def _entmax_jvp(primals, tangents):
    (z, s), (dz, ds) = primals, tangents
    solution = _entmax(z, s)
    p, s = solution.p, s[..., None]
    on = p > 0
    log_p = jnp.log(jnp.where(on, p, 1))
    # p^(2 - alpha). For alpha > 2 it grows without bound at the edge of the support.
    most = math.log(float(jnp.finfo(p.dtype).max)) / 4
    slope = jnp.where(on, jnp.exp(jnp.minimum((1 - s) * log_p, most)), 0)
    dp = jnp.zeros_like(p)
    if not isinstance(dz, SymbolicZero):
        dp = dp + through(slope, jnp.where(on, dz, 0))
    if not isinstance(ds, SymbolicZero):
        own = jnp.where(on, _slope_in_alpha(p, log_p, slope, s), 0)
        total = slope.sum(-1, keepdims=True)
        share = slope / jnp.where(total == 0, 1, total)
        dp = dp + (own - share * own.sum(-1, keepdims=True)) * ds[..., None]
    return solution, Solution(dp, jnp.zeros_like(solution.log_top))


_entmax.defjvp(_entmax_jvp, symbolic_zeros=True)


def _slope_in_alpha(p: Array, log_p: Array, slope: Array, s: Array) -> Array:
    """The derivative of p with the threshold fixed: -p l^2 (e^u - 1 - u) / u^2.

    Here l = log p and u = -s l, and p e^u is p^(2 - alpha). The quotient as written
    cancels for a small u.
    """
    u = -s * log_p
    near = jnp.abs(u) < 0.5
    v, series = jnp.where(near, u, 0), jnp.zeros_like(u)
    for n in reversed(range(16)):  # the next term is below 1e-20
        series = 1 / math.factorial(n + 2) + v * series
    s = jnp.where(s == 0, 1, s)
    direct = jnp.where(near, 0, slope - p * (1 + u)) / s**2
    return -jnp.where(near, p * log_p**2 * series, direct)


def log_probability(
    d: Float[Array, "*shape"], s: Float[Array, "..."], log_top: Float[Array, "..."]
) -> tuple[Array, Array, Array]:
    """(log p, whether p > 0, 1 + s d / c); the first is undefined where p is 0.

    `s` and `log_top` have length 1 on the axes of a row.
    """
    y = s * jnp.exp(-s * log_top) * d
    on = y > -1  # False for NaN (0 * -inf)
    softmax = s == 0
    log_power = jnp.log1p(jnp.where(on, y, 0)) / jnp.where(softmax, 1, s)
    return log_top + jnp.where(softmax, d, log_power), on, 1 + y


def _log_top(
    d: Float[Array, "*rows V"], s: Float[Array, "*rows"]
) -> Float[Array, "*rows"]:
    """The logarithm of the largest probability."""
    blocks, eps = cut(d), jnp.finfo(d.dtype).eps
    per_block = lambda row: row[..., None, None]
    least = -math.log(max(d.shape[-1], 1))  # of equal scores
    softmax = s == 0
    safe = jnp.where(softmax, 1, s)
    # For alpha > 2 the norm is neither convex nor concave: Newton's steps alternate
    # with bisection.
    wild = s > 1

    def step(state):
        value, low, high, active, count = state
        log_p, on, w = log_probability(blocks, per_block(s), per_block(value))
        p = jnp.where(on, jnp.exp(log_p), 0)
        total, slopes = sums(p, jnp.where(on, p / jnp.where(on, w, 1), 0))
        filled = jnp.where(total > 0, total, 1)  # 1 for empty rows and those with NaN
        slopes = jnp.where(slopes > 0, slopes, 1)
        # The relative change of c.
        change = filled * jnp.expm1(-s * jnp.log(filled)) / slopes
        newton = value + jnp.where(softmax, -jnp.log(filled), jnp.log1p(change) / safe)
        low = jnp.where(total < 1, value, low)
        high = jnp.where(total < 1, high, value)
        inside = (newton > low) & (newton < high) & (count % 2 == 0)
        new = jnp.where(inside, newton, (low + high) / 2)
        new = jnp.where(wild, new, jnp.maximum(newton, least))
        ulp = eps * jnp.maximum(1, -value)
        off = (jnp.abs(total - 1) > 4 * eps) & (high - low > ulp)
        more = jnp.where(wild, off, jnp.abs(new - value) > TOLERANCE * ulp)
        # A converged value is kept: the next may be half a bracket away.
        active = active & more
        return jnp.where(active, new, value), low, high, active, count + 1

    bits = jnp.finfo(d.dtype).nmant
    most = max(most_steps(d.dtype), 2 * bits + 20)
    start = jnp.zeros_like(row_of(d))
    lowest = jnp.full_like(start, least)
    active = jnp.ones_like(start, bool)
    state = (*match_varying((start, lowest, start, active), d), 0)
    unfinished = lambda state: state[-2].any() & (state[-1] < most)
    log_top, *_ = lax.while_loop(unfinished, step, state)
    return jnp.asarray(log_top)
