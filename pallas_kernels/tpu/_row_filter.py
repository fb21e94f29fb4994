"""The gradient filter: skips blocks of probabilities that already match the labels.

A block is 128 rows x 128 classes, however large the tiles are.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ._row_math import LANES, Cotangents
from ._row_products import cut, span
from ._row_tiles import Tiles

FILTER_BLOCK = 128


def note_distance(refs: dict[str, Any], at: Any, found: Cotangents) -> None:
    """Stores each row's largest distance per block of classes, one lane each."""
    if found.distance is None:
        return
    table = jnp.full((found.distance.shape[0], LANES), -1.0, jnp.float32)
    lane = lax.broadcasted_iota(jnp.int32, table.shape, 1)
    for block in range(found.distance.shape[1] // FILTER_BLOCK):
        of_block = found.distance[:, block * FILTER_BLOCK : (block + 1) * FILTER_BLOCK]
        table = jnp.where(lane == block, of_block.max(1, keepdims=True), table)
    refs["distance"][at, :] = table


def drop_negligible(refs: dict[str, Any], tiles: Tiles, eps: float) -> None:
    """Zeroes the cotangents of negligible blocks, and notes whether others are left."""
    lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    most = jnp.full((1, LANES), -1.0, jnp.float32)

    def rows(at: Any, size: int, most: Any) -> Any:
        top = refs["distance"][at, :].max(0, keepdims=True)  # (1, lanes)

        def block(j: Any, _: None) -> None:
            columns = span(0, j * FILTER_BLOCK, FILTER_BLOCK)
            keeps = jnp.max(jnp.where(lane == j, top, -1.0)) >= eps

            @pl.when(~keeps)
            def _():
                for part in range(refs["draw"].shape[0]):
                    zeros = jnp.zeros((size, FILTER_BLOCK), refs["draw"].dtype)
                    refs["draw"][part, at, columns] = zeros

        lax.fori_loop(0, tiles.classes // FILTER_BLOCK, block, None)
        return jnp.maximum(most, top)

    for start, size, count in cut(tiles.rows, FILTER_BLOCK):
        visit = lambda i, most, start=start, size=size: rows(
            span(start, i * size, size), size, most
        )
        most = lax.fori_loop(0, count, visit, most)
    refs["kept"][0] = (jnp.max(most) >= eps).astype(jnp.int32)
