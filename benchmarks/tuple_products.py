"""The bare loops that tuple attention is measured against: its products and exp.

A loop visits the tiles of a plan with three axes and does nothing but the matrix
products of the two passes, with or without one exponential per score and pass. The rows
of a tile are the queries times some keys; here they come from a pool that is made
beforehand, two of them, so that no step can be hoisted out of the loop.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from softlib.attention import BlockPlan

type Array = jax.Array

POOL = 2


def forward(
    plan: BlockPlan, *, exponential: bool, query: Array, key: Array, value: Array
) -> Array:
    """Scores and weighted values of every tile, added up: 2 products a tile."""
    rows, keys, values = _tiles(plan, query, key, value)
    index = jnp.asarray(plan.whole)

    def step(i: Any, total: Array) -> Array:
        tile = rows[index[1, i] % POOL]
        scores = tile @ keys[index[2, i]].T
        if exponential:
            scores = jnp.exp(scores)
        return total.at[index[0, i]].add(scores @ values[index[2, i]])

    total = jnp.zeros((plan.grid[0], rows.shape[1], value.shape[-1]))
    return lax.fori_loop(0, index.shape[1], step, total)


def backward(
    plan: BlockPlan, *, exponential: bool, query: Array, key: Array, value: Array
) -> Any:
    """Scores, answers, and the four products back: 6 a tile."""
    rows, keys, values = _tiles(plan, query, key, value)
    rows_first = rows.swapaxes(1, 2)
    index = jnp.asarray(plan.whole)

    def step(i: Any, total: Any) -> Any:
        row, outer, column = (index[axis, i] for axis in range(3))
        tile, tile_first = rows[outer % POOL], rows_first[outer % POOL]
        scores = tile @ keys[column].T
        if exponential:
            scores = jnp.exp(scores)
        answers = tile @ values[column].T
        to_rows, to_outer, to_keys, to_values = total
        return (
            to_rows.at[row].add(answers @ keys[column]),
            to_outer.at[row].add(scores @ values[column]),
            to_keys.at[column].add(tile_first @ answers),
            to_values.at[column].add(tile_first @ scores),
        )

    like_rows = jnp.zeros((plan.grid[0], *rows.shape[1:]))
    like_keys = jnp.zeros(keys.swapaxes(1, 2).shape)
    total = (like_rows, like_rows, like_keys, like_keys)
    return lax.fori_loop(0, index.shape[1], step, total)


def _tiles(
    plan: BlockPlan, query: Array, key: Array, value: Array
) -> tuple[Array, Array, Array]:
    """A pool of rows, and blocks of the last keys and values; lengths are whole."""
    block_query, block_outer, block_key = plan.blocks
    size, features = block_query * block_outer, query.shape[-1]
    pool = jnp.resize(query, (POOL, size, features)) / features
    cut = lambda x: x.reshape(plan.grid[2], block_key, features)
    return pool, cut(key), cut(value)
