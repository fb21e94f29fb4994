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

from softlib.numerics import RunningMaxState

from . import _tile
from ._tile import Modifiers, Options, Tile

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
    at = jnp.where(labels < 0, 0, labels // size)
    ids = at * size + lax.broadcasted_iota(labels.dtype, (rows, size), 1)
    marked = (ids == labels)[:, None]

    def without_label(of_classes: Array) -> Array:
        """(rows, 1, size): the label's piece, -inf at the label."""
        own = jnp.take_along_axis(of_classes.reshape(shape), at[..., None], axis=1)
        return jnp.where(marked, -jnp.inf, own)

    mine = lax.broadcasted_iota(labels.dtype, (rows, pieces), 1) == at
    replaced = lambda all_pieces, own: jnp.where(mine, own, all_pieces)

    exponentials = sum_softplus = None
    if options.wants("lse", "mean_logit"):
        mean = options.wants("mean_logit")
        weighted = _tile.weighted(present, modifiers, 1)
        of_all = _state(weighted.reshape(shape), present.reshape(shape), mean)
        own = _state(without_label(weighted), without_label(present), mean)
        exponentials = _merged(jax.tree.map(replaced, of_all, own))
    if options.wants("sum_softplus"):
        softplus = lambda z: jax.nn.softplus(z).sum(-1)
        found = replaced(
            softplus(present.reshape(shape)), softplus(without_label(present))
        )
        sum_softplus = found.sum(-1)
    return Sums(exponentials, sum_softplus)


def _state(weighted: Array, present: Array, mean: bool) -> RunningMaxState:
    """Of the last axis, without the fold's step from an empty state: a loop less."""
    top = lax.stop_gradient(weighted).max(-1)
    exponentials = jnp.exp(weighted - _finite(top)[..., None])
    of_logits = None
    if mean:
        of_logits = (exponentials * _tile.without_inf(present)).sum(-1)
    return RunningMaxState(top, exponentials.sum(-1), of_logits)


def _merged(pieces: RunningMaxState) -> RunningMaxState:
    """One state of each row from those of its pieces."""
    top = pieces.max.max(-1)
    factors = jnp.exp(pieces.max - _finite(top)[..., None])
    total = lambda part: (part * factors).sum(-1)
    return RunningMaxState(top, total(pieces.sum), jax.tree.map(total, pieces.weighted))


def _finite(maximum: Array) -> Array:
    """The maximum as something to subtract: 0 where no score is above -inf."""
    return jnp.where(maximum == -jnp.inf, 0, maximum)
