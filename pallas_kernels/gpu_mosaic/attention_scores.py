r"""Scores of a tile of attention, in the registers of a warpgroup.

    raw -> z = c tanh(scale raw / c) -> Z = z log2(e) -> -inf where a pair is excluded

Scores are in bits, because the hardware has 2^x and log2 x. Weights relative to the
largest of their row are 2^Z, or softplus(z) = ln(1 + e^z) times a power of two that
keeps it in range:

    2^-M softplus(z) = 2^-M max(z, 0) + 2^(-|Z| - M) h(2^-|Z|),    h(u) = ln(1 + u) / u

With r = u / (2 + u) <= 1/3, h(u) = 2 / (2 + u) (1 + r^2 / 3 + r^4 / 5 + ...), whose
positive terms are accurate for any small u. Weights that are summed directly have
M = 0.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from .attention_mask import Index, Mask, evaluate

LOG2E = math.log2(math.e)
LN2 = math.log(2)


class Axis(NamedTuple):
    """The queries, or the keys, of a tile of scores.

    Attributes:
        axis: Their axis of the tile.
        start: Index of the first.
    """

    axis: int
    start: Any


class Excluding(NamedTuple):
    """Arguments of the mask, and the end of the keys, for a tile.

    Attributes:
        query: The queries.
        key: The keys.
        last: Number of keys if the last tile is not full, else None.
        scalars: Further arguments of the mask.
    """

    query: Axis
    key: Axis
    last: int | None
    scalars: Sequence[Any]


@dataclasses.dataclass(frozen=True)
class Form:
    """Options that turn products into scores and weights; Python values.

    Attributes:
        mask: Called with int32 indices of queries and keys, with the `mask_scalars` of
            the batch entry, and with what `Extras` have per query and per key; True
            where they attend. None for all. Evaluated only where the lists of tiles say
            SOME.
        keys: Number of keys, if the arrays are longer; None otherwise.
        scale: Multiplies the products of queries and keys.
        softcap: c; None for none.
        weights: exp(z) or softplus(z), relative to the largest of a row; or, summed
            directly, softplus(z), or 1 + z for z >= 0 and 1 / (1 - z) below.
    """

    mask: Mask | None = None
    keys: int | None = None
    scale: float = 1.0
    softcap: float | None = None
    weights: Literal["softmax", "log_softplus", "softplus", "stablemax"] = "softmax"

    @property
    def is_relative(self) -> bool:
        """Whether weights are relative to the largest of their row."""
        return self.weights in ("softmax", "log_softplus")

    @property
    def is_plain(self) -> bool:
        """Whether weights are 2 to the power of a scaled product, without softcap."""
        return self.weights == "softmax" and self.softcap is None

    @property
    def is_heavy(self) -> bool:
        """Whether computing weights and slopes takes many registers."""
        return self.weights == "log_softplus" and self.softcap is not None

    @property
    def unit(self) -> float:
        """The factor from z to Z; 1 for weights that are no powers."""
        return 1.0 if self.weights == "stablemax" else LOG2E

    def bits(self, raw: Any) -> Any:
        """The scores Z."""
        cap = self.softcap
        if cap is None:
            return raw * (self.scale * self.unit)
        # tanh x = 1 - 2 / (1 + e^2x), since the hardware's is good to 11 bits. It
        # cancels near 0, but the error is small relative to the cap.
        power = jnp.exp2(raw * (2 * self.scale * LOG2E / cap))
        bent = 1 - 2 * _reciprocal(1 + power)
        return (cap * self.unit) * bent

    def bent(self, slope: Any, bits: Any) -> Any:
        """`slope` times the derivative of z by `scale raw`."""
        cap = self.softcap
        if cap is None:
            return slope
        # Recomputed from Z to save registers. At -inf it is 0.
        bent = jnp.maximum(bits * (1 / (cap * self.unit)), -1.0)
        return slope * (1 - bent * bent)

    def last(self, keys: int, size: int) -> int | None:
        """The number of keys if the last tile of `size` is not full, else None.

        `keys` is the length of the array.
        """
        last = keys if self.keys is None else self.keys
        return last if last % size else None

    def attends(
        self, shape: tuple[int, ...], given: "Excluding", numbers: Sequence[Any] = ()
    ) -> list[Any]:
        """Booleans of a tile: where the mask attends, and where keys are no padding.

        `numbers` are further arguments of the mask, one per pair.
        """
        # Indices of the whole tile: the compiler computes with equal ones only once.
        of_tile = lambda axis: (
            axis.start
            + plgpu.broadcasted_iota(
                jnp.int32, shape, axis.axis, layout=plgpu.Layout.WGMMA
            )
        )
        indices = of_tile(given.key)
        found = []
        if self.mask is not None:
            query = Index(shape, lambda: of_tile(given.query))
            found.append(evaluate(self.mask, query, indices, *given.scalars, *numbers))
        if given.last is not None:
            found.append(indices < given.last)
        return found

    def top(self, bits: Any, before: Any) -> Any:
        """The new reference of each row, which keeps all weights in range."""
        highest = bits.max(1)
        if self.weights == "log_softplus":
            # softplus(z) is e^z far below 0, and no larger than a few z above.
            highest = jnp.minimum(highest, 0.0)
        return jnp.maximum(before, highest)

    def relative(self, bits: Any, shift: Any) -> Any:
        """The weights times 2^-shift; `shift` is the finite `top` of the same rows."""
        if self.weights == "softmax":
            return jnp.exp2(bits - shift)
        # Below a shift of 0 no score of the row is positive.
        magnitude = -jnp.abs(bits)
        tail = jnp.exp2(magnitude - shift) * _log1p_ratio(jnp.exp2(magnitude))
        return jnp.maximum(bits, 0.0) * LN2 + tail

    def absolute(self, bits: Any) -> tuple[Any, Any]:
        """Weights that are not relative, and their slopes by z."""
        if self.weights == "stablemax":
            below = _reciprocal(1 + jnp.abs(bits))
            positive = bits >= 0
            value = jnp.where(positive, 1 + bits, below)
            return value, jnp.where(positive, 1.0, below * below)
        small = jnp.exp2(-jnp.abs(bits))
        value = jnp.maximum(bits, 0.0) * LN2 + small * _log1p_ratio(small)
        return value, jnp.where(bits >= 0, 1.0, small) * _reciprocal(1 + small)

    def normalised(self, bits: Any, norm: Any, capped: Any = None) -> tuple[Any, Any]:
        """The normalised weights, and their slopes by `scale raw`.

        `norm` is the row's log-sum in bits (inf for an empty row) if weights are
        relative, else the inverse of its sum (0 for an empty row). `capped` are the
        scores before a bias was added, None without.
        """
        capped = bits if capped is None else capped
        if not self.is_relative:
            value, slope = self.absolute(bits)
            return value * norm, self.bent(slope * norm, capped)
        if self.weights == "softmax":
            p = jnp.exp2(bits - norm)
            return p, self.bent(p, capped)
        small = jnp.exp2(-jnp.abs(bits))
        below = jnp.exp2(jnp.minimum(bits, 0.0) - norm)
        # A row with a positive score has a log-sum of log2(ln 2) at least.
        line = jnp.maximum(bits, 0.0) * (LN2 * jnp.exp2(-jnp.maximum(norm, -1.0)))
        tail = jnp.where(bits < 0, below, small * below) * _log1p_ratio(small)
        return line + tail, self.bent(below * _reciprocal(1 + small), capped)


def across(row: Any, shape: tuple[int, ...], axis: int = 0) -> Any:
    """Broadcasts one number per row (or column, with `axis` 1) to a tile."""
    return lax.broadcast_in_dim(row, shape, (axis,))


def _reciprocal(x: Any) -> Any:
    """1 / x for x >= 1, in two instructions instead of a dozen for a division."""
    root = lax.rsqrt(x)
    return root * root


def _log1p_ratio(u: Any) -> Any:
    """ln(1 + u) / u for 0 <= u <= 1, to a few ulps."""
    inverse = _reciprocal(2 + u)
    square = (u * inverse) * (u * inverse)
    total = 1 / 15
    for term in (13, 11, 9, 7, 5, 3, 1):
        total = total * square + 1 / term
    return 2 * inverse * total
