"""Arrays that attention kernels for TPUs read besides queries, keys and values.

A boolean array and a bias over pairs, and numbers per query or per key for the mask.
Each is read in its own shape, without the axes that it shares: a block of a matrix or
of rows for each block of scores, fetched as those of keys are.

What varies over one axis of a pair lies along lanes in memory. In a tile of scores what
varies with its columns stays there, what varies with its rows is needed along sublanes:
its block is turned once for each row of blocks, into scratch in which all lanes are
equal. Tiles whose rows are keys need matrices the other way round: their blocks are
turned when they were fetched.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._attention_extras import Extras, Role

from .attention_blocks import column
from .attention_form import Form
from .attention_pieces import SLICE, aligned, chunk_of
from .attention_tiles import LANES, Part, Tiles


def operands_of(extras: Extras) -> list[jax.Array]:
    """The arrays of a kernel's call: (b, n, t, s), or (b, n, m, t) of positions.

    Those over pairs vary over one of their axes at least. Where they vary over both
    `dense` is int8 and `bias` bfloat16 or float32, else int32 and float32.
    """

    def stored(role: Role, over: tuple[bool, bool], x: jax.Array) -> jax.Array:
        if role == "mask":
            return x[:, None]
        return x if all(over) else x.reshape(*x.shape[:2], 1, -1)

    return [stored(*each) for each in extras.given]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The blocks of a kernel.

    Attributes:
        parts: Of the extras.
        tiles: Sizes.
        is_transposed: Whether the rows of tiles are keys.
    """

    parts: tuple[Part, ...]
    tiles: Tiles
    is_transposed: bool = False

    def is_light(self, form: Form) -> bool:
        """Whether slices take so few registers, without a mask, that they may overlap.

        A matrix alone takes few; numbers of rows, which are needed in all lanes, many.
        """
        over_pairs = [part for part in self.parts if part.role != "mask"]
        is_matrix = len(over_pairs) == 1 and all(over_pairs[0].over)
        alone = is_matrix and form.softcap is None
        return form.weights.is_light and (alone or not over_pairs)

    @property
    def turns_blocks(self) -> bool:
        """Whether something is turned in each step."""
        return any(map(self.moves, self.parts))

    def moves(self, part: Part) -> bool:
        """Whether a part is turned and changes along a row of blocks."""
        changes = self.is_transposed and (all(part.over) or part.of_heads)
        return changes and part.is_turned(self.is_transposed)

    def specs(self, at: Callable[..., Any]) -> list[pl.BlockSpec]:
        """Specs of the operands.

        `at` gives batch entry, head, and blocks of queries and of keys from the indices
        of a grid.
        """
        return [self._spec(part, at) for part in self.parts]

    def _spec(self, part: Part, at: Callable[..., Any]) -> pl.BlockSpec:
        sizes = (self.tiles.query, self.tiles.key)

        def index(*grid: Any) -> Any:
            batch, head, *blocks = at(*grid)
            shared = (
                batch if part.of_batch else 0,
                head if part.of_heads else 0,
            )
            if all(part.over):
                return *shared, *blocks
            return *shared, 0, blocks[part.over.index(True)]

        if all(part.over):
            return pl.BlockSpec((None, None, *sizes), index)
        size = sizes[part.over.index(True)]
        return pl.BlockSpec((None, None, part.count, size), index)

    def scratch(self) -> list[Any]:
        """Memory for what is turned, of the parts that are."""
        block = (self.tiles.query, self.tiles.key)
        return [
            pltpu.VMEM(*part.turned(block, self.is_transposed))
            for part in self.parts
            if part.is_turned(self.is_transposed)
        ]

    def taken(self, refs: list[Any]) -> list[Any]:
        """The references to operands, which leave the front of the list."""
        return [refs.pop(0) for _ in self.parts]

    def reader(self, operands: Sequence[Any], refs: list[Any]) -> "Reader":
        """A reader of the operands; references to scratch leave the list."""
        turned = [
            refs.pop(0) if part.is_turned(self.is_transposed) else None
            for part in self.parts
        ]
        return Reader(self, operands, turned)


class Scores(NamedTuple):
    """Scores of a slice of a piece.

    Attributes:
        z: After the softcap and the bias.
        slope: Of the softcap; None without.
        attends: Booleans; None where every pair attends.
    """

    z: Any
    slope: Any
    attends: Any


@dataclasses.dataclass(frozen=True)
class Reader:
    """Reads the blocks inside of a kernel; without parts it does nothing.

    Attributes:
        layout: What is static.
        operands: References to the blocks.
        turned: References to scratch; None for a part that is not turned.
    """

    layout: Layout
    operands: Sequence[Any]
    turned: Sequence[Any]

    def start_row(self) -> None:
        """Turns what stays along a row of blocks."""
        for part, ref, turned in self._each():
            if turned is not None and not self.layout.moves(part):
                _turn_lanes(ref, turned)

    def start_block(self, is_first_head: Any) -> None:
        """Turns the other blocks, those that heads share for the first head only."""
        for part, ref, turned in self._each():
            if not self.layout.moves(part):
                continue
            turn = _transpose if all(part.over) else _turn_lanes
            turn = functools.partial(turn, ref, turned)
            if part.of_heads:
                turn()
            else:
                pl.when(is_first_head)(turn)

    def scores(
        self,
        form: Form,
        products: Any,
        rows: Any,
        columns: Any,
        masked: Callable[[Sequence[Any]], Any] | None,
        real: Any = None,
    ) -> Scores:
        """The scores of some products.

        Args:
            form: Static options.
            products: Of queries and keys.
            rows: Their rows in the block.
            columns: Their columns.
            masked: What the mask and the lengths select, from the numbers of the mask;
                None in a block that they select as a whole.
            real: True in columns that are no padding, (1, columns), where a bias there
                would count; None if none would.
        """
        z, slope = form.scores(products)
        for bias in self._read("bias", rows, columns):
            if real is not None:
                bias = jnp.where(real, bias, jnp.zeros_like(bias))
            z = z + bias.astype(jnp.float32) * form.weights.unit
        attends = None if masked is None else masked(self._read("mask", rows, columns))
        for dense in self._read("dense", rows, columns):
            ok = jnp.broadcast_to(dense.astype(jnp.int32) != 0, z.shape)
            attends = ok if attends is None else attends & ok
        return Scores(z, slope, attends)

    def _read(self, role: Role, rows: Any, columns: Any) -> list[Any]:
        """Parts of a role, which broadcast to (rows, columns)."""
        found = []
        for part, ref, turned in self._each():
            if part.role != role:
                continue
            if all(part.over):
                found.append(_slice(ref if turned is None else turned, rows, columns))
            elif turned is not None:
                found += [turned[n, rows, :1] for n in range(part.count)]
            else:
                found += [ref[n : n + 1, columns] for n in range(part.count)]
        return found

    def _each(self) -> Any:
        return zip(self.layout.parts, self.operands, self.turned, strict=True)


def _slice(ref: Any, rows: Any, columns: Any) -> Any:
    if ref.dtype != jnp.int8:
        return ref[rows, columns]
    # Bytes can be read from multiples of 32 rows only, which are two slices.
    start = lax.div(rows.start, 2 * SLICE) * (2 * SLICE)
    both = ref[pl.ds(aligned(start, 2 * SLICE), 2 * SLICE), columns].astype(jnp.int32)
    return jnp.where(rows.start == start, both[:SLICE], both[SLICE:])


def _turn_lanes(ref: Any, out_ref: Any) -> None:
    """Puts numbers along lanes into scratch whose lanes are equal."""
    count, size = ref.shape

    def some(i: Any, _: None) -> None:
        rows = chunk_of(0, i, LANES)
        for n in range(count):
            out_ref[n, rows, :] = column(ref[n : n + 1, rows])

    lax.fori_loop(0, size // LANES, some, None)


def _transpose(ref: Any, out_ref: Any) -> None:
    rows, columns = (size // LANES for size in ref.shape)

    def square(i: Any, _: None) -> None:
        row = chunk_of(0, lax.div(i, columns), LANES)
        across = chunk_of(0, lax.rem(i, columns), LANES)
        out_ref[across, row] = ref[row, across].astype(out_ref.dtype).T

    lax.fori_loop(0, rows * columns, square, None)
