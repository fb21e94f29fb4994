"""Masks inside kernels: they run, they lower for TPUs, and they take few operations."""

import functools
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental import pallas as pl

from softlib import masks
from tests.host import jnp


def operations_per_pair(mask, query, key) -> list[str]:
    """Primitives whose result has an entry per pair, inside calls too."""
    pairs = jnp.broadcast_shapes(query.shape, key.shape)
    found: list[str] = []

    def visit(jaxpr: Any):
        for equation in jaxpr.eqns:
            inner = [p for p in equation.params.values() if hasattr(p, "jaxpr")]
            for called in inner:
                visit(called.jaxpr)
            if not inner and equation.outvars[0].aval.shape == pairs:
                found.append(str(equation.primitive))

    visit(jax.make_jaxpr(mask.attends)(query, key).jaxpr)
    return found


SHAPES = [jax.ShapeDtypeStruct(s, jnp.int32) for s in ((128, 1), (1, 128))]
LENGTH = 30 * 3600


@pytest.mark.parametrize(
    ("mask", "count"),
    [
        (masks.Causal(), 1),
        (masks.Window(3, None), 1),
        (masks.Window(3, 4), 3),
        (masks.Dilated(3), 1),
        (masks.Chunked(5), 1),
        (masks.Prefix(3), 1),
        (masks.GlobalTokens(3, 9), 1),
        (masks.Padding(3, 4), 1),
        (masks.Segments(jnp.zeros(9, int)), 3),
        (masks.Radial(3600)._within(LENGTH, LENGTH), 9),
        (masks.Radial(4096), 14),
        (masks.Radial(3600, rule="pow2", min_window=128), 16),
        (
            masks.Radial(3600, rule="pow2", min_window=128)._within(LENGTH, LENGTH),
            12,
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_operations_per_pair_are_those_of_the_documented_table(mask, count):
    found = operations_per_pair(mask, *SHAPES)
    assert len(found) == count
    assert not {"div", "rem", "gather"} & set(found)


def test_mask_within_a_length_is_cheaper_and_equal():
    """Fewer operations per pair, none of them a division."""
    mask = masks.Radial(3600)
    within = mask._within(230_400, 230_400)
    query = jnp.arange(0, 230_400, 577)[:, None]
    key = jnp.arange(0, 230_400, 371)[None, :]
    np.testing.assert_array_equal(mask(query, key), within(query, key))
    assert {"div", "rem"} <= set(operations_per_pair(mask, *SHAPES))
    assert not {"div", "rem"} & set(operations_per_pair(within, *SHAPES))
    # Frames are dropped from a distance of 4096 on.
    assert mask._within(4096 * 3600, 1) != mask
    assert mask._within(4097 * 3600, 1) == mask


KERNEL_MASKS = [
    masks.Radial(3600),
    masks.Radial(3600)._within(512, 512),
    masks.Radial(9),
    masks.Radial(16),
    masks.Radial(40, rule="pow2", min_window=8),
    masks.Radial(40, rule="pow2", min_window=7),
    masks.Dilated(3) | masks.Chunked(5),
    masks.GlobalTokens(4, 9) | ~masks.Prefix(3).shift(2),
]


def in_kernel(mask, interpret):
    tile = 128

    def kernel(out):
        query = pl.program_id(0) * tile + jax.lax.broadcasted_iota(
            jnp.int32, (tile, 1), 0
        )
        key = pl.program_id(1) * tile + jax.lax.broadcasted_iota(
            jnp.int32, (1, tile), 1
        )
        out[...] = jnp.where(mask(query, key), 1.0, 0.0)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((2 * tile, 2 * tile), jnp.float32),
        grid=(2, 2),
        out_specs=pl.BlockSpec((tile, tile), lambda i, j: (i, j)),
        interpret=interpret,
    )()


@pytest.mark.parametrize("mask", KERNEL_MASKS, ids=str)
def test_mask_inside_a_kernel(mask):
    assert mask._is_arithmetic()
    found = jax.jit(functools.partial(in_kernel, mask, True))()
    np.testing.assert_array_equal(found != 0, mask.materialize(256))
    # Lowering needs no device. A mask is arithmetic that a kernel for TPUs can do.
    compiled = jax.jit(functools.partial(in_kernel, mask, False))
    assert (
        "tpu_custom_call"
        in jax.export.export(compiled, platforms=["tpu"])().mlir_module()
    )
