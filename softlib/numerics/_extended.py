"""Floats with a separate exponent: exponentials that never overflow or underflow.

Operations are functions and not methods of the pair: `+` of a named tuple joins tuples,
and `jax.lax.associative_scan` takes `extended_add` as it is.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._dtypes import accumulator_dtype, promoted
from softlib._error_free import (
    EXACT_RANGE,
    ExtendedFloat,
    exp_pair,
    exponent_of,
    power_of_two,
    scaled,
    times_log_2,
)


@array_arguments
def extended_exp(x: Float[Array, "*shape"]) -> ExtendedFloat:
    r"""$e^x$ as $m 2^n$ with $n = \mathrm{round}(x / \log 2)$, so that m is about 1.

    A sum of such numbers needs no maximum to be subtracted first: whatever is added,
    rounded or multiplied later stays in range.

    Args:
        x: At most 45000 in absolute value, or infinite.

    Returns:
        The mantissa, between 0.7 and 1.42 and right to 0.6 units of its last place, and
        the exponent, in the dtype of the sums. -inf gives the number 0, +inf an
        infinite mantissa and exponent. Beyond the range the mantissa is NaN: subtract
        a reference first, as `TwoPass` does.

    Raises:
        TypeError: `x` is no floating array.

    Derivatives: forward and reverse mode, any order; those of $e^x$, with exponents as
        constants.
    Cost: about 25 operations an element.
    Source: "The Two-Pass Softmax Algorithm". Its two parts of $\log 2$ need a fused
        multiplication to be exact; the four parts here need none.

    Example:
        >>> wide = softlib.numerics.extended_exp(jnp.array([0.0, -1000.0]))
        >>> print(wide.exponent)
        [    0. -1443.]
    """
    checks.require_floating("extended_exp", x=x)
    return _extended_exp(x.astype(accumulator_dtype(x)))


@array_arguments
def extended_add(a: ExtendedFloat, b: ExtendedFloat) -> ExtendedFloat:
    r"""$a + b$, with one rounding.

    Args:
        a: Of any shape.
        b: Of the same shape.

    Returns:
        The sum, with the larger exponent of the two. It is commutative to the last bit,
        and associative up to rounding.

    Derivatives: forward and reverse mode, any order, of the mantissas.
    Cost: a few operations an element, no exponential.
    Source: "The Two-Pass Softmax Algorithm".

    Example:
        >>> wide = softlib.numerics.extended_exp(jnp.array([1000.0]))
        >>> twice = softlib.numerics.extended_add(wide, wide)
        >>> print(twice.mantissa / wide.mantissa, twice.exponent - wide.exponent)
        [2.] [0.]
    """
    a, b = _alike(a, b)
    exponent = jnp.maximum(a.exponent, b.exponent)
    return ExtendedFloat(scaled(a, exponent) + scaled(b, exponent), exponent)


@array_arguments
def extended_multiply(a: ExtendedFloat, b: ExtendedFloat) -> ExtendedFloat:
    r"""$a b$: mantissas are multiplied, exponents added.

    Args:
        a: Of any shape.
        b: Of the same shape.

    Returns:
        The product, with a mantissa between 1 and 2 in absolute value, so that a
        chain of products stays in range.

    Derivatives: forward and reverse mode, any order, of the mantissas.
    Cost: a few operations an element.
    Source: "The Two-Pass Softmax Algorithm".

    Example:
        >>> wide = softlib.numerics.extended_exp(jnp.array([1000.0]))
        >>> one = softlib.numerics.extended_exp(jnp.array([0.0]))
        >>> same = softlib.numerics.extended_multiply(wide, one)
        >>> print(softlib.numerics.extended_log(same) // 1)
        [1000.]
    """
    a, b = _alike(a, b)
    mantissa = a.mantissa * b.mantissa
    exponent = lax.stop_gradient(a.exponent + b.exponent)
    shift = exponent_of(mantissa)
    return ExtendedFloat(mantissa * power_of_two(-shift), exponent + shift)


@array_arguments
def extended_sum(
    x: ExtendedFloat,
    axis: int | tuple[int, ...] | None = -1,
    *,
    where: Bool[Array, "..."] | None = None,
    keepdims: bool = False,
) -> ExtendedFloat:
    r"""$\sum_j m_j 2^{n_j}$ over axes.

    Args:
        x: Numbers of any size.
        axis: Static; the axis or axes that are summed, None for all.
        where: True for what counts; broadcasts to `x`. Others may hold anything.
        keepdims: Static; whether summed axes stay, with length 1.

    Returns:
        The sum, with the largest exponent that counts; 0 if nothing does.

    Raises:
        TypeError: `where` is not boolean.
        ValueError: `axis` is no axis of `x`, or `where` does not broadcast.

    Derivatives: forward and reverse mode, any order, of the mantissas.
    Cost: two passes over `x`: the largest exponent, the sum.
    Source: "The Two-Pass Softmax Algorithm".

    Example:
        >>> wide = softlib.numerics.extended_exp(jnp.full(8, -1000.0))
        >>> total = softlib.numerics.extended_sum(wide)
        >>> print(total.mantissa / wide.mantissa[0], total.exponent)
        8.0 -1443.0
    """
    shape = x.mantissa.shape
    checks.require_axes("extended_sum", "axis", axis, len(shape))
    if where is not None:
        checks.require_boolean("extended_sum", where=where)
        why = "the shape of `x`"
        checks.require_broadcastable("extended_sum", "where", where, shape, why)
        where = where.reshape((1,) * (len(shape) - where.ndim) + where.shape)
        x = ExtendedFloat(
            jnp.where(where, x.mantissa, 0), jnp.where(where, x.exponent, -jnp.inf)
        )
    most = x.exponent.max(axis, keepdims=True, initial=-jnp.inf)
    total = scaled(x, most).sum(axis, keepdims=keepdims)
    return ExtendedFloat(total, most.reshape(total.shape))


@array_arguments
def extended_log(x: ExtendedFloat) -> Float[Array, "*shape"]:
    r"""$\log(m 2^n) = \log m + n \log 2$, in nats.

    Args:
        x: Numbers of any size; negative ones have the logarithm NaN.

    Returns:
        The logarithm, -inf of 0. The large term $n \log 2$ is a sum of exact products,
        so that the error is that of the result and not of the terms.

    Derivatives: forward and reverse mode, any order, of the mantissas; 0 at 0.
    Cost: a logarithm an element.
    Source: "The Two-Pass Softmax Algorithm", which leaves the logarithm to the reader.

    Example:
        >>> wide = softlib.numerics.extended_exp(jnp.array([-jnp.inf, 0.0, 1024.0]))
        >>> print(softlib.numerics.extended_log(wide))
        [ -inf    0. 1024.]
    """
    empty = x.mantissa == 0
    mantissa = jnp.where(empty, 1, x.mantissa)
    exponent = lax.stop_gradient(jnp.where(empty, 0, x.exponent))
    large, small = times_log_2(exponent)
    found = large + (small + jnp.log(mantissa))
    return jnp.where(empty, -jnp.inf, found)


@array_arguments
def extended_to_float(x: ExtendedFloat) -> Float[Array, "*shape"]:
    r"""$m 2^n$ as an ordinary number.

    Args:
        x: Numbers of any size.

    Returns:
        The number; infinite or 0 where it leaves the range of the dtype.

    Derivatives: forward and reverse mode, any order, of the mantissas.
    Cost: a few operations an element.
    Source: "The Two-Pass Softmax Algorithm".

    Example:
        >>> wide = softlib.numerics.extended_exp(jnp.array([-1000.0, 0.0, 1000.0]))
        >>> print(softlib.numerics.extended_to_float(wide))
        [ 0.  1. inf]
    """
    # Three factors: each is in range for any mantissa, and all together reach beyond
    # both ends of the range.
    mantissa, exponent = x
    shift = exponent_of(mantissa)
    mantissa = mantissa * power_of_two(-shift)
    most = 2.0 * jnp.finfo(mantissa.dtype).maxexp
    exponent = jnp.clip(lax.stop_gradient(exponent) + shift, -most, most)
    half = jnp.floor(exponent / 2)
    return mantissa * power_of_two(half) * power_of_two(exponent - half)


def _alike(a: ExtendedFloat, b: ExtendedFloat) -> tuple[ExtendedFloat, ExtendedFloat]:
    """Casts both to the dtype that holds both."""
    of_a, exponent_of_a, of_b, exponent_of_b = promoted(*a, *b)
    return ExtendedFloat(of_a, exponent_of_a), ExtendedFloat(of_b, exponent_of_b)


@jax.custom_jvp
def _extended_exp(x: Array) -> ExtendedFloat:
    inside = jnp.abs(x) <= EXACT_RANGE
    mantissa, _, exponent = exp_pair(jnp.where(inside, x, 0))
    # NaN stays what it is, and beyond the range nothing is known.
    special = jnp.where(x == -jnp.inf, 0, jnp.where(x == jnp.inf, x, jnp.nan))
    return ExtendedFloat(
        jnp.where(inside, mantissa, special),
        jnp.where(inside, exponent, jnp.where(jnp.isinf(x), x, jnp.nan)),
    )


@_extended_exp.defjvp
def _(primals, tangents):
    (x,), (dx,) = primals, tangents
    y = _extended_exp(x)
    return y, ExtendedFloat(y.mantissa * dx, jnp.zeros_like(y.exponent))
