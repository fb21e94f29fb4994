r"""Softmax, its logarithm and the logarithm of its sum from error-free exponentials.

The difference of a score to the maximum is rounded when it is subtracted, and the error
grows with it: a weight of $e^{-80}$ is wrong by 64 units of its last place. Nothing is
subtracted here but multiples of $\log 2$, without rounding; or, if compensated, the
maximum too, with the rounding error kept.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from softlib._array_arguments import array_arguments
from softlib._error_free import (
    BELOW_EXACT_RANGE,
    ExtendedFloat,
    anchor_of,
    exact_sum,
    exp_pair,
    log1p_pair,
    near_exp,
    power_of_two,
    quotient,
    sum_pair,
)
from softlib._finite import finite
from softlib.numerics import extended_log

from ._entries import Axis, Entries

# The sum of the terms below the largest is scaled by 2^32, since it may be near the
# smallest floats, and its terms below them.
_LIFT = 32.0


@array_arguments
def two_pass_softmax(
    x: Float[Array, "*shape"],
    axis: Axis = -1,
    *,
    where: Bool[Array, "..."] | None = None,
    compensated: bool = True,
) -> Float[Array, "*shape"]:
    r"""$e^{x_i} / \sum_j e^{x_j}$, every result right to a few units of its last place.

    With $e^{x_i} = m_i 2^{n_i}$ and the sum $M 2^E$ the result is $(m_i / M) 2^{n_i -
    E}$. The usual form subtracts the largest entry first, which in float32 costs small
    probabilities up to 66 units of their last place. For a ratio of probabilities, a
    sum over many small ones, or a reference to compare with; not for speed.

    Args:
        x: Scores. -inf never counts; NaN or +inf make their row NaN.
        axis: Static; the axis or axes of a row, None for all.
        where: True for the entries that count, broadcasts; others may hold anything.
        compensated: Static; whether to carry the rounding errors of exponentials and
            of their sum. The results of float32 are then right to 0.9 units of the last
            place, or else to 5 for rows of a thousand.

    Returns:
        Probabilities in the dtype of `x`, 0 where an entry does not count.

    Raises:
        TypeError: `x` is no floating array, or `where` is not boolean.
        ValueError: `axis` is no axis of `x`, or `where` does not broadcast.

    Derivatives: forward and reverse mode, any order; from the result, so that entries
        that do not count get 0.
    Cost: three passes over `x`, because the exponent of the sum is that of the largest
        entry; two or three times the arithmetic of `jax.nn.softmax`, six times if
        compensated, and a copy of `x` in that case.
    Source: "The Two-Pass Softmax Algorithm". It saves a pass where a kernel keeps one
        exponent per lane; plain JAX cannot. Rows beyond 32768 have their largest entry
        subtracted, which loses nothing there.

    Example:
        >>> x = jnp.array([1e6, 1e6, -jnp.inf])
        >>> print(softlib.softmax.two_pass_softmax(x))
        [0.5 0.5 0. ]
    """
    entries = Entries.of("two_pass_softmax", x, axis, where)
    rows = entries.rows(entries.scores)
    return entries.result(entries.unrows(_softmax(compensated, rows)))


@array_arguments
def two_pass_log_softmax(
    x: Float[Array, "*shape"],
    axis: Axis = -1,
    *,
    where: Bool[Array, "..."] | None = None,
    compensated: bool = True,
) -> Float[Array, "*shape"]:
    r"""$x_i - \log \sum_j e^{x_j}$, also right where it is almost 0.

    $$x_i - \max x - \log(1 + r), \qquad r = \sum_{j \ne \arg\max} e^{x_j - \max x}$$

    The usual form adds the 1 to r and so loses the logarithm of a probability near 1:
    below $10^{-7}$ it is 0. All terms here have the same sign.

    Args:
        x, axis, where: As in `two_pass_softmax`.
        compensated: Static; whether to carry the rounding errors of differences,
            exponentials and their sum. The results of float32 are then right to 1.2
            units of the last place, or else to 4 for rows of a thousand.

    Returns:
        Logarithms in nats in the dtype of `x`, -inf where an entry does not count.

    Raises:
        TypeError, ValueError: As `two_pass_softmax`.

    Derivatives: forward and reverse mode, any order; from the result, so that entries
        that do not count get 0.
    Cost: as `two_pass_softmax`.
    Source: the exponentials of "The Two-Pass Softmax Algorithm"; the sum without its
        largest term is softlib's.

    Example:
        >>> x = jnp.array([30.0, -20.0])
        >>> print(bool(softlib.softmax.two_pass_log_softmax(x)[0] < 0))
        True
    """
    entries = Entries.of("two_pass_log_softmax", x, axis, where)
    rows = entries.rows(entries.scores)
    return entries.result(entries.unrows(_log_softmax(compensated, rows)))


@array_arguments
def two_pass_logsumexp(
    x: Float[Array, "*shape"],
    axis: Axis = -1,
    *,
    where: Bool[Array, "..."] | None = None,
    keepdims: bool = False,
    compensated: bool = True,
) -> Float[Array, "*rows"]:
    r"""$\log \sum_j e^{x_j}$ in nats.

    $\log M + E \log 2$ for the sum $M 2^E$ of `two_pass_softmax`, or, if compensated,
    the largest entry plus the logarithm that `two_pass_log_softmax` subtracts.

    Args:
        x: Scores. -inf never counts; NaN makes its row NaN, +inf makes it +inf.
        axis, where: As in `two_pass_softmax`.
        keepdims: Static; whether `axis` stays, with length 1.
        compensated: Static; whether to carry rounding errors: the error is then half a
            unit of the last place of the result, plus $2^{-27}$ in float32.

    Returns:
        In the dtype of `x`; -inf for a row without an entry that counts.

    Raises:
        TypeError, ValueError: As `two_pass_softmax`.

    Derivatives: forward and reverse mode, any order: `two_pass_softmax`.
    Cost: as `two_pass_softmax`, without the last pass.
    Source: "The Two-Pass Softmax Algorithm". $E \log 2$ is a sum of exact products; as
        a single product it would be wrong by $10^{-3}$ for results about 30000.

    Example:
        >>> x = jnp.array([1e6, 1e6, -jnp.inf])
        >>> print(softlib.softmax.two_pass_logsumexp(x) - 1e6)
        0.6875
    """
    entries = Entries.of("two_pass_logsumexp", x, axis, where)
    found = _logsumexp(compensated, entries.rows(entries.scores))
    if keepdims:
        found = jnp.expand_dims(found, entries.axes)
    return entries.result(found)


# ------------------------------------------------------------- rows are the last axis
@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _softmax(compensated: bool, z: Array) -> Array:
    top = _largest(z)
    if compensated:
        mantissa, error, exponent = exp_pair(*_difference(z, top))
        total, total_low = sum_pair(mantissa * power_of_two(exponent))
        # Recomputed: XLA would write all intermediates of the pair to memory.
        mantissa, error, exponent = exp_pair(*_difference(_again(z), top))
        share = quotient(mantissa, error, _not_zero(total), total_low)
        return share * power_of_two(exponent)
    term, total = _terms(z, top)
    # Divides mantissas only: a subnormal term would be rounded twice.
    return (
        term.mantissa
        / _not_zero(total.mantissa)
        * power_of_two(term.exponent - total.exponent)
    )


@_softmax.defjvp
def _(compensated, primals, tangents):
    (z,), (dz,) = primals, tangents
    y, dz = _softmax(compensated, z), _of_present(z, dz)
    return y, y * (dz - (y * dz).sum(-1, keepdims=True))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _log_softmax(compensated: bool, z: Array) -> Array:
    top = _largest(z)
    first, rest = _log_of_others(compensated, z, top)
    if compensated:
        high, low = exact_sum(_again(z), -finite(top))
        total, error = exact_sum(high, -first)
        # Where a difference is infinite its errors are NaN.
        return jnp.where(jnp.isfinite(total), total + (error + (low - rest)), total)
    return (z - finite(top)) - (first + rest)


@_log_softmax.defjvp
def _(compensated, primals, tangents):
    (z,), (dz,) = primals, tangents
    found, dz = _log_softmax(compensated, z), _of_present(z, dz)
    mean = (jnp.exp(found) * dz).sum(-1, keepdims=True)
    return found, _of_present(z, dz - mean)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _logsumexp(compensated: bool, z: Array) -> Array:
    top = _largest(z)
    if compensated:
        first, rest = _log_of_others(compensated, z, top)
        total, error = exact_sum(finite(top), first)
        found = jnp.where(top == -jnp.inf, top, total + (error + rest))
    else:
        _, total = _terms(z, top)
        found = finite(anchor_of(top)) + extended_log(total)
    return jnp.where(top == jnp.inf, top, found)[..., 0]


@_logsumexp.defjvp
def _(compensated, primals, tangents):
    (z,), (dz,) = primals, tangents
    y, dz = _softmax(compensated, z), _of_present(z, dz)
    return _logsumexp(compensated, z), (y * dz).sum(-1)


def _of_present(z: Array, dz: Array) -> Array:
    """Tangents, 0 for entries that do not count, whose own may be anything."""
    return jnp.where(z == -jnp.inf, 0, dz)


def _log_of_others(compensated: bool, z: Array, top: Array) -> tuple[Array, Array]:
    """log(1 + r) as a sum of two; 1 + r is the sum relative to its largest term."""
    is_top = z == top
    if compensated:
        mantissa, _, exponent = exp_pair(*_difference(z, top))
        power = power_of_two(exponent + _LIFT)
        others, low = sum_pair(jnp.where(is_top, 0, mantissa * power))
    else:
        term, largest = near_exp(z - _anchor(top)), near_exp(top - _anchor(top))
        power = power_of_two(term.exponent - largest.exponent + _LIFT)
        others = _again(jnp.where(is_top, 0, term.mantissa * power))
        others = others.sum(-1, keepdims=True)
        others, low = others / largest.mantissa, jnp.zeros_like(others)
    # Further entries equal to the largest add 1 each.
    ties = jnp.maximum(is_top.sum(-1, keepdims=True) - 1, 0).astype(z.dtype)
    down = 2.0**-_LIFT
    total, error = exact_sum(ties, others * down)
    first, rest = log1p_pair(total, error + low * down)
    return jnp.where(top == jnp.inf, jnp.nan, first), rest


def _terms(z: Array, top: Array) -> tuple[ExtendedFloat, ExtendedFloat]:
    """The exponentials and their sum, relative to the anchor of the row."""
    term = near_exp(z - _anchor(top))
    # 0 in an empty row, relative to which its entries vanish.
    exponent = near_exp(finite(top) - _anchor(top)).exponent
    power = power_of_two(term.exponent - exponent)
    total = _again(term.mantissa * power).sum(-1, keepdims=True)
    return term, ExtendedFloat(total, exponent)


def _again(x: Array) -> Array:
    """`x` behind a barrier, so that XLA does not fuse its use with its computation."""
    return lax.optimization_barrier(x)


def _difference(z: Array, top: Array) -> tuple[Array, Array]:
    """The scores minus their largest, bounded below, with the rounding error."""
    high, low = exact_sum(z, -finite(top))
    # Scores far below vanish; their error may be NaN.
    low = jnp.where(high > BELOW_EXACT_RANGE, low, 0)
    return jnp.maximum(high, BELOW_EXACT_RANGE), low


def _largest(z: Array) -> Array:
    return z.max(-1, keepdims=True, initial=-jnp.inf)


def _anchor(top: Array) -> Array:
    return finite(anchor_of(top))


def _not_zero(total: Array) -> Array:
    return jnp.where(total == 0, 1, total)
