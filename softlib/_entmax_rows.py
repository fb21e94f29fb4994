r"""Entmax and its special cases on rows of a matrix, solved by Newton's iteration.

Sparsemax and entmax 1.5 are powers of what is above a threshold: with $d = z - \max z$
and a whole n, $p_i = (c + d_i / n)_+^n$ where $c$ is such that $\sum_i p_i = 1$; n is 1
for sparsemax and 2 for entmax 1.5. The norm $(\sum_i p_i)^{1/n}$ is a convex and
increasing function of c, so that Newton's iteration from c = 1 falls to the root and
never passes it, quadratically, and in one step if all scores are equal. Nothing is
sorted.

For any alpha, with $s = \alpha - 1$ and $d = z - \max z$ the probabilities are

$$p_i = c^{1/s} (1 + s d_i / c)_+^{1/s}, \qquad
\log p_i = \ell + \mathrm{log1p}(s e^{-s\ell} d_i) / s$$

with the logarithm $\ell = \log c / s$ of the largest as the one unknown. In this form
nothing cancels for flat scores, where c is small, nor for s near 0, where entmax is
softmax and $\ell$ the logarithm of its largest probability. The power mean
$(\sum_i p_i)^s$ is a convex function of c for 0 < s <= 1 and a concave one for s < 0:
Newton's iteration from c = 1 goes to the root without passing it.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from ._compiled_once import compiled_once
from ._sharding import match_varying

TOLERANCE = 8  # in ulps, about the error of the sum of a long row
BLOCK = 1024  # entries that are added in sequence, before the sums of blocks are


class Solution(NamedTuple):
    """Probabilities and the logarithm of the largest before rounding; rows are last.

    The logarithm is not differentiated: the derivatives of its users are known.
    """

    p: Float[Array, "*rows V"]
    log_top: Float[Array, "*rows"]


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


# ---------------------------------------------------------------------------- any alpha
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
