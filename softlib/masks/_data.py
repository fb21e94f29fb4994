"""Masks that hold data: segment ids and lengths are arrays, traced under jit."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from softlib._ids import equal_ids, signed

from ._blocks import Block
from ._mask import Mask
from ._protocol import array_field


class Segments(Mask):
    """Pairs of equal segment id: sequences packed into one row do not see each other.

    `query_segments[query] == key_segments[key]`. Ids are any integers. A position
    without an id, negative or past the end of the ids, attends to nothing and is
    attended by nothing.

    Args:
        query: Integer ids, shape `(T,)` or `(B, T)`; traced.
        key: Integer ids, shape `(S,)` or `(B, S)`; None for the ids of the queries.

    Raises:
        TypeError: The ids are not integers; raised where the mask is used.
        ValueError: The ids have another rank; raised where the mask is used.

    Cost: the ids are looked up per position, not per pair. Every block is `SOME`, as
        the ids are data.

    Example:
        >>> mask = softlib.masks.Segments(jnp.array([0, 0, 1]))
        >>> print(mask.materialize(3).astype(int))
        [[1 1 0]
         [1 1 0]
         [0 0 1]]
    """

    # Any: transformations rebuild a mask with tracers, specs or None for its arrays.
    query: Any = array_field(axes=1)
    key: Any = array_field(axes=1, default=None)

    def attends(self, query_index, key_index):
        key = self.query if self.key is None else self.key
        _require_integers("Segments", query=self.query, key=key)
        query_ids, query_known = _take(self.query, query_index)
        key_ids, key_known = _take(key, key_index)
        return equal_ids(query_ids, key_ids) & query_known & key_known


class Padding(Mask):
    """Pairs of real positions: `query < query_length` and `key < key_length`.

    Use it for sequences padded to a common length. The rows of padded queries are
    empty, so that attention gives them output 0 and gradient 0.

    Args:
        query: Number of real queries, integers, shape `()` or `(B,)`; traced. None for
            no limit.
        key: Number of real keys, with the same shapes and meaning of None.

    Raises:
        TypeError: A length is not an integer; raised where the mask is used.
        ValueError: A length has another rank; raised where the mask is used.

    Cost: a comparison per position. Every block is `SOME`, as the lengths are data.

    Example:
        >>> mask = softlib.masks.Padding(key=jnp.array([2, 1]))
        >>> print(mask.row_count(1, 3))
        [[2]
         [1]]
    """

    query: Any = array_field(axes=0, default=None)
    key: Any = array_field(axes=0, default=None)

    def attends(self, query_index, key_index):
        _require_integers("Padding", query=self.query, key=self.key)
        real_query, real_key = query_index == query_index, key_index == key_index
        if self.query is not None:
            real_query = query_index < _length(self.query)
        if self.key is not None:
            real_key = key_index < _length(self.key)
        return real_query & real_key

    def block_status(self, query_start, query_stop, key_start, key_stop):
        kind = Block.ALL if self.query is None and self.key is None else Block.SOME
        return np.asarray(kind)


def _take(ids: Any, index: Any) -> tuple[Any, Any]:
    """The id of each position, and whether it has one."""
    known = (index >= 0) & (index < ids.shape[0])
    if isinstance(ids, np.ndarray) and isinstance(index, np.ndarray):
        return ids[np.where(known, index, 0)], known
    # The id read at a position without one is arbitrary; `known` is False there.
    return jnp.asarray(ids).at[index].get(mode="clip"), known


def _length(given: Any) -> Any:
    """The length, signed: positions compared with an unsigned one would wrap."""
    return given if np.isscalar(given) else signed(given)


def _require_integers(mask: str, **arrays: Any) -> None:
    for name, array in arrays.items():
        if array is None:
            continue
        dtype = jnp.result_type(array) if np.isscalar(array) else array.dtype
        if not jnp.issubdtype(dtype, jnp.integer):
            raise TypeError(
                f"{mask}: `{name}` must have an integer dtype, got {dtype}."
            )
