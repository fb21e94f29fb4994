"""Roots of decreasing functions of one number each, all at a time, by few evaluations.

An evaluation may be a pass over a vocabulary. Bisection gains one bit with each;
interpolation by an inverse quadratic, taken where the three newest points are nearly on
one (T. R. Chandrupatla's criterion) and bisection elsewhere, usually five times that.
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
    """The root in [low, high], or the end that is nearest to it; NaN where a value is.

    `function` is evaluated `num_steps` + 2 times; nothing is differentiated.
    """
    at_low, at_high = function(low), function(high)
    # The ends may be the same on all devices; what the loop carries is not.
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
    """The next point, as its place between a (0) and b (1)."""
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
