"""Sizes of tiles that the cost models choose from, compiled one by one."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp

from pallas_kernels._devices import V5E, V6E
from pallas_kernels.tpu import _row_tiles, row_statistics

from .case import Case, array
from .cases_row_statistics import GEMMA

FAMILY = "sizes of tiles"
OPTIONS = row_statistics.Options(statistics=("lse", "label_logits"))


def cases() -> list[Case]:
    return [
        _row_case(kind, rows, classes)
        for kind in ("forward", "hidden", "weight")
        for rows in (256, 512, 1024)
        for classes in (256, 512, 1024)
    ]


def _row_case(kind: _row_tiles.Pass, rows: int, classes: int) -> Case:
    """Row statistics at the head of Gemma 2, with all features in one part."""
    count, features, vocabulary = GEMMA
    shapes = _row_tiles.Shapes(count, features, vocabulary, 2, 2, labels=True)
    tiles = _row_tiles.tiles(kind, shapes, rows, classes, features)
    seconds = [_row_tiles.seconds(kind, shapes, tiles, d) * 1e3 for d in (V5E, V6E)]
    sizes = f"{rows} x {classes}, model {seconds[0]:.0f} / {seconds[1]:.0f} ms"
    arrays = (
        array(jnp.bfloat16, count, features),
        array(jnp.bfloat16, vocabulary, features),
        array(jnp.int32, count, 1),
        array(jnp.float32, count),
    )
    # All of what the compiler allows: a size that does not fit has to fail here.
    whole = int(V5E.vmem_bytes * _row_tiles.SHARE)
    tiles = dataclasses.replace(tiles, vmem_bytes=whole)
    program = functools.partial(row_program, kind, tiles)
    name = f"row statistics, {kind}, {sizes}"
    return Case(FAMILY, name, program, arrays, ("v5e", "v6e"), ours=False, sizes=sizes)


def row_program(
    kind: _row_tiles.Pass,
    tiles: _row_tiles.Tiles,
    hidden: Any,
    weight: Any,
    labels: Any,
    numbers: Any,
) -> Any:
    """Runs one pass with these tiles; `numbers` stand for what a row has known.

    Args:
        kind: The pass.
        tiles: Static.
        hidden: (N, D).
        weight: (V, D).
        labels: (N, 1) int32.
        numbers: (N,) float32, for the log-sums and all cotangents.
    """
    operands = row_statistics.Operands(hidden, weight, labels, {}, {})
    if kind == "forward":
        return row_statistics.forward(OPTIONS, operands, tiles=tiles)
    gradient = {
        "hidden": row_statistics.gradient_of_hidden,
        "weight": row_statistics.gradient_of_weight,
    }[kind]
    known = {"lse": numbers, "g_lse": numbers}
    return gradient(OPTIONS, operands, known, numbers[:, None], tiles=tiles)
