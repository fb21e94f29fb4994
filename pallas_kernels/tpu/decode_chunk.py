"""A chunk of keys in the decode kernel: scores, weights, and their sums.

Sums and maxima are kept per lane until the sequence ends, except the running maximum,
which is per row.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from .bfloat16_parts import pairs, part_count, parts_of, product
from .decode_tiles import LANES, Form, Tiles

# Groups of 128 lanes that are unrolled without spills, as compiled.
PIECE = 2


@dataclasses.dataclass(frozen=True)
class State:
    """References to the sums of a sequence and to the scores of one chunk.

    Numbers per row have the shape (rows, 128). Until the sequence ends, each lane holds
    the sum over its own keys.
    """

    weighted: Any
    top: Any
    total: Any
    least: Any
    scores: Any
    weights: Any

    def start(self) -> None:
        for ref, value in (
            (self.weighted, 0),
            (self.top, -jnp.inf),
            (self.total, 0),
            (self.least, jnp.inf),
        ):
            ref[...] = jnp.full_like(ref, value)


def visit_chunk(
    query_ref,
    visible_ref,
    numbers_ref,
    state: State,
    longest,
    form: Form,
    tiles: Tiles,
    shared: int,
    key_ref,
    value_ref,
    first,
    index,
    *,
    masked: bool,
    again: bool,
) -> None:
    """Adds a chunk of keys to the sums; `masked` if some row does not see them all.

    Scores and weights go through vector memory, a few rows at a time: they exceed the
    registers.
    """
    lanes = tiles.chunk * form.heads
    start = pl.multiple_of(index * lanes, lanes)
    first = first + index * tiles.chunk
    piece = _piece(lanes, state.weights.dtype)

    def multiply(i, _):
        at = pl.multiple_of(i * piece, LANES)
        key = key_ref[pl.ds(start + at, piece)]
        for n, found in enumerate(_products(query_ref[0], key, 1, form.precision[0])):
            here = state.scores.at[:, pl.ds(at, piece)]
            here[...] = found if n == 0 else here[...] + found

    lax.fori_loop(0, lanes // piece, multiply, None)
    rows, strip = query_ref.shape[1], strip_of(state.weights.dtype)

    def weigh(i, _):
        here = pl.ds(pl.multiple_of(i * strip, strip), strip)
        mask = _Mask(
            form,
            quotient(here.start + _iota((strip, 1), 0), shared),
            visible_ref[0, here] - first if masked else None,
        )
        _weigh(here, mask, numbers_ref[here], state, form, lanes, again=again)

    lax.fori_loop(0, rows // strip, weigh, None)
    products = functools.partial(_products, contract=0, precision=form.precision[1])

    def accumulate(i, _):
        at = pl.multiple_of(i * piece, LANES)
        value = value_ref[pl.ds(start + at, piece)]
        for found in products(state.weights[:, pl.ds(at, piece)], value):
            state.weighted[...] += found

    if not masked and not again:
        lax.fori_loop(0, lanes // piece, accumulate, None)
        return

    def values(at, which):
        """Values of 128 entries; 0 behind the end and for other heads than `which`."""
        value = value_ref[pl.ds(start + at, LANES)]
        key, head = _key_and_head(form, at + _iota((LANES, 1), 0))
        counts = key < (longest - first if masked else tiles.chunk)
        if which is not None:
            counts = counts & (head == which)
        return jnp.where(counts, value, 0)

    def add_values(i, _):
        at = pl.multiple_of(i * LANES, LANES)
        weights = lambda: state.weights[:, pl.ds(at, LANES)]
        if not again:
            # Entries behind the end may be NaN, which a weight of 0 keeps.
            for found in products(weights(), values(at, None)):
                state.weighted[...] += found
            return

        def of_head(which, _):
            row = quotient(_iota((rows, 1), 0), shared)
            for found in products(weights(), values(at, which)):
                state.weighted[...] += jnp.where(row == which, found, 0)

        lax.fori_loop(0, form.heads, of_head, None)

    lax.fori_loop(0, lanes // LANES, add_values, None)


def _products(
    first: Any, second: Any, contract: int, precision: lax.Precision
) -> Iterator[Any]:
    """Yields products of bfloat16 parts, the smallest first; their sum is the product.

    The last axis of `first` is contracted with the axis `contract` of `second`. The
    compiler's own float32 product spills registers.
    """
    left, right = (
        list(parts_of(x, part_count(x.dtype, precision))) for x in (first, second)
    )
    for i, j in pairs((len(left), len(right))):
        yield product(left[i], right[j], (1, contract))


class _Mask(NamedTuple):
    """A mask of rows by their head and by the number of keys they see (None: all)."""

    form: Form
    head: Any
    visible: Any

    def __call__(self, z: Any, start: int) -> Any:
        """The scores from lane `start` on, -inf where they are masked."""
        key, head = _key_and_head(self.form, start + _iota((1, z.shape[1]), 1))
        if self.form.heads > 1:
            z = jnp.where(head == self.head, z, -jnp.inf)
        if self.visible is not None:
            z = jnp.where(key < self.visible, z, -jnp.inf)
        return z


def _weigh(
    rows, mask: _Mask, numbers, state: State, form: Form, lanes: int, *, again: bool
) -> None:
    """Turns the scores of some rows into weights and adds these to the sums."""
    column = lambda i: jnp.broadcast_to(numbers[:, i : i + 1], state.top[rows].shape)
    scale, plain = column(0), form.unified and not again
    is_long = form.elementwise or form.softcap is not None
    piece = LANES if is_long else _piece(lanes, state.weights.dtype)

    def scores(start):
        z = state.scores[rows, pl.ds(start, LANES)] * scale
        if form.softcap is not None:
            z = form.softcap * jnp.tanh(z * (1 / form.softcap))
        return mask(z, start)

    def fold(function, carry):
        """Loops over 128 lanes at a time: masks of all would exceed the registers."""

        def step(i, carry):
            for start in range(0, piece, LANES):
                carry = function(pl.multiple_of(i * piece + start, LANES), carry)
            return carry

        return lax.fori_loop(0, lanes // piece, step, carry)

    def maximum(start, top):
        z = scores(start)
        state.scores[rows, pl.ds(start, LANES)] = z
        return jnp.maximum(top, z)

    def weigh(start, sums):
        total, top, least = sums
        z = scores(start) if plain else state.scores[rows, pl.ds(start, LANES)]
        if plain:
            top = jnp.maximum(top, z)
        if least is not None:
            least = jnp.minimum(least, jnp.where(z == -jnp.inf, jnp.inf, z))
        weights = jnp.exp(z - reference)
        state.weights[rows, pl.ds(start, LANES)] = weights.astype(state.weights.dtype)
        return total + weights, top, least

    old, total, least = state.top[rows], state.total[rows], None
    if plain:
        reference, top = column(1), old
        least = state.least[rows] if form.elementwise else None
    else:
        top = fold(maximum, old)
        top = jnp.broadcast_to(top.max(1, keepdims=True), top.shape)
        reference = jnp.where(top == -jnp.inf, 0, top)
        factor = jnp.exp(old - reference)
        total = total * factor
        state.weighted[rows] = state.weighted[rows] * factor[:, 0:1]
    total, top, least = fold(weigh, (total, top, least))
    state.total[rows], state.top[rows] = total, top
    if least is not None:
        state.least[rows] = least


def _key_and_head(form: Form, index):
    """The key and the head at an index of a chunk, in which heads vary fastest."""
    key = quotient(index, form.heads)
    return key, index - key * form.heads


def _iota(shape: tuple[int, int], axis: int):
    return lax.broadcasted_iota(jnp.int32, shape, axis)


def _piece(lanes: int, dtype: Any) -> int:
    """The number of lanes per product: as many as compile without spills."""
    most = 1 if dtype == jnp.float32 else PIECE
    return next(n * LANES for n in (most, 1) if lanes % (n * LANES) == 0)


def strip_of(dtype: Any) -> int:
    """The number of rows of one register, which are processed at a time."""
    return 32 // jnp.dtype(dtype).itemsize


def quotient(x, divisor: int):
    """`x // divisor` of integers that are not negative."""
    if divisor & (divisor - 1):
        return lax.div(x, jnp.int32(divisor))
    return lax.shift_right_logical(x, jnp.int32(divisor.bit_length() - 1))


def count_of(n, size: int):
    """The number of blocks of `size` that hold `n` entries; 0 or less for `n` <= 0."""
    return lax.div(n + size - 1, jnp.int32(size))
