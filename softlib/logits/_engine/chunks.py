"""Sizes of the tiles of a stream over (rows, vocabulary), and the loops over tiles.

The sizes are those of a CPU; `accelerator` has those of TPUs and GPUs.

Cost model of the plain (XLA) stream, D features, tiles of R rows and C classes:

- scratch: a few (R, C) tiles, the (C, D) weight slice with its float32 gradient and, if
  rows are cut, the (R, D) hidden slice with its float32 gradient;
- besides the products (6 R C D flop per backward step) a step reads and writes about
  4 (R + C) D numbers, so both R and C should be large compared with the flop/byte ratio
  of the machine, and the tile should stay in its last-level cache.

So a tile holds about `TILE` numbers, C is a multiple of 128 from 1024 to 4096, and R is
at most 2048. Rows are cut if their float32 gradient would need more than `ROWS` numbers
of scratch for the sum of one step. (On a CPU, C = 1024 is within 2 % of the best of 512
to 4096, for 1024 and 2048 rows.)

Logits of at most `WHOLE` numbers are one tile, kept for the backward pass: the tiles of
a stream would need as much scratch, and be computed twice.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from softlib._barrier import barrier_on_cpu
from softlib._symbolic import is_symbolic

TILE = 2**20
WHOLE = 2**21
# Numbers of a tile of a search, which keeps nothing for a backward pass.
SEARCH = 2**22
ROWS = 2**21
# Logits of one block of rows that the one-pass form of a loss holds: 128 MiB.
BLOCK = 2**25
# Raw products that are kept for the backward pass if storing them takes less time than
# computing them: 96 MiB, of at most three quarters of the classes. With the scratch of
# a step, some six tiles, they are smaller than the logits.
KEPT = 3 * 2**23
# A product of fewer features takes less time than writing and reading its result.
KEPT_FEATURES = 256
_LANES = 128

type Index = int | Int[Array, ""]

# Slices whose start is never negative, so that no step of a loop adds the length to it.
slice_of = functools.partial(lax.dynamic_slice_in_dim, allow_negative_indices=False)
with_slice = functools.partial(
    lax.dynamic_update_slice_in_dim, allow_negative_indices=False
)


# -------------------------------------------------------------------------- vocabulary
def vocab_chunk(rows: int, features: int, vocabulary: int) -> int:
    """Classes per step, for the given number of rows per step."""
    # Smaller tiles leave room for products that are kept.
    tile = TILE if features < KEPT_FEATURES else TILE // 4
    # An unknown number of rows counts as a large one.
    fitting = 0 if is_symbolic(rows) else tile // max(rows, features, 1)
    chunk = min(max(_round_up(fitting, _LANES), 1024), 4096)
    # At least two slices, or the one tile would be the logits themselves.
    half = _round_up(math.ceil(vocabulary / 2), _LANES)
    return min(chunk, max(half, 512), vocabulary)


def search_chunk(rows: int, features: int, vocabulary: int) -> int:
    """Classes per step of a forward pass that searches its tiles."""
    if not is_symbolic(rows) and rows * vocabulary <= SEARCH:
        return vocabulary
    most = 0 if is_symbolic(rows) else SEARCH // max(rows, features, 1)
    return most // _LANES * _LANES


def halved(size: int) -> int:
    """Classes per step if two tiles are live instead of one."""
    return max(_round_up(size // 2, _LANES), min(size, 512))


def kept_classes(rows: int, features: int, vocabulary: int, size: int) -> int:
    """Number of classes, in whole steps, that are kept for the backward pass."""
    if features < KEPT_FEATURES or is_symbolic(rows):
        return 0
    below = max(vocabulary - 6 * size, 0)
    most = min(KEPT // max(rows, 1), vocabulary * 3 // 4, below)
    return most // size * size


def fold[Carry](
    step: Callable[[Carry, Index, int], Carry],
    carry: Carry,
    length: int,
    size: int,
    first: int = 0,
) -> Carry:
    """Runs `step(carry, start, size)` from `first` to `length`, a shorter rest last.

    The loop is not unrolled: XLA might keep the scratch of all unrolled steps at once.
    Nothing is padded, and no slice reaches beyond the end.
    """
    whole = (length - first) // size
    if whole == 1:
        carry = step(carry, first, size)
    elif whole:
        # The loop carries the start, so that no kernel computes it: then kernels of
        # loops over other ranges of the axis are equal, and are compiled once.
        def body(_: Index, both: tuple[Array, Carry]) -> tuple[Array, Carry]:
            start, carry = both
            after = barrier_on_cpu(start + size)
            return after, step(carry, start, size)

        begun = (jnp.asarray(first, jnp.int32), carry)
        _, carry = lax.fori_loop(0, whole, body, begun)
    rest = (length - first) % size
    if rest:
        carry = step(carry, length - rest, rest)
    return carry


# -------------------------------------------------------------------------------- rows
class Total(NamedTuple):
    """Buffers of arrays over all rows: those of the groups, and those of the rest."""

    grouped: Any
    rest: Any


@dataclasses.dataclass(frozen=True)
class RowCut:
    """Rows divided into `groups` groups of `size` and a shorter rest.

    Groups are strided (row i belongs to group i mod groups), so that every group has
    rows of each device if rows are sharded: all devices work in every step. Groups are
    contiguous if results depend on the tiles, as with a gradient filter.
    """

    groups: int
    size: int
    rest: int = 0
    strided: bool = True

    @property
    def whole(self) -> bool:
        return self.groups == 1 and self.rest == 0

    def take(self, tree: Any, group: Index | None) -> Any:
        """The rows of one group, or of the rest for None; scalars stay."""
        count = self.groups * self.size

        def of(array: Any) -> Any:
            if array.ndim == 0 or self.whole:
                return array
            if group is None:
                return array[count:]
            grouped = array[:count].reshape(*self._shape, *array.shape[1:])
            return _entry_of(grouped, group, self._axis)

        return jax.tree.map(of, tree)

    def zeros(self, piece: Any) -> Total:
        """Zero buffers for arrays like those of one group (structs suffice)."""
        grouped = lambda a: jnp.zeros((*self._shape, *a.shape[1:]), a.dtype)
        rest = lambda a: jnp.zeros((self.rest, *a.shape[1:]), a.dtype)
        if self.whole:
            return Total(jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), piece), ())
        return Total(
            jax.tree.map(grouped, piece),
            jax.tree.map(rest, piece) if self.rest else (),
        )

    def add(self, total: Total, piece: Any, group: Index | None) -> Total:
        """Adds the numbers of one group, or of the rest for None."""
        if self.whole or group is None:
            old = total.grouped if self.whole else total.rest
        else:
            entry = lambda array: _entry_of(array, group, self._axis)
            old = jax.tree.map(entry, total.grouped)
        return self.put(total, jax.tree.map(jnp.add, old, piece), group)

    def put(self, total: Total, piece: Any, group: Index | None) -> Total:
        """Writes the numbers of one group, or of the rest for None."""
        if self.whole:
            return Total(piece, ())
        if group is None:
            return total._replace(rest=piece)
        write = lambda array, entry: lax.dynamic_update_index_in_dim(
            array, entry, group, self._axis, allow_negative_indices=False
        )
        return total._replace(grouped=jax.tree.map(write, total.grouped, piece))

    def joined(self, total: Total) -> Any:
        """The buffers as arrays over all rows."""
        if self.whole:
            return total.grouped
        flat = lambda a: a.reshape(self.groups * self.size, *a.shape[2:])
        grouped = jax.tree.map(flat, total.grouped)
        if not self.rest:
            return grouped
        join = lambda a, b: jnp.concatenate([a, b])
        return jax.tree.map(join, grouped, total.rest)

    def fold[Carry](
        self, visit: Callable[[Carry, Index | None], Carry], carry: Carry
    ) -> Carry:
        """Runs `visit(carry, group)` over the groups, then with None for the rest."""
        if self.groups == 1:
            carry = visit(carry, 0)
        else:
            step = lambda group, carry: visit(carry, group)
            carry = lax.fori_loop(0, self.groups, step, carry)
        return visit(carry, None) if self.rest else carry

    @property
    def _shape(self) -> tuple[int, int]:
        return (self.size, self.groups) if self.strided else (self.groups, self.size)

    @property
    def _axis(self) -> int:
        return 1 if self.strided else 0


def row_cut(
    rows: int,
    features: int,
    token_chunk: int | None = None,
    *,
    strided: bool = True,
    most: int | None = None,
) -> RowCut:
    """Groups of `token_chunk` rows, of at most `most`, or by the cost model.

    Without a suitable divisor of the number of rows there is a shorter rest. Contiguous
    groups are multiples of 128 rows.
    """
    if token_chunk is not None:
        return _of_size(rows, token_chunk, strided)
    if most is None:
        most = min(max(ROWS // max(features, 1), 256), 2048)
    return _at_most(rows, max(most // _LANES, 1) * _LANES, strided)


def row_blocks(
    rows: int, vocabulary: int, token_chunk: int | None = None, *, strided: bool = True
) -> RowCut:
    """Groups of rows whose logits are stored: `BLOCK` numbers, or 128 rows."""
    if token_chunk is not None:
        return _of_size(rows, token_chunk, strided)
    limit = max(BLOCK // max(vocabulary, 1) // _LANES * _LANES, _LANES)
    return _at_most(rows, limit, strided)


def _at_most(rows: int, limit: int, strided: bool) -> RowCut:
    # Cutting needs a known number of rows.
    if is_symbolic(rows) or rows <= limit:
        return RowCut(1, rows, 0, strided)
    if strided:
        least = math.ceil(rows / limit)
        divisors: Sequence[int] = range(least, 2 * least + 1)
        groups = next((g for g in divisors if rows % g == 0), None)
        if groups is not None:
            return RowCut(groups, rows // groups, 0, strided)
    return _of_size(rows, limit, strided)


def _of_size(rows: int, size: int, strided: bool) -> RowCut:
    if rows <= size:
        return RowCut(1, rows, 0, strided)
    return RowCut(rows // size, size, rows % size, strided)


def _entry_of(array: Array, index: Index, axis: int) -> Array:
    return lax.dynamic_index_in_dim(
        array, index, axis, keepdims=False, allow_negative_indices=False
    )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
