"""Sums of powers of the surprisal -log p over the distribution of each row."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from softlib._compiled_once import compiled_once
from softlib._sharding import match_varying

from . import stream
from .operand import Operand
from .tile import Options


class Known(NamedTuple):
    """Numbers of each row from an earlier pass: its greatest logit and a shift."""

    top: Float[Array, " rows"]
    argmax: Int[Array, " rows"]
    shift: Float[Array, " rows"]


class Sums(NamedTuple):
    """Sums over classes with weights exp(z - top); `rest` leaves the argmax out."""

    rest: Float[Array, " rows"]
    powers: tuple[Float[Array, " rows"], ...]  # of (top - z - shift)


@compiled_once(0, 4)
def sums(
    options: Options, head: Operand, known: Known, first: Int[Array, ""], order: int
) -> Sums:
    """The sums of each row; `first` is the id of the first class."""

    def begin(rows: int) -> Sums:
        none = jnp.zeros(rows, head.dtype)
        return match_varying(Sums(none, (none,) * order), head.like, first)

    def step(total: Sums, z, start, of_rows) -> Sums:
        top, argmax, shift = (array[:, None] for array in of_rows)
        below = jnp.where(z == -jnp.inf, jnp.inf, top - z)
        weights = jnp.exp(-below)
        classes = first + start + jnp.arange(z.shape[1], dtype=jnp.int32)[None]
        others = jnp.where(classes == argmax, 0, weights)
        # A class of probability 0 adds nothing, though its surprisal is infinite.
        centred = jnp.where(below == jnp.inf, 0, below - shift)
        power, powers = weights, []
        for _ in range(order):
            power = power * centred
            powers.append(power.sum(1))
        added = tuple(map(jnp.add, total.powers, powers))
        return Sums(total.rest + others.sum(1), added)

    return stream.fold_logits(options, head, begin, step, known)
