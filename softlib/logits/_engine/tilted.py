"""Logsumexp and mean direction of many tilted distributions, in one stream.

A tilted distribution is the softmax of the first or the second of several logits, plus
a combination of directions: the differences of the others to the second. All are
folded over the same tiles, so that a head is multiplied once for all of them.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from softlib._compiled_once import compiled_once
from softlib._sharding import match_varying

from . import chunks as _chunks, stream
from .blocks import Blocks
from .tile import Options


class Tilts(NamedTuple):
    """The distributions that are asked for, n per row."""

    from_second: Bool[Array, "rows n"]
    weights: Float[Array, "rows n directions"]


class Tilted(NamedTuple):
    """Moments of each distribution; the mean is 0 and lse -inf without classes."""

    lse: Float[Array, "rows n"]
    mean: Float[Array, "rows n directions"]


class _Sums(NamedTuple):
    """Sums of one distribution, relative to its greatest logit so far."""

    top: Float[Array, " rows"]
    total: Float[Array, " rows"]
    weighted: Float[Array, "directions rows"]


@compiled_once(0)
def moments(options: Options, head: Blocks, tilts: Tilts) -> Tilted:
    """The moments of all distributions; `head` holds a value that has `tiles`."""
    cut, size = stream.pieces(options, head)

    def of(group: _chunks.Index | None) -> Tilted:
        mine, own = stream.rows_of(head, cut, group), cut.take(tilts, group)
        # A distribution after the other, so that one tile of exponentials lives.
        each = Tilts(own.from_second.T, jnp.moveaxis(own.weights, 0, -1))
        count, directions, rows = each.weights.shape
        none = jnp.zeros((count, rows), head.dtype)
        weighted = jnp.zeros((count, directions, rows), head.dtype)
        start = match_varying(_Sums(none - jnp.inf, none, weighted), head.like)

        def step(sums: _Sums, start: _chunks.Index, size: int) -> _Sums:
            sliced = stream.classes_of(mine, start, size, options)
            counts, (first, second, *others) = sliced.value.tiles()
            away = [jnp.where(counts, z - second, 0) for z in others]

            def add(both: tuple[_Sums, Tilts]) -> _Sums:
                old, tilt = both
                z = jnp.where(tilt.from_second[:, None], second, first)
                for weight, direction in zip(tilt.weights, away, strict=True):
                    z = z + weight[:, None] * direction
                return _added(old, jnp.where(counts, z, -jnp.inf), away)

            return lax.map(add, (sums, each))

        sums = _chunks.fold(step, start, head.vocabulary(options), size)
        empty = sums.total == 0
        total = jnp.where(empty, 1, sums.total)
        lse = jnp.where(empty, -jnp.inf, sums.top + jnp.log(total))
        return Tilted(lse.T, jnp.moveaxis(sums.weighted / total[:, None], -1, 0))

    return stream.by_rows(cut, of, head.like)


def _added(old: _Sums, z: Array, away: list[Array]) -> _Sums:
    """The sums with the classes of a tile, whose excluded logits are -inf."""
    top = jnp.maximum(old.top, z.max(1))
    shift = jnp.where(top == -jnp.inf, 0, top)
    p, kept = jnp.exp(z - shift[:, None]), jnp.exp(old.top - shift)
    weighted = jnp.stack([(p * direction).sum(1) for direction in away])
    total = kept * old.total + p.sum(1)
    return _Sums(top, total, kept[None] * old.weighted + weighted)
