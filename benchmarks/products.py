"""The matrix products of a linear cross-entropy and nothing else: a bound on its time.

A stream over the vocabulary computes the logits twice and each gradient once, four
products of N x D x V; a form that computes the gradients in its forward pass needs
three. These loops do only that, one slice of classes at a time and every product in the
orientation that XLA's CPU backend runs fastest: the left operand as it lies in memory.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .cases import Case

CHUNK = 1024


def products(case: Case, passes: int) -> Callable[..., Any]:
    """`(hidden, weight, labels) -> (tiles, dhidden, dweight)` with 3 or 4 products."""
    assert passes in (3, 4)
    forward, backward = (_TABLE, _KERNEL)[case.vocab_axis]

    def program(hidden, weight, labels):
        del labels
        turned = lax.optimization_barrier(hidden.T)
        fixed = hidden, turned, weight
        tiles = {}
        if passes == 4:
            # Each tile replaces the last of its size: no step can be left out, and
            # nothing but the product is done with it.
            again = lambda start, size, tiles: (
                tiles | {size: forward(*fixed, start, size)}
            )
            sizes = {min(CHUNK, case.vocabulary), case.vocabulary % CHUNK} - {0}
            tiles = {size: forward(*fixed, 0, size) for size in sizes}
            tiles = _in_slices(again, tiles, case.vocabulary)

        def step(start, size, sums):
            z = forward(*fixed, start, size)
            return backward(*fixed, start, z, *sums)

        dhidden = jnp.zeros_like(turned if case.vocab_axis == 0 else hidden)
        dhidden, dweight = _in_slices(
            step, (dhidden, jnp.zeros_like(weight)), case.vocabulary
        )
        return tiles, dhidden.T if case.vocab_axis == 0 else dhidden, dweight

    return program


def _in_slices(step: Callable[..., Any], carry: Any, vocabulary: int) -> Any:
    """Runs `step(start, size, carry)`, the short rest last."""
    size = min(CHUNK, vocabulary)
    whole, rest = divmod(vocabulary, size)
    carry = lax.fori_loop(0, whole, lambda i, c: step(i * size, size, c), carry)
    return step(vocabulary - rest, rest, carry) if rest else carry


def _table_forward(hidden, turned, weight, start, size):
    """Weight (V, D): tiles lie as (classes, rows)."""
    return _cut(weight, start, size, 0) @ turned


def _table_backward(hidden, turned, weight, start, z, dturned, dweight):
    columns = lax.optimization_barrier(_cut(weight, start, z.shape[0], 0).T)
    dweight = lax.dynamic_update_slice_in_dim(dweight, z @ hidden, start, 0)
    return dturned + columns @ z, dweight


def _kernel_forward(hidden, turned, weight, start, size):
    """Weight (D, V): tiles lie as (rows, classes)."""
    return hidden @ _cut(weight, start, size, 1)


def _kernel_backward(hidden, turned, weight, start, z, dhidden, dweight):
    dweight = lax.dynamic_update_slice_in_dim(dweight, turned @ z, start, 1)
    return dhidden + z @ _cut(weight, start, z.shape[1], 1).T, dweight


_TABLE = _table_forward, _table_backward
_KERNEL = _kernel_forward, _kernel_backward


def _cut(weight: jax.Array, start: jax.Array | int, size: int, axis: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(weight, start, size, axis)
