"""Sums over the classes other than a row's one label, of logits that exist.

Neither of the plain ways is good. The sum of all classes less the label's term cancels
where the label has nearly all of the probability, and a copy of the logits with -inf at
the labels costs their memory and two passes over it. So a row is cut into pieces, each
summed as it lies; the label's piece alone is copied without the label and summed again,
and that takes its place before the sums of the pieces are merged.
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

# A copy of one piece of this many is small, and so is a number per piece; the loop over
# fewer classes than these is slower than one over all.
_PIECES = 32
_SMALLEST = 64
# The statistics that are made of `Sums`.
SUMS = ("lse", "mean_logit", "sum_softplus")


class Sums(NamedTuple):
    """Of the classes other than the label; a part that nobody needs is None."""

    exponentials: RunningMaxState | None
    sum_softplus: Array | None


def pieces_of(vocabulary: int) -> int:
    """Into how many equal pieces a row is cut; 1 if there is no good number.

    Where classes may be divided by up to 16 devices, so are the pieces.
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
    """What `update` of a tile that holds whole rows adds up without the labels."""
    present = _tile.select(tile.z, modifiers.class_where, -jnp.inf)
    rows, vocabulary = present.shape
    size = vocabulary // pieces
    shape = (rows, pieces, size)

    # A label outside the vocabulary is -1; then every piece stays as it is.
    # Several kernels read the number of the label's piece, which a division makes.
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
        # The sum over the label's piece as it lies is replaced, but must not overflow:
        # in derivatives of this its cotangent is 0, and 0 * inf is NaN.
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
