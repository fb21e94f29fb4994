"""Sums of powers of the surprisal -log p over the distribution of each row."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from softlib._compiled_once import compiled_once
from softlib._sharding import match_varying

from . import chunks as _chunks, stream, tile as _tile
from .chunks import Index
from .operand import Operand
from .tile import Options


class Known(NamedTuple):
    """Numbers of each row from a pass before: its greatest logit and a shift."""

    top: Float[Array, " rows"]
    argmax: Int[Array, " rows"]
    shift: Float[Array, " rows"]


class Sums(NamedTuple):
    """Sums over classes with weights exp(z - top); `rest` leaves out the argmax."""

    rest: Float[Array, " rows"]
    powers: tuple[Float[Array, " rows"], ...]  # of (top - z - shift)


@compiled_once(0, 4)
def sums(
    options: Options, head: Operand, known: Known, first: Int[Array, ""], order: int
) -> Sums:
    """The sums of each row; `first` is the id of the first class."""
    cut, size = stream.pieces(options, head)

    def of(group: Index | None) -> Sums:
        mine = stream.rows_of(head, cut, group)
        top, argmax, shift = (array[:, None] for array in cut.take(known, group))

        def step(total: Sums, start, size) -> Sums:
            part = stream.classes_of(mine, start, size, options)
            z = stream.tile_of(part, options).z
            z = _tile.select(z, part.modifiers.class_where, -jnp.inf)
            below = jnp.where(z == -jnp.inf, jnp.inf, top - z)
            weights = jnp.exp(-below)
            classes = first + start + jnp.arange(size, dtype=jnp.int32)[None]
            others = jnp.where(classes == argmax, 0, weights)
            # A class of probability 0 adds nothing, however surprising.
            centred = jnp.where(below == jnp.inf, 0, below - shift)
            power, powers = weights, []
            for _ in range(order):
                power = power * centred
                powers.append(power.sum(1))
            added = tuple(map(jnp.add, total.powers, powers))
            return Sums(total.rest + others.sum(1), added)

        none = jnp.zeros(mine.rows, head.dtype)
        nothing = match_varying(Sums(none, (none,) * order), head.like, first)
        return _chunks.fold(step, nothing, head.vocabulary(options), size)

    return stream.by_rows(cut, of, head.like)
