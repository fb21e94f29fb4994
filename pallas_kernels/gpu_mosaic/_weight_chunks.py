"""Chunks of the classes of a weight, in the dtype that the matrix units read.

The products of Hopper read 16-bit operands. A float32 weight is rounded to them by XLA,
a chunk of classes at a time, before a kernel visits the chunk: one pass over the weight
besides the kernels, and a copy of a chunk. (Rounded inside a kernel, the weight would
be read in float32 and converted again for each of its tiles of rows.) A weight of 16
bits is read in place.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ._row_tiles import SPAN


class Chunk(NamedTuple):
    """Some classes of a weight.

    Attributes:
        weight: The given weight, or 16-bit copies of some of its classes.
        index: (2,) int32 in units of 64 classes: the first class of the chunk, and
            where it lies in `weight`. Classes beyond the last one lie beyond the end.
    """

    weight: jax.Array
    index: jax.Array


def chunk_of(
    weight: jax.Array, dtype: Any, i: Any, classes: int, vocab_axis: int
) -> Chunk:
    """Chunk `i` of `classes`, a multiple of 64; `dtype` is that of the products."""
    first = jnp.asarray(i, jnp.int32) * (classes // SPAN)
    if weight.dtype == dtype:
        return Chunk(weight, jnp.stack([first, first]))
    vocabulary = weight.shape[vocab_axis]
    # The last copy ends with the last class and begins at a multiple of 64.
    length = min(classes + vocabulary % SPAN, vocabulary)
    start = jnp.minimum(first, (vocabulary - length) // SPAN)
    part = lax.dynamic_slice_in_dim(weight, start * SPAN, length, vocab_axis)
    return Chunk(part.astype(dtype), jnp.stack([first, first - start]))


# Products, so that the compiler sees that they are multiples.
def first_class(index_ref: Any) -> Any:
    """The first class of a chunk."""
    return index_ref[0] * SPAN


def place_of_first(index_ref: Any) -> Any:
    """The place of the first class in the array of the chunk."""
    return index_ref[1] * SPAN
