r"""Densities on [-1, 1] as squared magnitudes of Fourier series.

With complex $a_0, \ldots, a_n$ the density is $f(x) = |A(x)|^2 / (2 \sum |a_l|^2)$ for
$A(x) = \sum_l a_l e^{i \pi l x}$. Squaring a sum of n + 1 terms costs less than the
autocorrelation of the coefficients and cannot become negative by rounding; in real
arithmetic it is two products with tables of cosines and sines.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Integer, PRNGKeyArray

from softlib import _checks as checks
from softlib._array_arguments import array_arguments
from softlib._compiled_once import compiled_once
from softlib._dtypes import accumulator_dtype
from softlib._ids import labels_in_range

# Of a bisection: [-1, 1] ends as an interval of 2**-29.
_STEPS = 30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FourierDensity:
    r"""Densities on [-1, 1] by Fourier series; a pytree.

    $f(x) = |A(x)|^2 / (2 \sum |a_l|^2)$ with $A(x) = \sum_l a_l e^{i \pi l x}$. Methods
    give float32 (float64 if an argument is float64).

    Args:
        coefficients: $n + 1$ real parts, then as many imaginary parts: C = 2 (n + 1).
            Their common factor, also a complex one, does not matter. All zeros are the
            uniform density, from which no gradient leads away.

    Derivatives: forward and reverse mode, any order; finite at roots of the density. A
        draw has none.
    Cost: n multiply-adds are 4 n flop per point; each method says how many.
    Source: "Fourier Head: Helping Large Language Models Learn Complex Probability
        Distributions", in the squared form; `cdf` and `sample` are softlib's.

    Example:
        >>> # 1 + exp(i pi x) / 2
        >>> density = softlib.nn.FourierDensity(jnp.array([1.0, 0.5, 0.0, 0.0]))
        >>> print(jax.nn.softmax(density.logits(4)).round(2))
        [0.11 0.39 0.39 0.11]
        >>> print(density.log_prob(jnp.array([-1.0, 0.0])).round(1))
        [-2.3 -0.1]
        >>> print(density.cdf(jnp.array([-0.5, 0.0])).round(4))
        [0.1227 0.5   ]
        >>> print(density.sample(jax.random.key(0), (1000,)).shape)
        (1000,)
    """

    coefficients: Float[Array, "*batch C"]

    def logits(
        self, num_bins: int, *, epsilon: float = 1e-5
    ) -> Float[Array, "*batch m"]:
        r"""Computes logits of equal bins of [-1, 1]: 4 n m multiply-adds per row.

        $y_j = f(b_j) / \sum_k f(b_k)$ at the centres $b_j = -1 + (2 j + 1) / m$; the
        logits are $\log(y_j + \varepsilon)$. A softmax of them is $(y + \varepsilon) /
        (1 + m \varepsilon)$: no bin is impossible, and a share of $m \varepsilon$ of
        the mass is spread evenly (1 % for 1,000 bins). `cross_entropy` does without.
        With fewer frequencies than bins $y_j = 2 f(b_j) / m$: the waves sum to 0.

        Args:
            num_bins: Static number of bins m. More than m / 2 frequencies alias.
            epsilon: Static, positive.
        """
        function = "FourierDensity.logits"
        a = _coefficients(function, self.coefficients)
        checks.require_positive_integer(function, "num_bins", num_bins)
        checks.require_positive_number(function, "epsilon", epsilon)
        power = _power_at_bins(_scaled(a), num_bins)
        total = power.sum(axis=-1, keepdims=True)
        # Of as many frequencies as bins all bins can be roots.
        none = total == 0
        y = jnp.where(none, 1 / num_bins, power / jnp.where(none, 1, total))
        return jnp.log(y + epsilon)

    @array_arguments
    def cross_entropy(
        self,
        labels: Integer[Array, "*batch"],
        *,
        num_bins: int,
        where: Bool[Array, "..."] | None = None,
    ) -> Float[Array, "*batch"]:
        r"""Computes the cross-entropy of bins, in nats per row, without a floor.

        $-\log y_k$ with $y$ as in `logits`. With fewer frequencies than bins the sum
        over the bins is $m \sum |a_l|^2$ exactly, so that only the label's bin is
        evaluated: 4 n multiply-adds per row, otherwise 4 n m. Where the density is 0
        the loss is large and finite: some 87 nats in float32, 708 in float64.

        Args:
            labels: Bins in $[0, m)$. Outside, the loss is NaN and the row has no
                gradient.
            num_bins: Static number of bins m.
            where: True for the rows that count; broadcasts to the batch shape.
                Elsewhere loss and gradient are exactly 0, whatever the row holds.
        """
        function = "FourierDensity.cross_entropy"
        a = _coefficients(function, self.coefficients)
        checks.require_integer(function, labels=labels)
        batch = a.shape[:-1]
        checks.require_shape(function, "labels", labels, batch, "the batch shape")
        checks.require_positive_integer(function, "num_bins", num_bins)
        if where is not None:
            where = checks.checked_where(function, where, batch, "the batch shape")
            a = jnp.where(where[..., None], a, 0)
        labels = labels_in_range(labels, num_bins)
        valid = labels >= 0
        bins = jnp.where(valid, labels, 0)
        a = _scaled(a)
        if a.shape[-1] // 2 <= num_bins:  # n < m
            total = num_bins * _norm(a)
            power = _power(a, *_waves_at_bins(a, bins, num_bins))
        else:
            powers = _power_at_bins(a, num_bins)
            total = powers.sum(axis=-1)
            ids = lax.broadcasted_iota(bins.dtype, powers.shape, powers.ndim - 1)
            power = jnp.where(ids == bins[..., None], powers, 0).sum(axis=-1)
        loss = _log(total) - _log(power)
        loss = jnp.where(valid, loss, jnp.nan)
        return loss if where is None else jnp.where(where, loss, 0)

    @array_arguments
    def log_prob(self, x: Float[Array, "*points"]) -> Float[Array, "..."]:
        r"""Computes $\log f(x)$ in nats, without bins.

        The negative log-likelihood of a continuous target is its negative. 4 n
        multiply-adds and 2 n cosines per point. At a root of the density it is large
        and finite: some -87 in float32, -708 in float64.

        Args:
            x: Points; their axes broadcast with those of the rows. Outside of [-1, 1]
                the result is -inf without a gradient.
        """
        function = "FourierDensity.log_prob"
        a = _scaled(_coefficients(function, self.coefficients))
        a, x = _with_points(function, a, x)
        outside = (x < -1) | (x > 1)
        angles = math.pi * _frequencies(a) * jnp.where(outside, 0, x)[..., None]
        power = _power(a, jnp.cos(angles), jnp.sin(angles))
        return jnp.where(outside, -jnp.inf, _log(power) - jnp.log(2 * _norm(a)))

    @array_arguments
    def cdf(self, x: Float[Array, "*points"]) -> Float[Array, "..."]:
        r"""Computes the probability of what is below a point.

        $F(x) = \frac{x + 1}{2} + \mathrm{Re} \sum_{k = 1}^n \frac{c_k}{c_0}
        \frac{e^{i \pi k x} - (-1)^k}{i \pi k}$ with the autocorrelation $c_k = \sum_l
        a_{l + k} \bar a_l$: 8 n^2 multiply-adds per row, n per point.

        Args:
            x: Points; their axes broadcast with those of the rows. 0 below -1, 1 above
                1.
        """
        function = "FourierDensity.cdf"
        a = _coefficients(function, self.coefficients)
        series = jnp.concatenate(_autocorrelation(_scaled(a), normalize=True), axis=-1)
        both, x = _with_points(function, series, x)
        real, imaginary = jnp.split(both, 2, axis=-1)
        return _distribution(real, imaginary, x)

    @array_arguments
    def sample(
        self, key: PRNGKeyArray, shape: tuple[int, ...] | None = None
    ) -> Float[Array, "..."]:
        """Draws numbers by bisection of the distribution function, in 30 evaluations.

        They are within 1e-6 of the exact quantile, or 2e-9 for float64, where the
        density is not 0. The gradient is stopped.

        Args:
            key: A key of `jax.random`.
            shape: Static shape of the result, to which the rows broadcast; None is one
                draw per row.
        """
        function = "FourierDensity.sample"
        a = lax.stop_gradient(_coefficients(function, self.coefficients))
        rows = a.shape[:-1]
        shape = rows if shape is None else tuple(shape)
        last = shape[len(shape) - len(rows) :]
        if len(rows) > len(shape) or any(
            n not in (1, m) for n, m in zip(rows, last, strict=True)
        ):
            raise ValueError(
                f"{function}: `shape` must be one to which the rows {rows} broadcast, "
                f"got {shape}."
            )
        real, imaginary = _autocorrelation(_scaled(a), normalize=True)
        spread = lambda c: jnp.broadcast_to(
            c.reshape((1,) * (len(shape) - len(rows)) + c.shape), (*shape, c.shape[-1])
        )
        real, imaginary = spread(real), spread(imaginary)
        return _quantile(real, imaginary, jax.random.uniform(key, shape, a.dtype))

    def smoothness_penalty(self, *, normalize: bool = True) -> Float[Array, "*batch"]:
        r"""Computes what a rough density costs, per row: 8 n^2 multiply-adds.

        $4 \pi^2 \sum_{k = 1}^n k^2 |c_k / c_0|^2$ with the autocorrelation $c_k =
        \sum_l a_{l + k} \bar a_l$: four times $\int_{-1}^1 f'(x)^2 dx$. 0 for
        coefficients that are all 0.

        Args:
            normalize: Static. False leaves out the division by $c_0$, as the paper's
                code: then shrinking the coefficients lowers the penalty and smooths
                nothing.
        """
        a = _coefficients("FourierDensity.smoothness_penalty", self.coefficients)
        a = _scaled(a) if normalize else a
        real, imaginary = _autocorrelation(a, normalize=normalize)
        k = jnp.arange(1, a.shape[-1] // 2, dtype=a.dtype)
        squares = jnp.square(real) + jnp.square(imaginary)
        return 4 * math.pi**2 * jnp.sum(squares * _row(k * k, squares), axis=-1)


@compiled_once()
def _quantile(
    real: Float[Array, "*shape C"],
    imaginary: Float[Array, "*shape C"],
    wanted: Float[Array, "*shape"],
) -> Float[Array, "*shape"]:
    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        below = _distribution(real, imaginary, middle) < wanted
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    start = jnp.full_like(wanted, -1), jnp.full_like(wanted, 1)
    low, high = lax.fori_loop(0, _STEPS, halve, start)
    return (low + high) / 2


# --------------------------------------------------------------------------- the series
def _coefficients(function: str, coefficients: Array) -> Float[Array, "*batch C"]:
    coefficients = jnp.asarray(coefficients)
    checks.require_floating(function, coefficients=coefficients)
    size = coefficients.shape[-1] if coefficients.ndim else 0
    if size == 0 or size % 2:
        raise ValueError(
            f"{function}: `coefficients` must have a last axis of n + 1 real and n + 1 "
            f"imaginary parts, got shape {coefficients.shape}."
        )
    return coefficients.astype(accumulator_dtype(coefficients))


def _scaled(a: Float[Array, "*batch C"]) -> Float[Array, "*batch C"]:
    """The same density by coefficients of size 1, whose squares are in range.

    As no common factor matters, neither does the derivative of this one.
    """
    size = lax.stop_gradient(jnp.abs(a).max(axis=-1, keepdims=True))
    zero = size == 0
    constant = jnp.zeros(a.shape[-1], a.dtype).at[0].set(1)
    return jnp.where(zero, _row(constant, a), a / jnp.where(zero, 1, size))


def _norm(a: Array) -> Array:
    return jnp.square(a).sum(axis=-1)


def _log(power: Array) -> Array:
    """Finite for 0, as is its slope."""
    return jnp.log(power + jnp.finfo(power.dtype).tiny)


def _power(a: Array, cosines: Array, sines: Array) -> Array:
    """|A|^2 at one point per row."""
    real, imaginary = jnp.split(a, 2, axis=-1)
    at = lambda x, y: jnp.sum(x * cosines + y * sines, axis=-1)
    return jnp.square(at(real, -imaginary)) + jnp.square(at(imaginary, real))


def _power_at_bins(a: Array, num_bins: int) -> Float[Array, "*batch m"]:
    real, imaginary = jnp.split(a, 2, axis=-1)
    cosines, sines = _bin_tables(a, num_bins)
    of = lambda x, table: jnp.matmul(x, table, precision=lax.Precision.HIGHEST)
    real, imaginary = (
        of(real, cosines) - of(imaginary, sines),
        of(real, sines) + of(imaginary, cosines),
    )
    return jnp.square(real) + jnp.square(imaginary)


def _bin_tables(a: Array, num_bins: int) -> tuple[Array, Array]:
    """Cosines and sines of pi l b for each frequency l and bin centre b."""
    return _tables(a.shape[-1] // 2, num_bins, a.dtype)


def _tables(frequencies: int, num_bins: int, dtype: DTypeLike) -> tuple[Array, Array]:
    centres = -1 + (2 * np.arange(num_bins) + 1) / num_bins
    angles = np.pi * np.outer(np.arange(frequencies), centres)
    return jnp.asarray(np.cos(angles), dtype), jnp.asarray(np.sin(angles), dtype)


def _waves_at_bins(a: Array, bins: Array, num_bins: int) -> tuple[Array, Array]:
    """Cosines and sines of pi l b for one bin per row.

    Not looked up in the tables: a gather by labels that a mesh divides needs care. The
    angle is reduced in integers, exactly.
    """
    frequency = _row(jnp.arange(a.shape[-1] // 2, dtype=jnp.int32), a)
    turns = frequency * (2 * bins.astype(jnp.int32)[..., None] + 1)
    angles = (math.pi / num_bins) * (turns % (2 * num_bins)).astype(a.dtype)
    signs = 1 - 2 * (frequency % 2).astype(a.dtype)  # of b, which starts at -1
    return signs * jnp.cos(angles), signs * jnp.sin(angles)


def _autocorrelation(
    a: Float[Array, "*batch C"], *, normalize: bool
) -> tuple[Float[Array, "*batch n"], Float[Array, "*batch n"]]:
    """Real and imaginary parts of c_1 to c_n, or of c_k / c_0.

    They are the Fourier coefficients of |A|^2, a sum of n + 1 waves and their
    conjugates, which 2 n + 2 points determine.
    """
    frequencies = a.shape[-1] // 2
    points = 2 * frequencies
    power = _power_at_bins(a, points)
    cosines, sines = _tables(frequencies, points, a.dtype)
    of = lambda table: jnp.matmul(power, table.T, precision=lax.Precision.HIGHEST)
    divisor = points * _norm(a)[..., None] if normalize else points
    real, imaginary = of(cosines) / divisor, -of(sines) / divisor
    return real[..., 1:], imaginary[..., 1:]


def _distribution(real: Array, imaginary: Array, x: Array) -> Array:
    """F(x) from c_k / c_0; the axes but the last are those of x."""
    inside = jnp.clip(x, -1, 1)
    k = jnp.arange(1, real.shape[-1] + 1, dtype=real.dtype)
    angles = math.pi * _row(k, real) * inside[..., None]
    signs = jnp.where(k % 2 == 0, 1.0, -1.0).astype(real.dtype)
    # (r + i s)(cos + i sin - sign) / (i pi k), of which the real part.
    waves = real * jnp.sin(angles) + imaginary * (jnp.cos(angles) - _row(signs, real))
    total = jnp.sum(waves / (math.pi * _row(k, real)), axis=-1)
    found = jnp.clip((inside + 1) / 2 + total, 0, 1)
    # Exactly at the ends, where the waves cancel up to rounding.
    return jnp.where(x <= -1, 0, jnp.where(x >= 1, 1, found))


def _frequencies(a: Array) -> Array:
    return _row(jnp.arange(a.shape[-1] // 2, dtype=a.dtype), a)


def _row(values: Array, like: Array) -> Array:
    """Numbers along the last axis, with as many axes as `like`."""
    return values.reshape((1,) * (like.ndim - 1) + values.shape)


def _with_points(function: str, coefficients: Array, x: Array) -> tuple[Array, Array]:
    """Both over the same batch axes and in the same dtype."""
    a, x = coefficients, jnp.asarray(x)
    checks.require_floating(function, x=x)
    dtype = accumulator_dtype(a, x)
    try:
        batch = jnp.broadcast_shapes(a.shape[:-1], x.shape)
    except ValueError:
        raise ValueError(
            f"{function}: `x` must broadcast with the rows of `coefficients`, got "
            f"shapes {x.shape} and {a.shape}."
        ) from None
    a = a.reshape((1,) * (len(batch) - a.ndim + 1) + a.shape)
    x = x.reshape((1,) * (len(batch) - x.ndim) + x.shape)
    a = jnp.broadcast_to(a, (*batch, a.shape[-1])).astype(dtype)
    return a, jnp.broadcast_to(x, batch).astype(dtype)
