r"""Exponentials and sums whose rounding errors are known, in floats of any exponent.

The argument of an exponential is split into $x = n \log 2 + t$. The logarithm of 2 is
a sum of parts with so few bits that their products with $n$ are exact, and the rounding
error of the last subtraction is computed too. So results do not depend on whether a
compiler fuses multiplications and additions.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

EXACT_RANGE = 45_000.0
"""The exponents of $e^x$ need no more than 16 bits up to here."""

BELOW_EXACT_RANGE = -60_000.0

# Only products with the last part are rounded, far below the last bit of t.
_LOG_2 = {
    np.dtype("float32"): [
        float.fromhex(part)
        for part in ("0x1.62p-1", "0x1.C8p-10", "0x1.7Ep-20", "0x1.7D1CF8p-28")
    ],
    np.dtype("float64"): [
        float.fromhex(part)
        for part in ("0x1.62E42FEFAp-1", "0x1.CF79ABC9Ep-40", "0x1.D9CC01F97B57Ap-79")
    ],
}
# Terms of (e^t - 1 - t) / t^2 for |t| <= log(2) / 2, up to 2^-32 and 2^-70 of e^t.
_TERMS = {np.dtype("float32"): 7, np.dtype("float64"): 15}

ANCHORED_BEYOND = 32_768.0
"""Rows whose largest score is beyond are kept relative to it."""


class ExtendedFloat(NamedTuple):
    r"""Numbers $m 2^n$ that neither overflow nor underflow; 0 is (0, -inf).

    Attributes:
        mantissa: $m$, of any size; below 2 in absolute value where it is new.
        exponent: $n$, an integer in a floating dtype, a constant to differentiation.
    """

    mantissa: Float[Array, "*shape"]
    exponent: Float[Array, "*shape"]


@jax.custom_jvp
def near_exp(x: Array) -> ExtendedFloat:
    """`extended_exp` in fewer operations, for differences of scores.

    Correct to one ulp from -45000 to 45000. Below, -inf included, the exponent is so
    small that the term vanishes in a sum with any in the range. Above, only +inf is
    defined: NaN.
    """
    *exact, last, rest = _parts_of_log_2(x)
    x = jnp.maximum(x, BELOW_EXACT_RANGE)
    n = jnp.round(x * (1 / math.log(2)))
    t = x
    for part in (*exact, last + rest):
        t = t - n * part
    top = 1 + t
    return ExtendedFloat(top + (((1 - top) + t) + _beyond_first_order(t)), n)


@near_exp.defjvp
def _(primals, tangents):
    (x,), (dx,) = primals, tangents
    y = near_exp(x)
    return y, ExtendedFloat(y.mantissa * dx, jnp.zeros_like(y.exponent))


def exp_pair(x: Array, low: Array | float = 0.0) -> tuple[Array, Array, Array]:
    """(mantissa, its rounding error, exponent) of e^(x + low), for a small low."""
    n, t, t_low, terms = _split(x, low)
    # 1 + t with its rounding error; 1 is the larger.
    top = 1 + t
    rest = ((1 - top) + t) + (t_low + terms)
    mantissa = top + rest
    return mantissa, (top - mantissa) + rest, n


def log1p_pair(x: Array, low: Array | float = 0.0) -> tuple[Array, Array]:
    """log(1 + x + low) as a sum of two, for x >= 0: one step of Newton's method."""
    first = jnp.log1p(x)
    n, t, t_low, terms = _split(first, 0.0)
    power = power_of_two(n)
    # 1 + x - e^first, the large terms first: they cancel without rounding.
    # XLA takes (1 + x) - 1 for x where it sees that 1 is a constant.
    one = lax.optimization_barrier(jnp.ones_like(x))
    total, error = exact_sum(one, x)
    residual = ((total - power) - power * t) + error
    residual = residual + (low - power * (t_low + terms))
    return first, jnp.where(jnp.isfinite(x), residual / total, 0)


def exact_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """The rounded sum and its rounding error, whichever of the two is larger."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


def sum_pair(x: Array) -> tuple[Array, Array]:
    """The sum over the last axis, kept with length 1, as a rounded sum and its error.

    Repeatedly adds the two halves of the axis, with their rounding errors.
    """
    if not x.shape[-1]:
        total = x.sum(-1, keepdims=True)
        return total, total
    cut = functools.partial(lax.slice_in_dim, axis=-1)
    # Without it XLA recomputes the terms for every use in the first step.
    high = lax.optimization_barrier(x)
    low = odd = odd_low = jnp.zeros_like(high[..., :1])
    whole = True  # no rounding errors yet
    while (length := high.shape[-1]) > 1:
        half = length // 2
        if length % 2:
            odd, error = exact_sum(odd, cut(high, length - 1, length))
            odd_low = odd_low + error
            if not whole:
                odd_low = odd_low + cut(low, length - 1, length)
        high, error = exact_sum(cut(high, 0, half), cut(high, half, 2 * half))
        if not whole:
            error = error + (cut(low, 0, half) + cut(low, half, 2 * half))
        low, whole = error, False
    high, error = exact_sum(high, odd)
    return high, low + (odd_low + error)


def quotient(high: Array, low: Array, total: Array, total_low: Array) -> Array:
    """(high + low) / (total + total_low), nearly correctly rounded."""
    # 1 / total = first + rest: `first` has half of the bits, so that its product with
    # another half is exact; `rest` is by Newton's step.
    inverse = 1 / total
    first, total_first, high_first = map(_first_half, (inverse, total, high))
    rest = (1 - total_first * first) - (total - total_first) * first
    rest = (rest - total_low * first) * inverse
    small = (high - high_first) * first + (high * rest + low * first)
    return high_first * first + small


def scaled(x: ExtendedFloat, exponent: Array) -> Array:
    """The mantissas relative to a larger exponent."""
    # inf - inf is NaN: equal exponents need no difference.
    difference = jnp.where(x.exponent == exponent, 0, x.exponent - exponent)
    return x.mantissa * power_of_two(difference)


def power_of_two(n: Array) -> Array:
    """2^n, exact; 0 below the normal numbers, the largest power above them."""
    # exp2 is not exact at integers, and ldexp is many operations.
    limits = jnp.finfo(n.dtype)
    n = jnp.clip(lax.stop_gradient(n), limits.minexp - 1, limits.maxexp - 1)
    bits = (n.astype(_integer(n)) + (limits.maxexp - 1)) << limits.nmant
    return lax.bitcast_convert_type(bits, n.dtype)


def times_log_2(n: Array) -> tuple[Array, Array]:
    """The product n log(2) as an exact leading product and the remainder."""
    large, *small = (n * part for part in _parts_of_log_2(n))
    return large, functools.reduce(lambda rest, term: term + rest, small[::-1])


def _parts_of_log_2(x: Array) -> list[float]:
    return _LOG_2[np.dtype(x.dtype)]


def _split(x: Array, low: Array | float) -> tuple[Array, Array, Array, Array]:
    """(n, t, rounding error of t, e^(t + error) - 1 - t - error)."""
    *exact, last, rest = _parts_of_log_2(x)
    n = jnp.round(x * (1 / math.log(2)))
    t = x
    for part in exact:
        t = t - n * part
    t, t_low = exact_sum(t, -n * last)
    t, t_low = exact_sum(t, (t_low - n * rest) + low)
    return n, t, t_low, _beyond_first_order(t) + t * t_low


def _beyond_first_order(t: Array) -> Array:
    """e^t - 1 - t."""
    series = jnp.zeros_like(t)
    for k in range(_TERMS[np.dtype(t.dtype)] + 1, 1, -1):
        series = series * t + 1 / math.factorial(k)
    return t * t * series


def _first_half(x: Array) -> Array:
    """The leading half of the bits."""
    bits = lax.bitcast_convert_type(x, _integer(x))
    dropped = (jnp.finfo(x.dtype).nmant + 2) // 2
    return lax.bitcast_convert_type((bits >> dropped) << dropped, x.dtype)


def exponent_of(x: Array) -> Array:
    """The n with 2^n <= |x| < 2^(n + 1); 0 where x is 0 or not finite."""
    limits = jnp.finfo(x.dtype)
    bits = lax.bitcast_convert_type(lax.stop_gradient(jnp.abs(x)), _integer(x))
    exponent = (bits >> limits.nmant) - (limits.maxexp - 1)
    usual = (x != 0) & jnp.isfinite(x)
    return jnp.where(usual, exponent, 0).astype(x.dtype)


def _integer(x: Array) -> jnp.dtype:
    return jnp.dtype(f"int{jnp.finfo(x.dtype).bits}")


def anchor_of(top: Array) -> Array:
    """The anchor of a row with this largest score; 0 unless the score is extreme."""
    beyond = (jnp.abs(top) > ANCHORED_BEYOND) & (top < jnp.inf)
    return jnp.where(beyond, top, 0)
