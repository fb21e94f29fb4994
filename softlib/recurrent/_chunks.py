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
    """Scans `step` over chunks of `size` steps; the first chunk may be shorter.

    All leaves of `sequence` and of the outputs have time on `axis` (not negative). The
    first chunk runs outside the loop: so nothing is padded, and without an initial
    state the carry gets the sharding of the inputs.

    `before` changes the layout of a chunk for `step`, and `after` that of each output
    back, outside the loop: for all chunks at once.
    """
    length = jax.tree.leaves(sequence)[0].shape[axis]
    count = max(-(-length // size), 1)  # an empty sequence is one empty chunk
    first = length - (count - 1) * size
    between = lambda start, stop: jax.tree.map(
        lambda a: lax.slice_in_dim(a, start, stop, axis=axis), sequence
    )
    # Rematerialised: the residuals of a step are as large as its scores.
    state, outputs = jax.checkpoint(step)(state, before(between(0, first)))
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

    # In a loop there is nothing to merge across iterations.
    body = jax.checkpoint(step, prevent_cse=False)
    rest = jax.vmap(before)(jax.tree.map(cut, between(first, length)))
    state, chunks = lax.scan(body, state, rest)
    chunks = jax.tree.map(jax.vmap(after), chunks)
    return state, jax.tree.map(join, outputs, chunks)


def fold_steps(
    step: Step, state: Any, sequence: Any, *, axis: int, size: int
) -> tuple[Any, Any]:
    """`fold` with a `step` of a single time step, without a time axis.

    The backward pass keeps the states of one chunk and recomputes the rest: on a CPU
    arithmetic is cheaper than memory.
    """
    body = jax.checkpoint(step, prevent_cse=False)

    def chunk(state, inputs):
        front = jax.tree.map(lambda a: jnp.moveaxis(a, axis, 0), inputs)
        # The first step is outside the loop for the same reasons as the first chunk.
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
