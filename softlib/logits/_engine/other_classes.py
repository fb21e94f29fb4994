"""Sums over the classes other than a row's one label, of an array of logits.

The sum over all classes less the label's term cancels where the label has nearly all of
the probability. A copy of the logits with -inf at the labels costs their memory and two
passes over it. So a row is cut into pieces, which are summed in place. Only the label's
piece is copied without the label and summed again; this sum replaces the piece's first
sum before the sums are merged.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from softlib._finite import at_least_finite
from softlib.numerics import RunningMaxState

from . import tile as _tile
from .tile import Modifiers, Options, Tile

# With this many pieces, a copy of one is small, and so is an array of their sums.
_PIECES = 32
# A loop over pieces of fewer classes is slower than one over all classes.
_SMALLEST = 64
# The statistics that follow from `Sums`.
SUMS = ("lse", "mean_logit", "sum_softplus")


class Sums(NamedTuple):
    """Sums over the classes other than the label; None if not needed."""

    exponentials: RunningMaxState | None
    sum_softplus: Array | None


def pieces_of(vocabulary: int) -> int:
    """Number of equal pieces of a row; 1 if there is no good number.

    If up to 16 devices can divide the classes, they can divide the pieces too.
    """
    shared = math.gcd(vocabulary, 16)
    counts = [
        count
        for count in range(1, min(vocabulary // _SMALLEST, _PIECES**2) + 1)
        if vocabulary % count == 0
    ]
    cost = lambda count: (count % shared != 0, abs(math.log(count / _PIECES)))
    return min(counts, key=cost, default=1)


def sums(
    options: Options,
    tile: Tile,
    labels: Int[Array, "rows 1"],
    modifiers: Modifiers,
    pieces: int,
) -> Sums:
    """Sums of a tile of whole rows, as by `tile.update` with `exclude_labels`."""
    present = _tile.select(tile.z, modifiers.class_where, -jnp.inf)
    rows, vocabulary = present.shape
    size = vocabulary // pieces
    shape = (rows, pieces, size)

    # A label outside the vocabulary is -1; then no class of a piece is the label.
    # The barrier: several kernels read the piece's index, the result of a division.
    at = lax.div(jnp.maximum(labels, 0), jnp.full_like(labels, size))
    at = lax.optimization_barrier(at)
    ids = at * size + lax.broadcasted_iota(labels.dtype, (rows, size), 1)
    marked = (ids == labels)[:, None]

    def without_label(of_classes: Array) -> Array:
        """(rows, 1, size): the label's piece, -inf at the label."""
        own = jnp.take_along_axis(
            of_classes.reshape(shape), at[..., None], axis=1, mode="promise_in_bounds"
        )
        return jnp.where(marked, -jnp.inf, own)

    mine = lax.broadcasted_iota(labels.dtype, (rows, pieces), 1) == at
    replaced = lambda all_pieces, own: jnp.where(mine, own, all_pieces)
    total = lambda all_pieces, own: replaced(all_pieces.sum(-1), own.sum(-1)).sum(-1)

    exponentials = sum_softplus = None
    if options.wants("lse", "mean_logit"):
        weighted = _tile.weighted(present, modifiers, 1)
        all_weighted, own_weighted = weighted.reshape(shape), without_label(weighted)
        tops = lax.stop_gradient(all_weighted).max(-1)
        tops_of_others = replaced(tops, lax.stop_gradient(own_weighted).max(-1))
        top = at_least_finite(tops_of_others).max(-1, keepdims=True)
        # The first sum of the label's piece is replaced, but must not overflow: its
        # cotangent in derivatives is 0, and 0 * inf is NaN.
        shift = replaced(top, jnp.maximum(top, tops))
        of_all = jnp.exp(all_weighted - shift[..., None])
        of_own = jnp.exp(own_weighted - top[..., None])
        of_logits = None
        if options.wants("mean_logit"):
            finite = _tile.without_inf(present).reshape(shape)
            own_finite = _tile.without_inf(without_label(present))
            of_logits = total(of_all * finite, of_own * own_finite)
        exponentials = RunningMaxState(top[:, 0], total(of_all, of_own), of_logits)
    if options.wants("sum_softplus"):
        sum_softplus = total(
            jax.nn.softplus(present.reshape(shape)),
            jax.nn.softplus(without_label(present)),
        )
    return Sums(exponentials, sum_softplus)
