"""The matrix products of a linear cross-entropy and nothing else: a bound on its time.

A stream over the vocabulary computes the logits twice and each gradient once, four
products of N x D x V; a form that computes the gradients in its forward pass needs
three. These loops do only that, one slice of classes at a time and every product in the
orientation that XLA's CPU backend runs fastest: the left operand as it lies in memory.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .cases import Case

CHUNK = 1024


def products(case: Case, passes: int) -> Callable[..., Any]:
    """`(hidden, weight, labels) -> (tile, dhidden, dweight)` with 3 or 4 products."""
    assert passes in (3, 4)
    size = math.gcd(case.vocabulary, CHUNK)
    forward, backward = (_table, _kernel)[case.vocab_axis](case, size)

    def program(hidden, weight, labels):
        del labels
        turned = lax.optimization_barrier(hidden.T)
        steps = case.vocabulary // size
        tile = forward(hidden, turned, weight, 0)
        if passes == 4:
            # Each tile replaces the last: no step can be left out, and nothing but the
            # product is done with it.
            again = lambda i, _: forward(hidden, turned, weight, i * size)
            tile = lax.fori_loop(0, steps, again, tile)

        def step(i, sums):
            z = forward(hidden, turned, weight, i * size)
            return backward(hidden, turned, weight, i * size, z, *sums)

        dhidden = jnp.zeros_like(turned if case.vocab_axis == 0 else hidden)
        dhidden, dweight = lax.fori_loop(
            0, steps, step, (dhidden, jnp.zeros_like(weight))
        )
        return tile, dhidden.T if case.vocab_axis == 0 else dhidden, dweight

    return program


def _table(case: Case, size: int):
    """Weight (V, D): tiles lie as (classes, rows)."""

    def forward(hidden, turned, weight, start):
        return _cut(weight, start, size, 0) @ turned

    def backward(hidden, turned, weight, start, z, dturned, dweight):
        columns = lax.optimization_barrier(_cut(weight, start, size, 0).T)
        dweight = lax.dynamic_update_slice_in_dim(dweight, z @ hidden, start, 0)
        return dturned + columns @ z, dweight

    return forward, backward


def _kernel(case: Case, size: int):
    """Weight (D, V): tiles lie as (rows, classes)."""

    def forward(hidden, turned, weight, start):
        return hidden @ _cut(weight, start, size, 1)

    def backward(hidden, turned, weight, start, z, dhidden, dweight):
        dweight = lax.dynamic_update_slice_in_dim(dweight, turned @ z, start, 1)
        return dhidden + z @ _cut(weight, start, size, 1).T, dweight

    return forward, backward


def _cut(weight: jax.Array, start: jax.Array | int, size: int, axis: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(weight, start, size, axis)
