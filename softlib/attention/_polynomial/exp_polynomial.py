"""Polynomials for exp on an interval, with a certificate of their relative error.

With T_i(y) = sum_k t_ik y^k, the truncated Chebyshev series of exp on [-R, R],

    P(x) = sum_{i <= g} e_i I_i(R) T_i(x / R),    e_0 = 1, e_i = 2,
    I_i(R) = sum_j (R/2)^{2j+i} / (j! (i+j)!),

has monomial coefficients f_k / k! with (i = k + 2h, j = l - h)

    f_k(R) = sum_l a_kl R^{2l},
    a_kl = k! sum_h e_i t_ik 2^{-2l-k} / ((l-h)! (k+h+l)!),    h <= min(l, (g-k)/2).

Nothing is divided by a power of R, and f_k(0) = 1 as for the Taylor series. The t_ik
grow like 2.4^i and alternate, so a conversion in floating point would lose digits: the
a_kl are rounded once, from fractions. Those of 0 < l <= (g-k)/2 vanish. The same table
serves numbers and arrays.
"""

import functools
import math
from fractions import Fraction
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from softlib import _checks
from softlib._compiled_once import compiled_once

type Basis = Literal["chebyshev", "taylor"]

BASES = ("chebyshev", "taylor")
# Rounding errors of monomials grow by e^{2R}: beyond this bound a double has no correct
# digits.
LARGEST_BOUND = 18.0


def exp_polynomial(
    bound: float, rtol: float, *, basis: Basis = "chebyshev"
) -> np.ndarray:
    r"""Coefficients of the shortest polynomial certified for exp on an interval.

    $$|P(x) - e^x| \leq \mathrm{rtol}\; e^x \quad \text{for} \quad |x| \leq R$$

    with $R$ the `bound`, and the degree $g$ the least for which theory promises that:
    $e^R R^{g+1} / (g+1)! \leq \mathrm{rtol}$ for the Taylor series at 0,
    $2 e^R \sum_{i > g} I_i(R) \leq \mathrm{rtol}$, with Bessel functions $I_i$, for the
    truncated Chebyshev series. The Chebyshev polynomial has a degree lower by a fourth
    at $R = 1$ and by a third at $R = 3.4$, which halves the number of monomials in a
    few variables, or does better.

    Args:
        bound: Static; $R$, a positive number up to 18.
        rtol: Static; relative error, below 1.
        basis: Static; "chebyshev" or "taylor". The coefficients are those of monomials
            either way.

    Returns:
        NumPy float64; entry $k$ belongs to $x^k$.

    Raises:
        TypeError: `bound` or `rtol` is no Python number.
        ValueError: A number is out of range, or no degree is of use: evaluating
            monomials in float64 loses up to $2^{-52} e^{2R}$ of $e^x$, whatever their
            number, and `rtol` must be at least that.

    Derivatives: none; the arguments are static.
    Cost: milliseconds on the host; tables of the degree are kept.
    Source: "How to Capture Higher-order Correlations? Generalizing Matrix Softmax
        Attention to Kronecker Computation" uses such a polynomial. The certificates are
        the Lagrange remainder and the sum of the Chebyshev coefficients left out.

    Example:
        >>> print(softlib.attention.exp_polynomial(1.0, 0.1, basis="taylor").round(3))
        [1.    1.    0.5   0.167 0.042]
        >>> print(softlib.attention.exp_polynomial(1.0, 0.1).round(3))
        [0.995 0.997 0.543 0.177]
    """
    degree = certified_degree("exp_polynomial", bound, rtol, basis, "bound")
    factorials = np.array([math.factorial(k) for k in range(degree + 1)], np.float64)
    return taylor_factors(float(bound), degree, basis) / factorials


def exp_polynomial_error(
    bound: float, degree: int, *, basis: Basis = "chebyshev"
) -> float:
    r"""Certified relative error of the polynomial of a degree for exp on an interval.

    The least number known to be at least $|P(x) - e^x| / e^x$ for all $|x| \leq R$, $R$
    the `bound`: $e^R R^{g+1} / (g+1)!$ for the Taylor polynomial of degree $g$ and
    $2 e^R \sum_{i > g} I_i(R)$ for the Chebyshev polynomial. `exp_polynomial` takes the
    first degree for which it is small enough.

    Args:
        bound: Static; $R$, positive.
        degree: Static; $g$, 0 or more.
        basis: Static; "chebyshev" or "taylor".

    Returns:
        A Python float; inf if it is too large for one. It holds in exact arithmetic:
        rounding is not in it, that of its own computation is.

    Raises:
        TypeError: `bound` is no Python number or `degree` no int.
        ValueError: A number is out of range.

    Derivatives: none; the arguments are static.
    Cost: microseconds on the host.
    Source: as `exp_polynomial`. The sum of Bessel functions is that of their positive
        series; what is left out of each series is bounded by a geometric one and added.

    Example:
        >>> print(f"{softlib.attention.exp_polynomial_error(1.0, 4):.1e}")
        1.6e-03
    """
    function = "exp_polynomial_error"
    _checks.require_positive_number(function, "bound", bound)
    require_degree(function, degree)
    _checks.require_one_of(function, "basis", basis, BASES)
    return _error(float(bound), degree, basis)


def certified_degree(
    function: str, bound: float, rtol: float, basis: Basis, name: str
) -> int:
    """The least degree of a polynomial within `rtol`; `name` is that of `bound`."""
    require_bound(function, name, bound)
    _checks.require_positive_number(function, "rtol", rtol)
    _checks.require_one_of(function, "basis", basis, BASES)
    if rtol >= 1:
        raise ValueError(f"{function}: `rtol` must be below 1, got {rtol}.")
    rounding = math.exp(2 * bound) * 2.0**-52
    if rtol < rounding:
        raise ValueError(
            f"{function}: `rtol` must be at least {rounding:.2g} if `{name}` is "
            f"{bound}, which is what float64 monomials round to, got {rtol}."
        )
    degree = 0
    while _error(float(bound), degree, basis) > rtol:
        degree += 1
    return degree


def require_bound(function: str, name: str, bound: float) -> None:
    _checks.require_positive_number(function, name, bound)
    if bound > LARGEST_BOUND:
        raise ValueError(
            f"{function}: `{name}` must be at most {LARGEST_BOUND:g}, beyond which "
            f"float64 monomials have no digits left, got {bound}."
        )


def require_degree(function: str, degree: int, most: int | None = None) -> None:
    if isinstance(degree, bool) or not isinstance(degree, int):
        raise TypeError(
            f"{function}: `degree` must be a Python int (it is static), "
            f"got {type(degree).__name__}."
        )
    if degree < 0:
        raise ValueError(f"{function}: `degree` must be non-negative, got {degree}.")
    if most is not None and degree > most:
        raise ValueError(f"{function}: `degree` must be at most {most}, got {degree}.")


def taylor_factors(bound: float, degree: int, basis: Basis) -> np.ndarray:
    """The factors f_k of the terms f_k x^k / k! of the polynomial, in float64."""
    if basis == "taylor":
        return np.ones(degree + 1)
    square, found = (bound / LARGEST_BOUND) ** 2, np.zeros(degree + 1)
    for column in reversed(_series(degree).T):
        found = found * square + column
    return found


@compiled_once(1)
def taylor_factors_by_row(bound: Array, degree: int) -> Array:
    """Chebyshev factors per row: (groups, rows) -> (groups, degree + 1, rows)."""
    square = (bound / LARGEST_BOUND) ** 2
    columns = jnp.asarray(_series(degree).T[::-1], bound.dtype)

    def step(found: Array, column: Array) -> tuple[Array, None]:
        return found * square[:, None, :] + column[None, :, None], None

    zeros = jnp.broadcast_to(
        0 * square[:, None, :], (bound.shape[0], degree + 1, bound.shape[1])
    )
    return lax.scan(step, zeros, columns)[0]


def _error(bound: float, degree: int, basis: Basis) -> float:
    try:
        largest = math.exp(bound)
    except OverflowError:
        return math.inf
    if basis == "taylor":
        found = math.prod(bound / j for j in range(1, degree + 2)) * largest
    else:
        found = 2 * largest * _bessel_tail(bound, degree)
    # Rounded up by far more than the error of the sums, whose terms are positive.
    return math.nextafter(found * (1 + 1e-12), math.inf)


def _bessel_tail(x: float, order: int) -> float:
    """An upper bound of the sum of I_i(x) over i > order."""
    total = 0.0
    while True:
        order += 1
        bessel = _bessel(x, order)
        total += bessel
        # I_{i+1} / I_i < ratio holds term by term, and the ratio falls with i.
        ratio = x / (2 * (order + 1))
        if ratio < 0.5 and bessel <= 1e-17 * total:
            return total + bessel * ratio / (1 - ratio)


def _bessel(x: float, order: int) -> float:
    """An upper bound of I_order(x)."""
    term = math.prod(x / (2 * j) for j in range(1, order + 1))
    total, j = 0.0, 0
    while True:
        total += term
        j += 1
        term *= x * x / (4 * j * (order + j))
        ratio = x * x / (4 * (j + 1) * (order + j + 1))
        if ratio < 0.5 and term <= 1e-17 * total:
            return total + term / (1 - ratio)


@functools.lru_cache(maxsize=32)
def _series(degree: int) -> np.ndarray:
    """Coefficients a_kl LARGEST_BOUND^{2l} of powers of R / LARGEST_BOUND, by k and l.

    This scale keeps them in the range of float32; the terms suffice for float64.
    """
    chebyshev = _chebyshev(degree)
    square = int(LARGEST_BOUND) ** 2
    columns: list[list[float]] = []
    while True:
        l = len(columns)
        columns.append(
            [
                float(Fraction(_numerator(chebyshev, k, l) * square**l, _scale(k, l)))
                for k in range(degree + 1)
            ]
        )
        series = np.array(columns).T
        # Tests the second half of every row: the first entries may vanish.
        if l > degree // 2 + 4:
            largest = np.abs(series).max(1)
            if (np.abs(series[:, -1]) <= 2.0**-58 * largest).all():
                return series


def _scale(k: int, l: int) -> int:
    return math.factorial(l) * math.factorial(k + 2 * l) * 2 ** (2 * l + k)


def _numerator(chebyshev: list[list[int]], k: int, l: int) -> int:
    """The integer a_kl times `_scale` (h <= l)."""
    total = 0
    for h in range(min(l, (len(chebyshev) - 1 - k) // 2) + 1):
        i = k + 2 * h
        weight = (1 if i == 0 else 2) * chebyshev[i][k]
        falling = math.factorial(l) // math.factorial(l - h)
        rising = math.factorial(k + 2 * l) // math.factorial(k + h + l)
        total += weight * falling * rising
    return math.factorial(k) * total


def _chebyshev(degree: int) -> list[list[int]]:
    """Coefficients of Chebyshev polynomials: entry [i][k] is that of y^k in T_i."""
    found = [[1] + [0] * degree]
    if degree:
        found.append([0, 1] + [0] * (degree - 1))
    while len(found) <= degree:
        doubled = [0] + [2 * c for c in found[-1][:-1]]
        found.append([a - b for a, b in zip(doubled, found[-2], strict=True)])
    return found
