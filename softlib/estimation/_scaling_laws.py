"""Straight lines through logarithms: scaling laws, with intervals of their numbers."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._compiled_once import compiled_once
from softlib._dtypes import accumulator_dtype


class LogLinearFit(NamedTuple):
    """The result of `fit_log_linear`.

    Attributes:
        slope: $a$, the change of $y$ with each tenfold of each column of $x$.
        intercept: $b$.
        slope_interval: Lower and upper end for each slope.
        intercept_interval: Lower and upper end.
        r_squared: Share of the variance of $y$ that the line explains.
    """

    slope: Float[Array, "*columns"]
    intercept: Float[Array, ""]
    slope_interval: Float[Array, "*columns 2"]
    intercept_interval: Float[Array, "2"]
    r_squared: Float[Array, ""]


class PowerLawFit(NamedTuple):
    r"""The result of `fit_power_law`.

    Attributes:
        exponent: $a$, one for each column of $x$.
        factor: $c$.
        exponent_interval: Lower and upper end for each exponent.
        factor_interval: Lower and upper end.
        r_squared: Share of the variance of $\log y$ that the law explains.
    """

    exponent: Float[Array, "*columns"]
    factor: Float[Array, ""]
    exponent_interval: Float[Array, "*columns 2"]
    factor_interval: Float[Array, "2"]
    r_squared: Float[Array, ""]


@array_arguments
def fit_log_linear(
    x: Float[Array, " n *columns"],
    y: Float[Array, " n"],
    *,
    level: float = 0.95,
    where: Bool[Array, " n"] | None = None,
) -> LogLinearFit:
    r"""Fits $y = a \log_{10} x + b$ by least squares, with intervals of its numbers.

    With several columns $y = \sum_k a_k \log_{10} x_k + b$, as of the acceptance of a
    draft in its training tokens, its parameters and the batch. The intervals are those
    of Student: they hold the true number in a share `level` of all cases if the errors
    of $y$ are independent and normal with one variance. They say nothing about whether
    the law is straight: look at the residuals.

    Args:
        x: Positive, (n,) or (n, columns).
        y: One number for each.
        level: Static, in (0, 1).
        where: True for the points that count; the others may hold anything.

    Returns:
        `LogLinearFit`, float32 (float64 if an argument is). NaN if an $x$ that counts
        is not positive, or if the points do not determine the numbers; the intervals
        are NaN if no point is left over.

    Raises:
        TypeError: An array is not floating, or `where` is not boolean.
        ValueError: Shapes do not fit together, or `level` is out of range.

    Derivatives: forward and reverse, by `x` and `y`.
    Cost: O(n columns^2).
    Source: "Scaling Laws for Speculative Decoding" has the law; the method is the
        textbook's.

    Example:
        >>> tokens = jnp.array([1e3, 1e4, 1e5, 1e6])
        >>> fit = softlib.estimation.fit_log_linear(
        ...     tokens, jnp.array([0.1, 0.2, 0.3, 0.4]))
        >>> print(fit.slope.round(3), fit.intercept.round(3), fit.r_squared.round(3))
        0.1 -0.2 1.0
    """
    x, y = _checked("fit_log_linear", x, y, level)
    where = checks.checked_where("fit_log_linear", where, y.shape, "the shape of `y`")
    # Where nothing counts, the logarithm and its derivative stay finite.
    logs = jnp.log10(jnp.where(where[:, None], _columns(x), 1))
    return _shaped(_fitted(logs, y, where, level), x)


@array_arguments
def fit_power_law(
    x: Float[Array, " n *columns"],
    y: Float[Array, " n"],
    *,
    level: float = 0.95,
    where: Bool[Array, " n"] | None = None,
) -> PowerLawFit:
    r"""Fits $y = c \prod_k x_k^{a_k}$ by least squares of logarithms, with intervals.

    The errors are factors of $y$. A law with a floor, $y = y_0 + c\,x^a$, is a line in
    the logarithms of $y - y_0$, of a $y_0$ that is known.

    Args:
        x: Positive, (n,) or (n, columns).
        y: Positive, one number for each.
        level: Static, in (0, 1); of the intervals of Student, as in `fit_log_linear`.
        where: True for the points that count; the others may hold anything.

    Returns:
        `PowerLawFit`, float32 (float64 if an argument is); NaN as there, and if a $y$
        that counts is not positive.

    Raises:
        TypeError: As there.
        ValueError: As there.

    Derivatives: forward and reverse, by `x` and `y`.
    Cost: O(n columns^2).
    Source: "Scaling Laws for Neural Language Models" has such laws.

    Example:
        >>> x = jnp.array([1.0, 4.0, 16.0])
        >>> fit = softlib.estimation.fit_power_law(x, 3 / jnp.sqrt(x))
        >>> print(f"{fit.exponent:.3f} {fit.factor:.3f}")
        -0.500 3.000
    """
    x, y = _checked("fit_power_law", x, y, level)
    where = checks.checked_where("fit_power_law", where, y.shape, "the shape of `y`")
    logs = jnp.log(jnp.where(where[:, None], _columns(x), 1))
    fit = _fitted(logs, jnp.log(jnp.where(where, y, 1)), where, level)
    fit = _shaped(fit, x)
    return PowerLawFit(
        fit.slope,
        jnp.exp(fit.intercept),
        fit.slope_interval,
        jnp.exp(fit.intercept_interval),
        fit.r_squared,
    )


def _checked(function: str, x: Array, y: Array, level: float) -> tuple[Array, Array]:
    checks.require_floating(function, x=x, y=y)
    if not (isinstance(level, int | float) and 0 < level < 1):
        raise ValueError(f"{function}: `level` must be in (0, 1), got {level}.")
    if x.ndim not in (1, 2):
        raise ValueError(
            f"{function}: `x` must be (n,) or (n, columns), got {x.shape}."
        )
    checks.require_shape(function, "y", y, x.shape[:1], "one per point of `x`")
    dtype = accumulator_dtype(x, y)
    return x.astype(dtype), y.astype(dtype)


def _columns(x: Array) -> Array:
    return x[:, None] if x.ndim == 1 else x


def _shaped(fit: LogLinearFit, x: Array) -> LogLinearFit:
    if x.ndim == 2:
        return fit
    return fit._replace(slope=fit.slope[0], slope_interval=fit.slope_interval[0])


@compiled_once(3)
def _fitted(x: Array, y: Array, where: Array, level: float) -> LogLinearFit:
    """Least squares with an intercept, of columns (n, k)."""
    n, columns = x.shape
    weight = where.astype(x.dtype)
    count = weight.sum()
    mean = lambda array: (
        jnp.where(where[:, None], array, 0).sum(0) / jnp.maximum(count, 1)
    )
    x_mean, y_mean = mean(x), mean(y[:, None])[0]
    centred = jnp.where(where[:, None], x - x_mean[None], 0)
    rest = jnp.where(where, y - y_mean, 0)
    # With fewer points than columns there is no triangle.
    centred = jnp.pad(centred, ((0, max(columns - n, 0)), (0, 0)))
    padded = jnp.pad(rest, (0, max(columns - n, 0)))
    q, r = jnp.linalg.qr(centred)
    solve = lambda right, transposed: lax.linalg.triangular_solve(
        r, right, left_side=True, lower=False, transpose_a=transposed
    )
    product = lambda a, b: jnp.matmul(a, b, precision="highest")
    slope = solve(product(q.T, padded[:, None]), False)[:, 0]
    residual = jnp.where(where, rest - product(centred[:n], slope), 0)
    errors, total = (residual**2).sum(), (rest**2).sum()
    freedom = count - columns - 1
    variance = jnp.where(freedom > 0, errors / jnp.maximum(freedom, 1), jnp.nan)
    inverse = solve(jnp.eye(columns, dtype=x.dtype), False)
    lever = solve(x_mean[:, None], True)[:, 0]
    far = _student_quantile(lax.stop_gradient(freedom), level)
    slope_error = jnp.sqrt(variance * (inverse**2).sum(1))
    intercept_error = jnp.sqrt(variance * (1 / count + (lever**2).sum()))
    ends = jnp.array([-1, 1], x.dtype) * far
    # Columns that are constant or depend on each other: rounding leaves something.
    size = jnp.abs(jnp.diagonal(r))
    scale = jnp.sqrt((centred**2).sum(0)) + jnp.abs(x_mean) * jnp.sqrt(count)
    determined = (size > 10 * n * jnp.finfo(x.dtype).eps * scale).all()
    determined &= count > columns
    known = lambda value: jnp.where(determined, value, jnp.nan)
    intercept = y_mean - (slope * x_mean).sum()
    return LogLinearFit(
        known(slope),
        known(intercept),
        known(slope[:, None] + slope_error[:, None] * ends[None]),
        known(intercept + intercept_error * ends),
        known(1 - errors / total),
    )


def _student_quantile(freedom: Array, level: float) -> Array:
    """The number that a Student variable exceeds in absolute value by 1 - level."""
    # P(|t| > a) is the incomplete beta function of f / (f + a^2), which grows.
    half = jnp.maximum(freedom, 1) / 2

    def narrower(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        beyond = jax.scipy.special.betainc(
            half, jnp.full_like(half, 0.5), jnp.exp(middle)
        )
        return (
            jnp.where(beyond < 1 - level, middle, low),
            jnp.where(beyond < 1 - level, high, middle),
        )

    # Of the logarithm, since it is tiny for one degree of freedom.
    ends = jnp.full_like(half, -80), jnp.zeros_like(half)
    low, high = lax.fori_loop(0, 60, narrower, ends)
    inside = jnp.exp((low + high) / 2)
    # 1 - inside, without cancellation where it is near 1.
    return jnp.sqrt(2 * half * -jnp.expm1((low + high) / 2) / inside)
