"""A loop over chunks of time that keeps one state per chunk for the backward pass."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# (state or None, chunk of the sequence) -> (state, outputs of the chunk)
type Step = Callable[[Any, Any], tuple[Any, Any]]


def fold(
    step: Step, state: Any, sequence: Any, *, axis: int, size: int
) -> tuple[Any, Any]:
    """Runs `step` over chunks of `size` steps; the first chunk is the short one.

    All leaves of `sequence` and of the outputs have their time on `axis` (not
    negative). The first chunk runs outside the loop: it may be short, so that nothing
    is padded, and it may start from no state, so that the state which the loop carries
    has the sharding of what it is made from.
    """
    length = jax.tree.leaves(sequence)[0].shape[axis]
    count = max(-(-length // size), 1)  # an empty sequence is one empty chunk
    first = length - (count - 1) * size
    part = lambda start, stop: jax.tree.map(
        lambda a: lax.slice_in_dim(a, start, stop, axis=axis), sequence
    )
    # Rematerialised: what a step needs for its gradient is as large as its scores.
    state, outputs = jax.checkpoint(step)(state, part(0, first))
    if count == 1:
        return state, outputs

    def cut(a):
        shape = (*a.shape[:axis], count - 1, size, *a.shape[axis + 1 :])
        return jnp.moveaxis(a.reshape(shape), axis, 0)

    def join(head, chunks):
        chunks = jnp.moveaxis(chunks, 0, axis)
        shape = (*head.shape[:axis], length - first, *head.shape[axis + 1 :])
        return jnp.concatenate([head, chunks.reshape(shape)], axis=axis)

    # A loop keeps its iterations apart, so that nothing can be merged across them.
    body = jax.checkpoint(step, prevent_cse=False)
    rest = jax.tree.map(cut, part(first, length))
    state, chunks = lax.scan(body, state, rest)
    return state, jax.tree.map(join, outputs, chunks)


def require_chunk_size(function: str, chunk_size: object) -> None:
    if chunk_size is None:
        return
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int):
        raise TypeError(
            f"{function}: `chunk_size` must be None or a Python int (it is static), "
            f"got {type(chunk_size).__name__}."
        )
    if chunk_size < 1:
        raise ValueError(
            f"{function}: `chunk_size` must be at least 1, got {chunk_size}."
        )
