"""Floating-point formats of at most eight bits, of any layout."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from softlib import _checks as checks
from softlib._array_arguments import as_array
from softlib._dtypes import accumulator_dtype


@dataclasses.dataclass(frozen=True)
class FloatFormat:
    r"""Floats of a sign, some bits of exponent and some of mantissa.

    With exponent field $e$ and mantissa field $k$ of $m$ bits a number is
    $\pm (1 + k 2^{-m})\, 2^{e - \mathrm{bias}}$, or where $e = 0$ the subnormal
    $\pm k 2^{-m}\, 2^{1 - \mathrm{bias}}$. Every code is finite, but for the one of
    $-0$, which stands for NaN. Rounding is to the nearest, ties to even, and saturates.

    Args:
        exponent_bits: 1 to 7.
        mantissa_bits: 0 to 6; with sign and exponent at most eight bits.
        bias: None is the usual $2^{\mathrm{exponent\_bits} - 1} - 1$. All numbers must
            be in the range of float32.

    Raises:
        TypeError: A field is no Python int.
        ValueError: A field is out of range.

    Derivatives: of `round` and `decode` 0; add `x - jax.lax.stop_gradient(x)` for a
        straight-through estimate.
    Cost: a few operations for each element.
    Source: "It Takes a Good Model to Train a Good Model: Generalized Gaussian Priors
        for Optimized LLMs", which has one layout of eight bits.

    Example:
        >>> e4m3 = softlib.quantize.FloatFormat(exponent_bits=4, mantissa_bits=3)
        >>> codes = e4m3.encode(jnp.array([1.9, -3.2, 1e9]))
        >>> print(codes, e4m3.decode(codes), e4m3.relative_error)
        [ 63 197 127] [  1.875  -3.25  480.   ] 0.0625
    """

    exponent_bits: int
    mantissa_bits: int
    bias: int | None = None

    def __post_init__(self):
        name = type(self).__name__
        checks.require_positive_integer(name, "exponent_bits", self.exponent_bits)
        m = self.mantissa_bits
        checks.require_integer_from(name, "mantissa_bits", m, 0)
        if 1 + self.exponent_bits + m > 8:
            raise ValueError(
                f"{name}: `mantissa_bits` must be at most eight with sign and "
                f"exponent, got {m} beside {self.exponent_bits}."
            )
        if self.bias is None:
            object.__setattr__(self, "bias", 2 ** (self.exponent_bits - 1) - 1)
        if isinstance(self.bias, bool) or not isinstance(self.bias, int):
            raise TypeError(
                f"{name}: `bias` must be None or a Python int (it is static), "
                f"got {type(self.bias).__name__}."
            )
        if self._least - m < -126 or 2**self.exponent_bits - 1 - self.bias > 127:
            raise ValueError(
                f"{name}: `bias` must keep all numbers in the range of float32, "
                f"got {self.bias}."
            )

    @property
    def _least(self) -> int:
        """Exponent of the least normal number."""
        return 1 - (0 if self.bias is None else self.bias)

    @property
    def largest(self) -> float:
        """The largest number; what is larger becomes it."""
        return float(self._magnitudes()[-1])

    @property
    def smallest_normal(self) -> float:
        """The least number from which on errors are relative."""
        return 2.0**self._least

    @property
    def relative_error(self) -> float:
        """The most of the error relative to a number in the normal range."""
        return 2.0 ** -(self.mantissa_bits + 1)

    @property
    def subnormal_error(self) -> float:
        """The most of the error below the normal range."""
        return 2.0 ** (self._least - self.mantissa_bits - 1)

    def round(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The nearest numbers of the format, in the dtype of `x`; NaN stays."""
        x = self._checked(x)
        steps, quantum = self._in_steps(x)
        magnitude = jnp.minimum(steps * quantum, self.largest)
        return jnp.copysign(magnitude, x.astype(magnitude.dtype)).astype(x.dtype)

    def encode(self, x: Float[Array, "*shape"]) -> UInt8[Array, "*shape"]:
        """The codes of the nearest numbers: sign, exponent, mantissa from the top."""
        x = self._checked(x)
        steps, quantum = self._in_steps(x)
        m, bits = self.mantissa_bits, self.exponent_bits + self.mantissa_bits
        # In units of the least exponent's step: a carry of the mantissa is one.
        exponent = jnp.frexp(quantum)[1] - 1 + m - self._least
        known = jnp.isfinite(steps)
        magnitude = jnp.where(known, steps, 0).astype(jnp.int32) + exponent * 2**m
        magnitude = jnp.minimum(jnp.where(known, magnitude, 2**bits), 2**bits - 1)
        negative = (x < 0) & (magnitude > 0)
        code = magnitude + jnp.where(negative, 2**bits, 0)
        return jnp.where(jnp.isnan(x), 2**bits, code).astype(jnp.uint8)

    def decode(self, codes: UInt8[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The numbers of codes, float32; NaN for a code that the format has not."""
        codes = as_array(type(self).__name__, "codes", codes)
        checks.require_integer(type(self).__name__, codes=codes)
        magnitudes = self._magnitudes()
        table = np.concatenate([magnitudes, -magnitudes])
        table[len(magnitudes)] = np.nan
        return jnp.asarray(table).at[codes].get(mode="fill", fill_value=jnp.nan)

    def _checked(self, x: Array) -> Array:
        x = as_array(type(self).__name__, "x", x)
        checks.require_floating(type(self).__name__, x=x)
        return x

    def _in_steps(self, x: Array) -> tuple[Array, Array]:
        """|x| as a whole number of steps between neighbours, and the step."""
        magnitude = jnp.abs(x).astype(accumulator_dtype(x))
        usual = jnp.isfinite(magnitude) & (magnitude > 0)
        _, exponent = jnp.frexp(jnp.where(usual, magnitude, self.smallest_normal))
        # frexp has mantissas in [1/2, 1). A subnormal of float32 may have any exponent.
        exponent = jnp.clip(exponent - 1, self._least, 127)
        one = jnp.ones_like(magnitude)
        quantum = jnp.ldexp(one, exponent - self.mantissa_bits)
        return jnp.round(magnitude / quantum), quantum

    def _magnitudes(self) -> np.ndarray:
        m = self.mantissa_bits
        codes = np.arange(2 ** (self.exponent_bits + m))
        field, fraction = codes >> m, (codes % 2**m) / 2**m
        exponent = np.maximum(field, 1) - 1 + self._least
        value = np.ldexp(np.where(field == 0, fraction, 1 + fraction), exponent)
        return value.astype(np.float32)
