"""Every bad argument: one clear message, of the right type, that names it."""

import re
from typing import Any

import jax
import numpy as np
import pytest

import softlib
from tests.host import jnp

masks: Any = softlib.masks  # the arguments are wrong on purpose
pytestmark = pytest.mark.usefixtures("untyped")

SQUARE = np.ones((2, 2), bool)

BAD = [
    (lambda: masks.Window(-1, 0), ValueError, "Window: `left` and `right`", "left=-1"),
    (lambda: masks.Dilated(0), ValueError, "Dilated: `stride`", "got 0"),
    (lambda: masks.Dilated(2.0), TypeError, "Dilated: `stride`", "float"),
    (lambda: masks.Chunked(-3), ValueError, "Chunked: `size`", "got -3"),
    (lambda: masks.Chunked(True), TypeError, "Chunked: `size`", "bool"),
    (lambda: masks.Prefix(-1), ValueError, "Prefix: `length`", "got -1"),
    (lambda: masks.GlobalTokens(-1), ValueError, "GlobalTokens: `start`", "got -1"),
    (
        lambda: masks.GlobalTokens(4, 3),
        ValueError,
        "GlobalTokens: `stop`",
        "start=4, stop=3",
    ),
    (
        lambda: masks.Blocks(np.ones((2, 2)), 4),
        TypeError,
        "Blocks: `array` must be a NumPy array of booleans",
        "float64",
    ),
    (lambda: masks.Blocks(jnp.ones((2, 2), bool), 4), TypeError, "Blocks: `array`", ""),
    (lambda: masks.Blocks([[True]], 4), TypeError, "Blocks: `array`", "list"),
    (lambda: masks.Blocks(SQUARE[0], 4), ValueError, "Blocks: `array`", "(2,)"),
    (lambda: masks.Blocks(SQUARE, 0), ValueError, "Blocks: `block`", "got 0"),
    (lambda: masks.Blocks(SQUARE, (2, 0)), ValueError, "Blocks: `block`", "got 0"),
    (
        lambda: masks.Blocks(SQUARE, (2, 2, 2)),
        ValueError,
        "Blocks: `block`",
        "(2, 2, 2)",
    ),
    (lambda: masks.Radial(0), ValueError, "Radial: `tokens_per_frame`", "got 0"),
    (lambda: masks.Radial(3.5), TypeError, "Radial: `tokens_per_frame`", "float"),
    (lambda: masks.Radial(3, -1), ValueError, "Radial: `sink_frames`", "got -1"),
    (
        lambda: masks.Radial(3, decay=0.5),
        ValueError,
        "Radial: `decay` and",
        "decay=0.5",
    ),
    (
        lambda: masks.Radial(3, min_window=2),
        ValueError,
        "Radial: `decay` and `min_window` must be 1.0 and 0",
        "min_window=2",
    ),
    (lambda: masks.Radial(3, rule="log"), ValueError, "Radial: `rule`", "log"),
    (
        lambda: masks.Radial(3, decay=0.0, rule="pow2"),
        ValueError,
        "Radial: `decay`",
        "got 0.0",
    ),
    (
        lambda: masks.Radial(3, min_window=-1, rule="pow2"),
        ValueError,
        "Radial: `min_window`",
        "got -1",
    ),
    (lambda: masks.Radial(2**30), ValueError, "Radial: `tokens_per_frame`", "2**30"),
    (
        lambda: masks.Radial(3600, decay=1e9, rule="pow2"),
        ValueError,
        "Radial: `decay * tokens_per_frame`",
        "2**30",
    ),
    (
        lambda: masks.radial_pair_count(-1, 4),
        ValueError,
        "radial_pair_count: `frames`",
        "got -1",
    ),
    (
        lambda: masks.radial_block_mask(0, 200),
        ValueError,
        "radial_block_mask: `frames`",
        "got 0",
    ),
    (
        lambda: masks.radial_block_mask(4, 127),
        ValueError,
        "radial_block_mask: `tokens_per_frame` must be at least 128",
        "got 127",
    ),
    (
        lambda: masks.radial_block_mask(4, 200, block=0),
        ValueError,
        "radial_block_mask: `block`",
        "got 0",
    ),
    (
        lambda: masks.radial_block_mask(4, 200, decay=-1.0),
        ValueError,
        "radial_block_mask: `decay`",
        "got -1.0",
    ),
    (
        lambda: masks.radial_block_mask(4, 200, variant="sora"),
        ValueError,
        "radial_block_mask: `variant`",
        "sora",
    ),
    (
        lambda: masks.radial_block_mask(4, 200, text_tokens=-1),
        ValueError,
        "radial_block_mask: `text_tokens`",
        "got -1",
    ),
    (
        lambda: masks.Segments(jnp.zeros(3)).materialize(3),
        TypeError,
        "Segments: `query` must have an integer dtype",
        "float32",
    ),
    (
        lambda: masks.Segments(jnp.zeros(3, int), jnp.zeros(3, bool)).materialize(3),
        TypeError,
        "Segments: `key`",
        "bool",
    ),
    (
        lambda: masks.Segments(jnp.zeros((2, 3, 4), int)).materialize(3),
        ValueError,
        "Mask: an array of the mask must have 1 axes, or 2",
        "(2, 3, 4)",
    ),
    (
        lambda: masks.Segments(jnp.zeros((), int)).materialize(3),
        ValueError,
        "Mask: an array of the mask must have 1 axes, or 2",
        "()",
    ),
    (
        lambda: masks.Padding(2.0).materialize(3),
        TypeError,
        "Padding: `query` must have an integer dtype",
        "float",
    ),
    (
        lambda: masks.Padding(key=jnp.zeros((2, 2), int)).materialize(3),
        ValueError,
        "Mask: an array of the mask must have 0 axes, or 1",
        "(2, 2)",
    ),
    (
        lambda: masks.Segments(jnp.zeros(3, int)).density(3),
        TypeError,
        "density: the mask must hold no arrays",
        "Segments",
    ),
    (
        lambda: masks.block_map(masks.Causal(), (4, 4), (2, 0)),
        ValueError,
        "block_map: `blocks`",
        "(2, 0)",
    ),
    (
        lambda: masks.block_map(masks.Causal(), (-1, 4), (2, 2)),
        ValueError,
        "block_map: `lengths`",
        "(-1, 4)",
    ),
    (
        lambda: masks.Causal().row_count(-2),
        ValueError,
        "row_count: `query_length`",
        "-2",
    ),
    (
        lambda: masks.Causal().materialize(2, -2),
        ValueError,
        "materialize: `key_length`",
        "-2",
    ),
]


@pytest.mark.parametrize(("call", "error", "message", "got"), BAD)
def test_bad_argument(call, error, message, got):
    with pytest.raises(error, match=re.escape(message)) as caught:
        call()
    assert got in str(caught.value)


def test_a_mask_may_hold_anything_while_it_is_transformed():
    """Transformations put objects, tangents and axes in the place of arrays."""
    mask = masks.Causal() & masks.Segments(jnp.zeros((2, 3), int)) & masks.Padding(4)
    assert jax.tree.map(lambda _: object(), mask) is not None
    stacked = jax.tree.map(lambda x: jnp.stack([jnp.asarray(x)] * 3), mask)
    assert jax.tree.leaves(stacked)[0].shape == (3, 2, 3)
    axes = jax.tree.map(lambda _: 0, mask)
    found = jax.vmap(lambda m: m.materialize(3), in_axes=(axes,))(stacked)
    np.testing.assert_array_equal(found[1], mask.materialize(3))
    _, pullback = jax.vjp(lambda m, x: jnp.where(m.materialize(3), x, 0.0), mask, 1.0)
    of_mask, of_number = pullback(jnp.ones((2, 3, 3)))
    assert of_number == mask.materialize(3).sum()
    assert all(leaf.dtype == jax.dtypes.float0 for leaf in jax.tree.leaves(of_mask))
