"""Slices of classes of an array, and writing them, in the loops over classes.

XLA for the newest TPUs (7x) prefers bfloat16 in tiles of 16 rows, while arrays come and
go in tiles of 8. Sliced in a loop, a whole weight would be copied before it and its
gradient behind it: for 16384 rows, 4096 features and 151936 classes a training step
would take 4.6 GiB. An array (n, m) seen as (n / 8, 8, m) is the same memory, has only
tiles of 8, and is not copied: 666 MiB. On other TPUs and on GPUs nothing changes.
"""

from jax import lax
from jaxtyping import Array

from softlib._symbolic import is_symbolic

from . import chunks as _chunks
from .chunks import Index
from .tile import Options

_ROWS = 8


def slice_of(
    options: Options, array: Array, start: Index, size: int, axis: int
) -> Array:
    """The classes `start, start + 1, ..., start + size - 1`.

    The start has to be a multiple of 8 if `size` and the number of all classes are, as
    is every start of `chunks.fold`.
    """
    if not _in_tiles(options, array, size, axis):
        return _chunks.slice_of(array, start, size, axis)
    place = (_tile_of(start), size // _ROWS, 0) if axis == 0 else (start, size, 2)
    found = _chunks.slice_of(_tiles(array), *place)
    rows = size if axis == 0 else array.shape[0]
    return found.reshape(rows, found.shape[2])


def with_slice(
    options: Options, array: Array, values: Array, start: Index, axis: int
) -> Array:
    """The array with the values of these classes; `start` as for `slice_of`."""
    if not _in_tiles(options, array, values.shape[axis], axis):
        return _chunks.with_slice(array, values, start, axis)
    place = (_tile_of(start), 0) if axis == 0 else (start, 2)
    return _chunks.with_slice(_tiles(array), _tiles(values), *place).reshape(
        array.shape
    )


def _in_tiles(options: Options, array: Array, size: int, axis: int) -> bool:
    if options.accelerator is None or array.ndim != 2:
        return False
    rows = array.shape[0]
    if is_symbolic(rows):
        return False
    return rows % _ROWS == 0 and (axis == 1 or size % _ROWS == 0)


def _tiles(array: Array) -> Array:
    return array.reshape(array.shape[0] // _ROWS, _ROWS, array.shape[1])


def _tile_of(start: Index) -> Index:
    if isinstance(start, int):
        return start // _ROWS
    return lax.div(start, lax.full_like(start, _ROWS))
