"""A loop over chunks of time that keeps one state per chunk for the backward pass."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

# (state or None, chunk of the sequence) -> (state, outputs of the chunk)
type Step = Callable[[Any, Any], tuple[Any, Any]]


def fold(
    step: Step,
    state: Any,
    sequence: Any,
    *,
    axis: int,
    size: int,
    before: Callable[[Any], Any] = lambda chunk: chunk,
    after: Callable[[Array], Array] = lambda output: output,
) -> tuple[Any, Any]:
    """Runs `step` over chunks of `size` steps; the first chunk is the short one.

    All leaves of `sequence` and of the outputs have their time on `axis` (not
    negative). The first chunk runs outside the loop: it may be short, so that nothing
    is padded, and it may start from no state, so that the state which the loop carries
    has the sharding of what it is made from.

    `before` changes the layout of a chunk for `step`, and `after` that of each of its
    outputs back, outside of the loop: for all chunks at once.
    """
    length = jax.tree.leaves(sequence)[0].shape[axis]
    count = max(-(-length // size), 1)  # an empty sequence is one empty chunk
    first = length - (count - 1) * size
    part = lambda start, stop: jax.tree.map(
        lambda a: lax.slice_in_dim(a, start, stop, axis=axis), sequence
    )
    # Rematerialised: what a step needs for its gradient is as large as its scores.
    state, outputs = jax.checkpoint(step)(state, before(part(0, first)))
    outputs = jax.tree.map(after, outputs)
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
    rest = jax.vmap(before)(jax.tree.map(cut, part(first, length)))
    state, chunks = lax.scan(body, state, rest)
    chunks = jax.tree.map(jax.vmap(after), chunks)
    return state, jax.tree.map(join, outputs, chunks)


def fold_steps(
    step: Step, state: Any, sequence: Any, *, axis: int, size: int
) -> tuple[Any, Any]:
    """As `fold`, with a `step` of one step of time, which has no axis of time.

    The backward pass of a chunk keeps its states and recomputes the rest: on a CPU
    arithmetic is cheaper than memory.
    """
    body = jax.checkpoint(step, prevent_cse=False)

    def chunk(state, part):
        front = jax.tree.map(lambda a: jnp.moveaxis(a, axis, 0), part)
        # The first one is apart for the same reasons as the first chunk.
        state, first = step(state, jax.tree.map(lambda a: a[0], front))
        outputs = jax.tree.map(lambda a: a[None], first)
        if jax.tree.leaves(front)[0].shape[0] > 1:
            rest = jax.tree.map(lambda a: a[1:], front)
            state, later = lax.scan(body, state, rest)
            outputs = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), outputs, later)
        return state, jax.tree.map(lambda a: jnp.moveaxis(a, 0, axis), outputs)

    return fold(chunk, state, sequence, axis=axis, size=size)


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
