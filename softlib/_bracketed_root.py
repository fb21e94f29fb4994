"""Roots of a batch of decreasing scalar functions, found with few evaluations.

An evaluation may be a pass over a vocabulary. Bisection gains one bit per evaluation.
Inverse quadratic interpolation, used where the three newest points nearly lie on such a
curve (T. R. Chandrupatla's criterion), usually gains five.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from softlib._sharding import match_varying

type Function = Callable[[Float[Array, "*shape"]], Float[Array, "*shape"]]


def decreasing_root(
    function: Function,
    low: Float[Array, "*shape"],
    high: Float[Array, "*shape"],
    num_steps: int,
) -> Float[Array, "*shape"]:
    """The root in [low, high], or the nearer end; NaN where `function` is NaN.

    `function` is evaluated `num_steps` + 2 times; no derivative passes through.
    """
    at_low, at_high = function(low), function(high)
    # The ends may be replicated over devices; the carry of the loop varies over them.
    low, high = (end + jnp.zeros_like(at_low) for end in (low, high))
    low, high, at_low, at_high = match_varying((low, high, at_low, at_high))
    eps = jnp.finfo(low.dtype).eps

    def step(_, state):
        t, (a, fa), (b, fb), _ = state
        x = a + t * (b - a)
        fx = function(x)
        same = (fx > 0) == (fa > 0)
        # The root lies between the newest point and b; c is the one left over.
        c, fc = jnp.where(same, a, b), jnp.where(same, fa, fb)
        b, fb = jnp.where(same, b, a), jnp.where(same, fb, fa)
        a, fa = x, fx
        return _next(a, fa, b, fb, c, fc, eps), (a, fa), (b, fb), (c, fc)

    half = jnp.full_like(low, 0.5)
    ends = (high, at_high), (low, at_low)
    _, (a, fa), (b, fb), _ = lax.fori_loop(
        0, num_steps, step, (half, *ends, (high, at_high))
    )
    root = jnp.where(jnp.abs(fa) < jnp.abs(fb), a, b)
    root = jnp.where(at_low <= 0, low, jnp.where(at_high >= 0, high, root))
    return jnp.where(jnp.isnan(at_low + at_high), jnp.nan, root)


def _next(a, fa, b, fb, c, fc, eps):
    """The next point, as a fraction of the way from a (0) to b (1)."""
    over = lambda x, y: x / jnp.where(y == 0, 1, y)
    xi, phi = over(a - b, c - b), over(fa - fb, fc - fb)
    apart = (fa != fb) & (fb != fc) & (fa != fc) & (c != b)
    quadratic = apart & (phi**2 < xi) & ((1 - phi) ** 2 < 1 - xi)
    t = over(fa, fb - fa) * over(fc, fb - fc)
    t = t + over(c - a, b - a) * over(fa, fc - fa) * over(fb, fc - fb)
    t = jnp.where(quadratic, t, 0.5)
    # Not nearer to an end than the spacing of floats: the bracket has to shrink.
    spacing = over(2 * eps * jnp.abs(a), jnp.abs(b - a))
    t = jnp.clip(t, jnp.minimum(spacing, 0.5), 1 - jnp.minimum(spacing, 0.5))
    return jnp.where((fa == 0) | (spacing > 0.5), 0, t)
