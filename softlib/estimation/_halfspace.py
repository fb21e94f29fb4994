r"""Halfspaces from noisy signs, and tests of whether the learner can be trusted.

The learner descends on the sphere; the tester asks of the sample what the proof of the
learner asks of the law: that it looks Gaussian near the boundary and in low moments.
"""

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Num

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._compiled_once import compiled_once
from softlib._dtypes import accumulator_dtype
from softlib.losses import smoothed_zero_one_loss
from softlib.typing import Scalar

_matmul = functools.partial(jnp.matmul, precision="highest")


class HalfspaceFit(NamedTuple):
    """The result of `fit_halfspace`.

    Attributes:
        direction: A unit vector: the halfspace is where `x @ direction > 0`. 0 if
            there is nothing to learn from.
        initial: Where the descent began, a unit vector.
        loss: Mean smoothed error at the last width.
        gradient_norm: Of `loss` on the sphere: small at a stationary point.
        error: Share of the examples on the wrong side.
    """

    direction: Float[Array, "*batch D"]
    initial: Float[Array, "*batch D"]
    loss: Float[Array, "*batch"]
    gradient_norm: Float[Array, "*batch"]
    error: Float[Array, "*batch"]


class StripStatistics(NamedTuple):
    """Numbers of `strip_statistics` near a boundary; 1 for a standard normal law.

    Attributes:
        mass_ratio: Share of the examples in the strip over that of the normal law.
        least_eigenvalue: Of their second moments orthogonal to the direction.
        largest_eigenvalue: The same.
        count: Examples in the strip.
    """

    mass_ratio: Float[Array, "*batch"]
    least_eigenvalue: Float[Array, "*batch"]
    largest_eigenvalue: Float[Array, "*batch"]
    count: Float[Array, "*batch"]


class HalfspaceDisagreement(NamedTuple):
    """The result of `halfspace_disagreement`.

    Attributes:
        share: Of the examples that two halfspaces tell apart; 0 without any.
        angle_share: What it is under rotations: the angle over half a turn.
    """

    share: Float[Array, "*batch"]
    angle_share: Float[Array, "*batch"]


class HalfspaceTest(NamedTuple):
    """The result of `halfspace_tester`.

    Attributes:
        accepted: Whether all four tests are passed.
        mass: Whether the strip holds as many examples as it should.
        covariance: Whether their second moments are near those of the normal law.
        disagreement: Whether the two halfspaces differ as their angle says.
        moments: Whether all moments are near.
        strip: What was measured in the strip.
        excess_disagreement: Share of examples on which the two halfspaces differ, less
            what it is for a normal law.
        moment_deviations: As `gaussian_moment_deviations` of all monomials.
    """

    accepted: Bool[Array, "*batch"]
    mass: Bool[Array, "*batch"]
    covariance: Bool[Array, "*batch"]
    disagreement: Bool[Array, "*batch"]
    moments: Bool[Array, "*batch"]
    strip: StripStatistics
    excess_disagreement: Float[Array, "*batch"]
    moment_deviations: Float[Array, "*batch degree"]


@array_arguments
def fit_halfspace(
    x: Float[Array, "n D"],
    signs: Num[Array, " n"],
    *,
    initial: Float[Array, " D"] | None = None,
    widths: tuple[float, ...] = (0.3, 0.1, 0.05),
    steps_per_width: int = 300,
    step_size: Scalar = 2.0,
    where: Bool[Array, " n"] | None = None,
) -> HalfspaceFit:
    r"""A halfspace through the origin by descent on the smoothed error.

    Minimises the mean of $\sigma(-y \langle u, x \rangle / s)$ over unit vectors $u$,
    one width $s$ after the other, each from where the last ended. A step is the
    gradient without its part along $u$, times `step_size` and the width, and the
    result is scaled to length 1. The loss is not convex; under a law that
    `halfspace_tester` accepts, stationary points are near the best halfspace.

    Args:
        x: The features, one example a row, of about unit variance.
        signs: $y_i$, +1 or -1 of any real dtype. Others make the result NaN.
        initial: Where to begin, of any length but 0; None is the mean of $y_i x_i$.
        widths: Static; positive, falling in general.
        steps_per_width: Static.
        step_size: In units of the width; a number is static, an array traced.
        where: True for the examples that count; elsewhere `x` and `signs` may hold
            anything.

    Returns:
        `HalfspaceFit`, float32 (float64 if `x` is).

    Raises:
        TypeError: An array has the wrong kind of dtype, or an option the wrong type.
        ValueError: Shapes do not fit together, or an option is out of range.

    Derivatives: forward and reverse mode through the steps, which are then all kept.
    Cost: two products with `x` a step.
    Source: "An Efficient Tester-Learner for Halfspaces". Deviation: descent with the
        gradient of the whole sample instead of stochastic gradients.

    Example:
        >>> x = jax.random.normal(jax.random.key(0), (500, 2))
        >>> signs = jnp.where(x[:, 0] > 0, 1, -1)
        >>> fit = softlib.estimation.fit_halfspace(x, signs)
        >>> print(abs(fit.direction.round(1)), fit.error < 0.01)
        [1. 0.] True
    """
    function = "fit_halfspace"
    x, keep = _sample(function, x, where)
    count, features = x.shape
    checks.require_shape(function, "signs", signs, (count,), "rows of `x`")
    checks.require_positive_integer(function, "steps_per_width", steps_per_width)
    checks.require_positive_scalars(function, step_size=step_size)
    checks.require_instance(function, "widths", widths, tuple, "a tuple of numbers")
    if not widths:
        raise ValueError(f"{function}: `widths` must hold at least one number, got ().")
    for width in widths:
        checks.require_positive_number(function, "widths", width)
    if initial is not None:
        checks.require_floating(function, initial=initial)
        why = "columns of `x`"
        checks.require_shape(function, "initial", initial, (features,), why)
    y = signs.astype(x.dtype)
    y = jnp.where((y == 1) | (y == -1), y, jnp.nan)
    signed = jnp.where(keep[:, None], y[:, None] * x, 0)
    start = signed.sum(0) if initial is None else initial.astype(x.dtype)
    return _descend(
        signed, keep, start, jnp.asarray(step_size, x.dtype), widths, steps_per_width
    )


@array_arguments
def strip_statistics(
    x: Float[Array, "n D"],
    direction: Float[Array, " D"],
    *,
    width: Scalar,
    where: Bool[Array, " n"] | None = None,
) -> StripStatistics:
    r"""Mass and second moments of the examples near the boundary of a halfspace.

    Of the strip $|\langle u, x \rangle| \leq s$ around $u = w / |w|$: the share of the
    examples in it over $\operatorname{erf}(s / \sqrt2)$, and the extreme eigenvalues of
    the mean of $x x^T$ in it, on the space orthogonal to $u$.

    Args:
        x: The sample.
        direction: $w$, of any length but 0.
        width: $s > 0$; a number is static, an array traced.
        where: True for the examples that count; elsewhere `x` may hold anything.

    Returns:
        `StripStatistics`, float32 (float64 if an argument is). All are 0 if no example
        is in the strip, and NaN for a direction of 0.

    Raises:
        TypeError: An array has the wrong kind of dtype.
        ValueError: Shapes do not fit together, D is below 2, or `width` is not
            positive.

    Derivatives: none that are useful; the strip is a step.
    Cost: O(n D^2 + D^3).
    Source: "An Efficient Tester-Learner for Halfspaces".

    Example:
        >>> x = jnp.array([[0.0, 1.0], [0.0, -2.0], [5.0, 9.0]])
        >>> axis = jnp.array([1.0, 0.0])
        >>> found = softlib.estimation.strip_statistics(x, axis, width=1.0)
        >>> print(found.count, found.largest_eigenvalue)
        2.0 2.5
    """
    function = "strip_statistics"
    x, keep = _sample(function, x, where)
    x, (direction,) = _directions(function, x, direction=direction)
    checks.require_positive_scalars(function, width=width)
    return _strip(x, direction, jnp.asarray(width, x.dtype), keep)


@array_arguments
def gaussian_moment_deviations(
    x: Float[Array, "n D"],
    *,
    degree: int,
    mixed: bool = False,
    where: Bool[Array, " n"] | None = None,
) -> Float[Array, " degree"]:
    r"""Largest deviations of moments from those of the standard normal law.

    For each $k$ from 1 to `degree` the largest
    $|\mathbb{E}_n x^\alpha - \mathbb{E}_N x^\alpha|$ over the powers $x_j^k$ of single
    features, or `mixed` over all monomials $x^\alpha$ of degree $k$.

    Args:
        x: The sample.
        degree: Static; the highest degree, at least 1.
        mixed: Static; whether products of different features count.
        where: True for the examples that count; elsewhere `x` may hold anything.

    Returns:
        The deviations from degree 1 on, float32 (float64 if `x` is). Without an
        example the moments count as 0.

    Raises:
        TypeError: An array has the wrong kind of dtype, or `degree` is no Python int.
        ValueError: Shapes do not fit together, or `degree` is below 1.

    Derivatives: forward and reverse mode, those of the largest entry.
    Cost: O(n D `degree`); mixed O(n D^k) time and O(n D^(k / 2) + D^k) memory for the
        highest degree k.
    Source: "An Efficient Tester-Learner for Halfspaces".

    Example:
        >>> x = jnp.array([[1.0], [-1.0]])
        >>> print(softlib.estimation.gaussian_moment_deviations(x, degree=4))
        [0. 0. 0. 2.]
    """
    function = "gaussian_moment_deviations"
    x, keep = _sample(function, x, where)
    checks.require_positive_integer(function, "degree", degree)
    number = jnp.maximum(keep.sum(dtype=x.dtype), 1)
    found = []
    for k in range(1, degree + 1):
        if mixed:
            high, low = (
                _monomials(x.shape[1], (k + 1) // 2),
                _monomials(x.shape[1], k // 2),
            )
            one = jnp.where(keep[:, None], _evaluated(x, high), 0)
            moments = _matmul(one.T, _evaluated(x, low)) / number
            wanted = jnp.asarray(_normal_moments(x.shape[1], high, low), x.dtype)
        else:
            powers = jnp.where(keep[:, None], x**k, 0)
            moments = powers.sum(0) / number
            wanted = jnp.full(x.shape[1:], _double_factorial(k), x.dtype)
        found.append(jnp.abs(moments - wanted).max(initial=0))
    return jnp.stack(found)


@array_arguments
def halfspace_disagreement(
    x: Float[Array, "n D"],
    direction: Float[Array, " D"],
    other: Float[Array, " D"],
    *,
    where: Bool[Array, " n"] | None = None,
) -> HalfspaceDisagreement:
    r"""The share of examples that two halfspaces tell apart, and that by their angle.

    The share of the examples with different signs of $\langle u, x \rangle$ and
    $\langle v, x \rangle$, and $\angle(u, v) / \pi$, which it is for every law that
    does not change under rotations.

    Args:
        x: The sample.
        direction: $u$, of any length but 0.
        other: $v$, the same.
        where: True for the examples that count; elsewhere `x` may hold anything.

    Returns:
        `HalfspaceDisagreement`, float32 (float64 if an argument is).

    Raises:
        TypeError: An array has the wrong kind of dtype.
        ValueError: Shapes do not fit together, or D is below 2.

    Derivatives: those of the angle; the share is a step.
    Cost: O(n D).
    Source: "An Efficient Tester-Learner for Halfspaces".

    Example:
        >>> x = jnp.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 2.0], [2.0, 1.0]])
        >>> one, two = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
        >>> print(*softlib.estimation.halfspace_disagreement(x, one, two))
        0.5 0.5
    """
    function = "halfspace_disagreement"
    x, keep = _sample(function, x, where)
    x, (u, v) = _directions(function, x, direction=direction, other=other)
    return HalfspaceDisagreement(*_disagreement(x, u, v, keep))


@array_arguments
def halfspace_tester(
    x: Float[Array, "n D"],
    direction: Float[Array, " D"],
    other: Float[Array, " D"],
    *,
    width: Scalar = 0.2,
    degree: int = 4,
    failure_probability: float = 0.05,
    where: Bool[Array, " n"] | None = None,
) -> HalfspaceTest:
    r"""Whether the sample looks as the guarantee of `fit_halfspace` needs it.

    Four tests, each with a quarter of the failure probability, $\delta$:

    - the mass of the strip around `direction`, within Hoeffding's
      $\sqrt{\log(2 / \delta) / 2n}$ of the normal law's;
    - the eigenvalues of its second moments between $(1 \mp \sqrt{D / m} \mp
      \sqrt{2 \log(2 / \delta) / m})^2$ for its $m$ examples, the bound of Davidson and
      Szarek;
    - the disagreement of the two directions, within Hoeffding's of their angle;
    - all moments up to `degree`, whose deviation over $\sqrt{(2k - 1)!! / n}$ is at
      most the $\delta$-quantile of as many normal variables, which takes $n$ to be
      large.

    A sample of the standard normal law is accepted with a probability of at least $1 -
    4 \delta$, if the directions do not depend on it. Thresholds shrink with $n$:
    enough examples tell any other law from it.

    Args:
        x: The sample, of zero mean and unit variance.
        direction: $u$, as `HalfspaceFit.direction`.
        other: $v$ to compare it with, as `HalfspaceFit.initial`.
        width: Of the strip; a number is static, an array traced.
        degree: Static; of the moments.
        failure_probability: Static; $4 \delta$ in (0, 1).
        where: True for the examples that count; elsewhere `x` may hold anything.

    Returns:
        `HalfspaceTest`. A sample without examples, and one with NaN, is rejected.

    Raises:
        TypeError: An array has the wrong kind of dtype, or an option the wrong type.
        ValueError: Shapes do not fit together, D is below 2, or an option is out of
            range.

    Derivatives: none; the result is a decision.
    Cost: as `gaussian_moment_deviations` with all monomials.
    Source: "An Efficient Tester-Learner for Halfspaces". Its thresholds are constants
        that are not given; these are those of sampling.

    Example:
        >>> x = jax.random.normal(jax.random.key(0), (2000, 3))
        >>> one, two = jnp.array([1.0, 0.0, 0.0]), jnp.array([1.0, 0.2, 0.0])
        >>> tester = softlib.estimation.halfspace_tester
        >>> print(tester(x, one, two).accepted, tester(x**3, one, two).accepted)
        True False
    """
    function = "halfspace_tester"
    x, keep = _sample(function, x, where)
    x, (u, v) = _directions(function, x, direction=direction, other=other)
    checks.require_positive_scalars(function, width=width)
    checks.require_positive_integer(function, "degree", degree)
    checks.require_positive_number(function, "failure_probability", failure_probability)
    checks.require_below(function, "failure_probability", failure_probability, 1)
    dtype, features = x.dtype, x.shape[1]
    delta = failure_probability / 4
    number = keep.sum(dtype=dtype)
    known = jnp.maximum(number, 1)
    hoeffding = jnp.sqrt(math.log(2 / delta) / (2 * known))
    strip = _strip(x, u, jnp.asarray(width, dtype), keep)
    normal = jax.scipy.special.erf(jnp.asarray(width, dtype) / math.sqrt(2))
    mass = jnp.abs(strip.mass_ratio - 1) * normal <= hoeffding
    inside = jnp.maximum(strip.count, 1)
    root = jnp.sqrt(features / inside) + jnp.sqrt(2 * math.log(2 / delta) / inside)
    covariance = (strip.largest_eigenvalue <= (1 + root) ** 2) & (
        strip.least_eigenvalue >= jnp.maximum(1 - root, 0) ** 2
    )
    share, angle = _disagreement(x, u, v, keep)
    disagreement = jnp.abs(share - angle) <= hoeffding
    deviations = gaussian_moment_deviations(x, degree=degree, mixed=True, where=keep)
    limits = jnp.asarray(_moment_limits(features, degree, delta), dtype)
    moments = (deviations <= limits / jnp.sqrt(known)).all()
    some = number > 0
    return HalfspaceTest(
        some & mass & covariance & disagreement & moments,
        some & mass,
        some & covariance,
        some & disagreement,
        some & moments,
        strip,
        share - angle,
        deviations,
    )


# ----------------------------------------------------------------------------- learner
def _sample(function: str, x: Array, where: Array | None) -> tuple[Array, Array]:
    """The sample in the dtype of the sums, 0 where it does not count."""
    checks.require_floating(function, x=x)
    checks.require_rank(function, "x", x, 2, "(n, D)")
    checks.require_shape(function, "x", x, x.shape[-2:], "one sample; vmap for more")
    keep = jnp.ones(x.shape[0], bool) if where is None else where
    checks.require_boolean(function, where=keep)
    checks.require_shape(function, "where", keep, x.shape[:1], "rows of `x`")
    return jnp.where(keep[:, None], x.astype(accumulator_dtype(x)), 0), keep


def _directions(function: str, x: Array, **given: Array) -> tuple[Array, list[Array]]:
    """The sample and unit vectors in one dtype; NaN for a vector of 0."""
    features = x.shape[1]
    if features < 2:
        raise ValueError(f"{function}: `x` must have at least 2 columns, got 1.")
    checks.require_floating(function, **given)
    for name, each in given.items():
        checks.require_shape(function, name, each, (features,), "columns of `x`")
    dtype = accumulator_dtype(x, *given.values())
    units = []
    for each in given.values():
        length = jnp.linalg.norm(each.astype(dtype))
        units.append(each.astype(dtype) / jnp.where(length == 0, jnp.nan, length))
    return x.astype(dtype), units


@compiled_once(4, 5)
def _descend(
    signed: Array,
    keep: Array,
    start: Array,
    step_size: Array,
    widths: tuple[float, ...],
    steps: int,
) -> HalfspaceFit:
    dtype = signed.dtype
    number = jnp.maximum(keep.sum(dtype=dtype), 1)
    initial = _unit(start)

    def loss(w: Array, width: Array) -> Array:
        margins = _matmul(signed, w)
        return smoothed_zero_one_loss(margins, width=width, where=keep).sum() / number

    def slope(w: Array, width: Array) -> Array:
        gradient = jax.grad(loss)(w, width)
        return gradient - (gradient * w).sum() * w

    def step(w: Array, width: Array) -> tuple[Array, None]:
        return _unit(w - step_size * width * slope(w, width)), None

    # The widths as data of one loop: a program for any number of them.
    each = jnp.repeat(jnp.asarray(widths, dtype), steps)
    w, _ = lax.scan(step, initial, each)
    wrong = keep & (_matmul(signed, w) <= 0)
    last = jnp.asarray(widths[-1], dtype)
    return HalfspaceFit(
        w,
        initial,
        loss(w, last),
        jnp.linalg.norm(slope(w, last)),
        wrong.sum(dtype=dtype) / number,
    )


def _unit(vector: Array) -> Array:
    squared = (vector * vector).sum()
    some = squared != 0
    return jnp.where(some, vector / jnp.sqrt(jnp.where(some, squared, 1)), 0)


# ------------------------------------------------------------------------------ tester
def _strip(x: Array, u: Array, width: Array, keep: Array) -> StripStatistics:
    near = keep & (jnp.abs(_matmul(x, u)) <= width)
    count = near.sum(dtype=x.dtype)
    total = jnp.maximum(keep.sum(dtype=x.dtype), 1)
    normal = jax.scipy.special.erf(width / math.sqrt(2))
    rest = _matmul(jnp.where(near[:, None], x, 0), _complement(u))
    moments = _matmul(rest.T, rest) / jnp.maximum(count, 1)
    values = jnp.linalg.eigvalsh(moments)
    bad = jnp.where(jnp.isnan(u).any(), jnp.nan, 0).astype(x.dtype)
    return StripStatistics(
        count / total / normal + bad, values[0] + bad, values[-1] + bad, count
    )


def _complement(u: Array) -> Array:
    """Orthonormal columns (D, D - 1) of the space orthogonal to a unit vector.

    The reflection that takes the first axis to -u or u has u for its first column.
    """
    sign = jnp.where(u[0] < 0, -1, 1).astype(u.dtype)
    v = u.at[0].add(sign)
    eye = jnp.eye(len(u), dtype=u.dtype)
    return (eye - 2 / (v * v).sum() * v[:, None] * v[None])[:, 1:]


def _disagreement(x: Array, u: Array, v: Array, keep: Array) -> tuple[Array, Array]:
    differ = (_matmul(x, u) > 0) != (_matmul(x, v) > 0)
    total = jnp.maximum(keep.sum(dtype=x.dtype), 1)
    # Accurate for small angles, where the arc cosine is not.
    apart, along = jnp.linalg.norm(u - v), jnp.linalg.norm(u + v)
    angle = 2 * jnp.arctan2(apart, along)
    return (keep & differ).sum(dtype=x.dtype) / total, angle / math.pi


def _monomials(features: int, degree: int) -> np.ndarray:
    """Indices (M, degree) of the factors of all monomials."""
    every = [*itertools.combinations_with_replacement(range(features), degree)]
    return np.array(every, int).reshape(len(every), degree)


def _evaluated(x: Array, monomials: np.ndarray) -> Array:
    if not monomials.shape[1]:
        return jnp.ones((len(x), 1), x.dtype)
    return jnp.prod(x[:, monomials], axis=-1)


def _normal_moments(features: int, one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Moments (M, L) of the products of two monomials."""

    def powers(monomials: np.ndarray) -> np.ndarray:
        return (monomials[:, :, None] == np.arange(features)).sum(1)

    exponents = powers(one)[:, None] + powers(two)[None]
    table = np.array([_double_factorial(k) for k in range(exponents.max() + 1)])
    return table[exponents].prod(-1)


def _double_factorial(k: int) -> float:
    """The k-th moment of a standard normal variable, (k - 1)!! or 0."""
    return 0.0 if k % 2 else float(math.prod(range(k - 1, 0, -2)))


def _moment_limits(features: int, degree: int, delta: float) -> np.ndarray:
    """Bounds on the deviations of each degree, times the root of the sample's size."""
    degrees = range(1, degree + 1)
    count = sum(math.comb(features + k - 1, k) for k in degrees)
    # P(|N(0, 1)| > t) <= exp(-t^2 / 2), for all of them together.
    quantile = math.sqrt(2 * math.log(count / delta))
    # No monomial of degree k has a larger second moment than the power of one feature.
    return np.array([quantile * math.sqrt(_double_factorial(2 * k)) for k in degrees])
