r"""Kinds of attention: positive functions f of scores, normalised to weights.

$\mathrm{out} = \sum_j f(z_j) v_j / \sum_j f(z_j)$. A kind maps a block of scores to the
entries of its accumulator, and for the backward pass recomputes weights and their
slopes. Kinds are static and hashable. Arrays called `rows` hold one value per row,
expanded so that they broadcast against the scores.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from softlib._stable_weight import stable_weight
from softlib.numerics import PlainSum, RunningMax

type Rows = tuple[Array, ...]


class Result(NamedTuple):
    """The results of the attention engine.

    Attributes:
        out: Weighted means of the values; None without values.
        normalizer: Each row's logsumexp, or sum of positive weights.
        max: Each row's largest weight, if the kind keeps it; no derivative.
    """

    # Any: also made of shardings.
    out: Any
    normalizer: Any
    max: Any = None


class Weights(NamedTuple):
    r"""The normalised weights of a tile and their derivatives.

    With $\delta_j = v_j - \mathrm{out}$: the derivative of `out` by a score is
    `slope * delta`, and by the first of `rows` `sum(row_slope * delta)`.
    """

    p: Array
    slope: Array
    row_slope: Array | None = None


@dataclasses.dataclass(frozen=True)
class Softmax:
    """f = exp, kept relative to the running maximum. The normalizer is a logsumexp."""

    accumulator: ClassVar[Any] = RunningMax()
    absent = -jnp.inf
    is_log = True
    keeps_max = False

    def entries(self, z: Array, rows: Rows) -> Array:
        return z

    def finalize(self, state: Any) -> Result:
        return _finalize(self.accumulator, state, self.accumulator.finalize(state))

    def inverse(self, normalizer: Array) -> Array:
        # An empty row gets inf: exp(z - inf) = 0 for every score.
        return jnp.where(normalizer == -jnp.inf, jnp.inf, normalizer)

    def weights(self, z: Array, rows: Rows, inverse: Array) -> Weights:
        p = jnp.exp(self.entries(z, rows) - inverse)
        return Weights(p, p)


@dataclasses.dataclass(frozen=True)
class LogSoftplus(Softmax):
    """f = softplus, summed in the log domain: exact where softplus underflows."""

    def entries(self, z: Array, rows: Rows) -> Array:
        return _log_softplus(z)

    def weights(self, z: Array, rows: Rows, inverse: Array) -> Weights:
        p = jnp.exp(_log_softplus(z) - inverse)
        far, near = _far(z)
        slope = jnp.where(far, 1, jax.nn.sigmoid(near) / jax.nn.softplus(near))
        return Weights(p, p * slope)


@dataclasses.dataclass(frozen=True)
class Positive:
    """A positive function, summed directly: the normalizer is its sum.

    Subclasses define `value` and `slope`.
    """

    accumulator: ClassVar[Any] = PlainSum()
    absent = 0.0
    is_log = False
    keeps_max = False

    def value(self, z: Array) -> Array:
        raise NotImplementedError

    def slope(self, z: Array) -> Array:
        raise NotImplementedError

    def entries(self, z: Array, rows: Rows) -> Array:
        return self.value(z)

    def finalize(self, state: Any) -> Result:
        return _finalize(self.accumulator, state, state.sum)

    def inverse(self, normalizer: Array) -> Array:
        empty = normalizer == 0
        return jnp.where(empty, 0, 1 / jnp.where(empty, 1, normalizer))

    def weights(self, z: Array, rows: Rows, inverse: Array) -> Weights:
        return Weights(self.value(z) * inverse, self.slope(z) * inverse)


@dataclasses.dataclass(frozen=True)
class Softplus(Positive):
    """f = softplus, for scores that are bounded below, where it does not underflow."""

    def value(self, z: Array) -> Array:
        return jax.nn.softplus(z)

    def slope(self, z: Array) -> Array:
        return jax.nn.sigmoid(z)


@dataclasses.dataclass(frozen=True)
class StableMax(Positive):
    """f(z) = 1 + z for z >= 0, 1 / (1 - z) below."""

    def value(self, z: Array) -> Array:
        return stable_weight(z)

    def slope(self, z: Array) -> Array:
        below = 1 / (1 + jnp.abs(z))
        return jnp.where(z >= 0, 1, below * below)


class _SumAndMax:
    """An accumulator of the sum and the maximum of positive weights."""

    def init(self, shape: Any, dtype: Any, *, weighted: Any = None) -> Any:
        return PlainSum().init(shape, dtype), jnp.full(shape, -jnp.inf, dtype)

    def update(
        self, state: Any, block: Array, *, axis: Any = -1, weigh: Any = None
    ) -> Any:
        total, top = state
        # The maximum has no derivative: it cancels in every result.
        top = jnp.maximum(top, lax.stop_gradient(block).max(axis))
        return PlainSum().update(total, block, axis=axis), top


@dataclasses.dataclass(frozen=True)
class SoftplusMoments(Softplus):
    """Sum and maximum of softplus over a row, without values."""

    accumulator: ClassVar[Any] = _SumAndMax()
    keeps_max = True

    def finalize(self, state: Any) -> Result:
        total, top = state
        # A row without keys has seen nothing, or absent entries of weight 0.
        return Result(None, total.sum, jnp.where(top == -jnp.inf, 0, top))


@dataclasses.dataclass(frozen=True)
class Reweighted(Positive):
    """f(z) = max(0, (softplus(z) - offset) * inverse)^power, per row (offset, inverse).

    `offset` has a derivative; `inverse` only scales the power into range, without one.
    """

    power: float

    def entries(self, z: Array, rows: Rows) -> Array:
        return self._power(self._base(z, rows), self.power)

    def weights(self, z: Array, rows: Rows, inverse: Array) -> Weights:
        base = self._base(z, rows)
        below = self._power(base, self.power - 1)
        slope = jnp.where(base > 0, self.power * below * rows[1] * inverse, 0)
        p = self._power(base, self.power) * inverse
        return Weights(p, slope * jax.nn.sigmoid(z), -slope)

    def _base(self, z: Array, rows: Rows) -> Array:
        offset, inverse = rows
        return jnp.maximum(jax.nn.softplus(z) - offset, 0) * inverse

    def _power(self, base: Array, power: float) -> Array:
        if float(power).is_integer():
            return lax.integer_pow(base, int(power))  # products only
        # Selected before and after: derivatives of a power at 0 may be infinite.
        positive = base > 0
        return jnp.where(positive, jnp.where(positive, base, 1) ** power, 0)


type Kind = Softmax | Positive


def _finalize(accumulator: Any, state: Any, normalizer: Array) -> Result:
    out = None if state.weighted is None else accumulator.mean(state)
    return Result(out, normalizer)


def _log_softplus(z: Array) -> Array:
    far, near = _far(z)
    return jnp.where(far, z, jnp.log(jax.nn.softplus(near)))


def _far(z: Array) -> tuple[Array, Array]:
    """True where log softplus rounds to its argument, and the argument elsewhere."""
    far = z < -36.0
    return far, jnp.where(far, 0.0, z)
