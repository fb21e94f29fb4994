r"""Scores of a tile of attention, as the registers of a warpgroup hold them.

    raw -> z = c tanh(scale raw / c) -> Z = z log2(e) -> -inf where a pair is excluded

Scores are kept in bits, because the hardware has 2^x and log2 x. Weights that are kept
relative to the largest of their row are 2^Z, or softplus(z) = ln(1 + e^z) times a power
of two that keeps it in range where it underflows:

    2^-M softplus(z) = 2^-M max(z, 0) + 2^(-|Z| - M) h(2^-|Z|),    h(u) = ln(1 + u) / u

With r = u / (2 + u) <= 1/3, h(u) = 2 / (2 + u) (1 + r^2 / 3 + r^4 / 5 + ...), positive
terms that keep all digits however small u is. Weights that are summed as they are have
M = 0.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from .attention_mask import Mask, evaluate

LOG2E = math.log2(math.e)
LN2 = math.log(2)


class Axis(NamedTuple):
    """Place of the queries, or of the keys, in a tile of scores.

    Attributes:
        axis: Of the tile.
        start: Index of the first.
    """

    axis: int
    start: Any


@dataclasses.dataclass(frozen=True)
class Form:
    """Options that turn products into scores and weights; Python values.

    Attributes:
        mask: Called with int32 indices of queries and keys, and with the `mask_scalars`
            of the batch entry; True where they attend. None for all. Evaluated only
            where the lists of tiles say SOME.
        keys: How many there are; the arrays may be longer. None: they are not.
        scale: Multiplies the products of queries and keys.
        logit_softcap: c; None for none.
        weights: exp(z), or softplus(z), both kept relative to the largest of a row;
            or softplus(z), or 1 + z for z >= 0 and 1 / (1 - z) below, summed as they
            are.
    """

    mask: Mask | None = None
    keys: int | None = None
    scale: float = 1.0
    logit_softcap: float | None = None
    weights: Literal["softmax", "log_softplus", "softplus", "stablemax"] = "softmax"

    @property
    def is_relative(self) -> bool:
        """Whether weights are kept relative to the largest of their row."""
        return self.weights in ("softmax", "log_softplus")

    @property
    def is_plain(self) -> bool:
        """Whether a weight is a power of a product, and nothing else."""
        return self.weights == "softmax" and self.logit_softcap is None

    @property
    def is_heavy(self) -> bool:
        """Whether weights and their slopes take many registers on the way."""
        return self.weights == "log_softplus" and self.logit_softcap is not None

    @property
    def unit(self) -> float:
        """Factor from z to Z: 1 where no power is taken."""
        return 1.0 if self.weights == "stablemax" else LOG2E

    def bits(self, raw: Any) -> Any:
        """Z."""
        cap = self.logit_softcap
        if cap is None:
            return raw * (self.scale * self.unit)
        # tanh x = 1 - 2 / (1 + e^2x); the hardware's own is good to 11 bits. What this
        # loses near 0, where it cancels, is small next to the cap, and that is added to
        # other scores.
        power = jnp.exp2(raw * (2 * self.scale * LOG2E / cap))
        bent = 1 - 2 * _reciprocal(1 + power)
        return (cap * self.unit) * bent

    def bent(self, slope: Any, bits: Any) -> Any:
        """`slope` times the derivative of z by `scale raw`."""
        cap = self.logit_softcap
        if cap is None:
            return slope
        # From Z again: it costs less than registers to keep it. At -inf it is 0.
        bent = jnp.maximum(bits * (1 / (cap * self.unit)), -1.0)
        return slope * (1 - bent * bent)

    def last(self, keys: int, size: int) -> int | None:
        """The number of keys if the last tile of `size` is not full of them.

        `keys`: how many the array has.
        """
        last = keys if self.keys is None else self.keys
        return last if last % size else None

    def selected(
        self, bits: Any, query: Axis, key: Axis, last: int | None, scalars: Any = ()
    ) -> Any:
        """-inf where a pair does not attend, or the key is beyond the last."""
        # Indices of the whole tile, although a row and a column has one each: the
        # compiler sees that, and computes with each only once.
        of_tile = lambda axis: (
            axis.start
            + plgpu.broadcasted_iota(
                jnp.int32, bits.shape, axis.axis, layout=plgpu.Layout.WGMMA
            )
        )
        indices = of_tile(key)
        ok = None
        if self.mask is not None:
            ok = evaluate(self.mask, of_tile(query), indices, *scalars)
        if last is not None:
            inside = indices < last
            ok = inside if ok is None else ok & inside
        return bits if ok is None else jnp.where(ok, bits, -jnp.inf)

    def top(self, bits: Any, before: Any) -> Any:
        """What rows are kept relative to: at least what keeps all weights in range."""
        highest = bits.max(1)
        if self.weights == "log_softplus":
            # softplus(z) is e^z far below 0, and no larger than a few z above.
            highest = jnp.minimum(highest, 0.0)
        return jnp.maximum(before, highest)

    def relative(self, bits: Any, shift: Any) -> Any:
        """The weights times 2^-shift, `shift` from `top` of the same rows, finite."""
        if self.weights == "softmax":
            return jnp.exp2(bits - shift)
        # Below a shift of 0 no score of the row is positive.
        magnitude = -jnp.abs(bits)
        tail = jnp.exp2(magnitude - shift) * _log1p_ratio(jnp.exp2(magnitude))
        return jnp.maximum(bits, 0.0) * LN2 + tail

    def absolute(self, bits: Any) -> tuple[Any, Any]:
        """The weights and their slopes by z, of weights that are not relative."""
        if self.weights == "stablemax":
            below = _reciprocal(1 + jnp.abs(bits))
            positive = bits >= 0
            value = jnp.where(positive, 1 + bits, below)
            return value, jnp.where(positive, 1.0, below * below)
        small = jnp.exp2(-jnp.abs(bits))
        value = jnp.maximum(bits, 0.0) * LN2 + small * _log1p_ratio(small)
        return value, jnp.where(bits >= 0, 1.0, small) * _reciprocal(1 + small)

    def normalised(self, bits: Any, norm: Any) -> tuple[Any, Any]:
        """The weights, and their slopes by `scale raw`, over the sum of the row.

        `norm` of the row: if weights are relative the log-sum in bits, inf for an empty
        row; else the inverse of the sum, 0 for an empty row.
        """
        if not self.is_relative:
            value, slope = self.absolute(bits)
            return value * norm, self.bent(slope * norm, bits)
        if self.weights == "softmax":
            p = jnp.exp2(bits - norm)
            return p, self.bent(p, bits)
        small = jnp.exp2(-jnp.abs(bits))
        below = jnp.exp2(jnp.minimum(bits, 0.0) - norm)
        # A row with a positive score has a log-sum of log2(ln 2) at least.
        line = jnp.maximum(bits, 0.0) * (LN2 * jnp.exp2(-jnp.maximum(norm, -1.0)))
        tail = jnp.where(bits < 0, below, small * below) * _log1p_ratio(small)
        return line + tail, self.bent(below * _reciprocal(1 + small), bits)


def across(row: Any, shape: tuple[int, ...], axis: int = 0) -> Any:
    """One number per row, or with `axis` 1 per column, as a tile."""
    return lax.broadcast_in_dim(row, shape, (axis,))


def _reciprocal(x: Any) -> Any:
    """1 / x for x >= 1: a division is a dozen instructions, this is two."""
    root = lax.rsqrt(x)
    return root * root


def _log1p_ratio(u: Any) -> Any:
    """ln(1 + u) / u for 0 <= u <= 1, to a few units in the last place."""
    inverse = _reciprocal(2 + u)
    square = (u * inverse) * (u * inverse)
    total = 1 / 15
    for term in (13, 11, 9, 7, 5, 3, 1):
        total = total * square + 1 / term
    return 2 * inverse * total
