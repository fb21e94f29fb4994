"""Divergences of two heads over one vocabulary, streamed in lockstep.

It uses the loops of `stream`. Every step takes the same classes of both heads. From one
tile of log-probabilities of each it computes sums per row, and backward the cotangents
of both tiles. Neither head's logits exist beyond a tile.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from softlib._dtypes import common_dtype
from softlib._sharding import match_varying
from softlib.typing import AxisName

from . import chunks as _chunks, pair_terms, stream as _stream, tile_gradient
from .accelerator import Accelerator
from .chunks import RowCut
from .operand import Operand
from .pair_terms import Divergence, Slopes, Terms
from .tile import Options, Tile
from .tile_gradient import RawCotangents


@dataclasses.dataclass(frozen=True)
class PairOptions:
    """Static options of a divergence of two heads."""

    divergence: Divergence
    target: Options
    other: Options
    axis_name: AxisName | None = None  # over which the vocabulary is divided

    @property
    def both(self) -> tuple[Options, Options]:
        return self.target, self.other

    def on(self, accelerator: Accelerator) -> "PairOptions":
        target, other = (own.on(accelerator) for own in self.both)
        return dataclasses.replace(self, target=target, other=other)


class Pair(NamedTuple):
    """The operands of a divergence; both heads have the same rows and classes."""

    target: Operand
    other: Operand
    mixture: Float[Array, ""] | None

    @property
    def both(self) -> tuple[Operand, Operand]:
        return self.target, self.other

    @property
    def dtype(self) -> DTypeLike:
        dtype = common_dtype(self.target.dtype, self.other.dtype)
        return dtype if self.mixture is None else _with(dtype, self.mixture)

    @property
    def weight(self) -> Array | None:
        """The mixing weight as an array, even if JAX made it a Python number."""
        return None if self.mixture is None else jnp.asarray(self.mixture)


class KnownPair(NamedTuple):
    """A pair, and the logsumexp of every row over all classes: target, other."""

    pair: Pair
    lse: tuple[Float[Array, " rows"], ...]


class PairGradient(NamedTuple):
    target: Any
    other: Any
    mixture: Array | None


class PairBackwardOperands(NamedTuple):
    known: KnownPair
    sums: Slopes  # of all classes, one number per row
    cotangent: Float[Array, " rows"]


def forward(options: PairOptions, known: KnownPair) -> Terms:
    """Sums over classes of `pair_terms.terms`."""
    pair = known.pair
    cut, size = _pieces(options, pair)
    vocabulary = pair.target.vocabulary(options.target)

    def of(group):
        mine = tuple(_stream.rows_of(head, cut, group) for head in pair.both)
        lse = cut.take(known.lse, group)

        def step(sums, start, size):
            slices = tuple(
                _stream.classes_of(head, start, size, own)
                for head, own in zip(mine, options.both, strict=True)
            )
            tiles = tuple(map(_stream.tile_of, slices, options.both))
            s, t = _log_probabilities(tiles, slices, lse, start, options, pair)
            found = pair_terms.terms(options.divergence, s, t, pair.weight)
            return jax.tree.map(lambda sum_, term: sum_ + term.sum(1), sums, found)

        zeros = jnp.zeros(mine[0].rows, pair.dtype)
        mixture = None if options.divergence != "jensen_shannon" else zeros
        sums = Terms(zeros, Slopes(zeros, zeros, mixture))
        sums = match_varying(sums, pair.target.like)
        return _chunks.fold(step, sums, vocabulary, size)

    return _stream.by_rows(cut, of, pair.target.like)


def backward(options: PairOptions, operands: PairBackwardOperands) -> PairGradient:
    (pair, lse), sums, cotangent = operands
    cut, size = _pieces(options, pair)
    rows = (lse, sums, cotangent)

    def cotangents(tiles, slices, start, group):
        axis = tiles[0].class_axis
        lse, sums, g = cut.take(rows, group)
        s, t = _log_probabilities(tiles, slices, lse, start, options, pair)
        found = pair_terms.terms(options.divergence, s, t, pair.weight).slopes
        per_row = lambda values: jnp.expand_dims(values, axis)

        def of(tile: Tile, sliced: Operand, log_p, slope, total) -> RawCotangents:
            # log p = z - lse: the cotangent of z is the slope less p times its sum.
            dz = per_row(g) * (slope - jnp.exp(log_p) * per_row(total))
            dz = dz.astype(tile.z.dtype)
            return tile_gradient.through_modifiers(tile, dz, sliced.modifiers)

        return (
            of(tiles[0], slices[0], s, found.target, sums.target),
            of(tiles[1], slices[1], t, found.other, sums.other),
        )

    classes = tuple(operand.class_buffers() for operand in pair.both)
    found = _stream.gradient_sums_of_heads(
        options.both, pair.both, cotangents, cut, size, classes
    )
    target, other = (
        operand.gradient(sums, classes)
        for operand, sums, classes in zip(pair.both, *found, strict=True)
    )
    mixture = pair.weight
    if mixture is not None:
        assert sums.mixture is not None
        mixture = (cotangent * sums.mixture).sum().astype(mixture.dtype)
    return PairGradient(target, other, mixture)


def _log_probabilities(
    tiles: tuple[Tile, ...],
    slices: tuple[Operand, ...],
    lse: tuple[Array, ...],
    start: _chunks.Index,
    options: PairOptions,
    pair: Pair,
) -> tuple[Array, Array]:
    def of(tile: Tile, sliced: Operand, lse: Array, own: Options) -> Array:
        labels = sliced.labels if own.exclude_labels else None
        found = tile_gradient.log_probabilities(
            tile, lse, sliced.modifiers, start, labels
        )
        return found.astype(pair.dtype)

    target, other = map(of, tiles, slices, lse, options.both)
    return target, other


def _pieces(options: PairOptions, pair: Pair) -> tuple[RowCut, int]:
    """Rows and classes per step: those of the wider head, with half its classes.

    Two tiles of half the size take the memory of one.
    """
    of_each = map(_stream.pieces, options.both, pair.both)
    cut, size = min(of_each, key=lambda pieces: pieces[0].size)
    if options.target.vocab_chunk is None:
        size = _chunks.halved(size)
    return cut, size


def steps_on_accelerators(options: PairOptions, pair: Pair) -> str | None:
    """The steps of both heads, as a sentence fragment; None if they are one tile."""
    steps = _pieces(options.on(Accelerator()), pair)
    return _stream.steps_in_words(*steps, pair.target.vocabulary(options.target))


def _with(dtype: DTypeLike, array: Any) -> DTypeLike:
    return common_dtype(dtype, array.dtype)
