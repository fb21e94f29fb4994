"""How a stream over (rows, vocabulary) is cut, and the loop that visits the pieces.

Cost model of the plain (XLA) stream, D features, tiles of R rows and C classes:

- scratch: a few (R, C) tiles, the (C, D) weight slice with its float32 gradient and, if
  rows are grouped, the (R, D) hidden slice with its float32 gradient;
- beside the products (6 R C D flop a backward step) a step reads and writes about
  4 (R + C) D numbers, so both R and C should be large against the flop/byte ratio of
  the machine, and the tile should stay in its last-level cache.

So a tile holds about `TILE` numbers, C is a multiple of 128 from 1024 to 4096, R is at
most 2048, and rows are grouped as soon as their float32 gradient would need more than
`ROWS` numbers of scratch for the sum of one step. A vocabulary below 2048 is halved.
(On a CPU, C = 1024 is within 2 % of the best of 512 to 4096, for 1024 and 2048 rows.)
"""

import math
from collections.abc import Callable

from jax import lax
from jaxtyping import Array, Int

TILE = 2**20
ROWS = 2**21
_LANES = 128


def vocab_chunk(rows: int, features: int, vocabulary: int) -> int:
    """Classes per step, for the given number of rows per step."""
    fitting = TILE // max(rows, features, 1)
    chunk = min(max(_round_up(fitting, _LANES), 1024), 4096)
    # Two slices at least, or the tile would be the logits that are not to be stored.
    half = _round_up(math.ceil(vocabulary / 2), _LANES)
    return min(chunk, max(half, 512), vocabulary)


def row_groups(rows: int, features: int) -> int:
    """Into how many groups of equal size the rows are divided.

    Groups are strided (row i belongs to group i mod groups): the leading part of the
    row axis keeps its meaning, so that a program whose rows are sharded over devices
    works on each device's own rows in every step. A number of rows without a suitable
    divisor stays in one group and pays with scratch.
    """
    limit = min(max(ROWS // max(features, 1), 256), 2048)
    if rows <= limit:
        return 1
    least = math.ceil(rows / limit)
    divisors = (g for g in range(least, 4 * least + 1) if rows % g == 0)
    return next(divisors, 1)


def fold[Carry](
    step: Callable[[Carry, int | Int[Array, ""], int], Carry],
    carry: Carry,
    length: int,
    size: int,
) -> Carry:
    """Runs `step(carry, start, size)` over `length`, the short rest last.

    A loop of the compiler, not of Python: an unrolled loop lets XLA keep the scratch of
    all steps at once. Nothing is padded, and no slice reaches beyond the end.
    """
    whole = length // size
    if whole == 1:
        carry = step(carry, 0, size)
    elif whole:
        body = lambda i, carry: step(carry, i * size, size)
        carry = lax.fori_loop(0, whole, body, carry)
    if length % size:
        carry = step(carry, whole * size, length % size)
    return carry


def group_of(array: Array, group: int | Int[Array, ""], groups: int) -> Array:
    """(rows, ...) -> (rows / groups, ...), the rows of one group."""
    if groups == 1:
        return array
    view = array.reshape(array.shape[0] // groups, groups, *array.shape[1:])
    return lax.dynamic_index_in_dim(view, group, 1, keepdims=False)


def add_to_group(
    total: Array, more: Array, group: int | Int[Array, ""], groups: int
) -> Array:
    """Adds (rows / groups, ...) to one group of (rows / groups, groups, ...)."""
    if groups == 1:
        return total + more[:, None]
    old = lax.dynamic_index_in_dim(total, group, 1, keepdims=False)
    return lax.dynamic_update_index_in_dim(total, old + more, group, 1)


def ungrouped(array: Array) -> Array:
    """(rows / groups, groups, ...) -> (rows, ...)."""
    return array.reshape(array.shape[0] * array.shape[1], *array.shape[2:])


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
