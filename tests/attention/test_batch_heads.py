"""Heads and batch entries a few at a time give what they give together."""

from typing import Any

import jax
import numpy as np
import pytest

from softlib import masks
from softlib.attention import block_plan, dot_product_attention
from softlib.attention._engine import batch_heads as _batch_heads
from softlib.attention._engine.tiles import Operands
from tests.host import jnp

BATCH, QUERIES, KEYS, HEADS, KEY_HEADS = 4, 12, 20, 8, 4
BLOCKS: Any = {"block_query": 8, "block_key": 8}
# Scores of one key head and its two query heads, in one pair of blocks.
BATCH_HEAD = 2 * 8 * 8


def draw(*shape, seed=0):
    random = np.random.default_rng(seed)
    return jnp.asarray(random.normal(size=shape), jnp.float32)


def test_masks_that_hold_arrays_are_cut_with_their_batch(monkeypatch):
    mask = masks.Segments(jnp.arange(BATCH * 32).reshape(BATCH, 32) // 5)
    arrays = (
        draw(BATCH, QUERIES, HEADS, 4, seed=1),
        draw(BATCH, KEYS, KEY_HEADS, 4, seed=2),
        draw(BATCH, KEYS, KEY_HEADS, 3, seed=3),
    )
    weights = draw(BATCH, QUERIES, HEADS, 3, seed=4)

    def total(arrays, at_once):
        monkeypatch.setattr(_batch_heads, "SCORES", at_once * BATCH_HEAD)
        out, lse = dot_product_attention(*arrays, mask=mask, return_lse=True, **BLOCKS)
        lse = jnp.where(lse == -jnp.inf, 0, lse)
        return (out * weights).sum() + (lse * weights[..., 0]).sum(), out

    def call(arrays, at_once):
        jax.clear_caches()  # a trace does not know how many a step took
        both = jax.value_and_grad(total, has_aux=True)
        return jax.jit(both, static_argnums=1)(arrays, at_once)

    together = call(arrays, BATCH * KEY_HEADS)
    for at_once in (2, 8):  # half the heads of an entry, two entries
        close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
        jax.tree.map(close, call(arrays, at_once), together)


@pytest.mark.parametrize(
    ("batch", "heads", "at_once", "expected"),
    [
        (4, 4, 100, (4, 4)),
        (4, 4, 8, (2, 4)),
        (4, 4, 7, (1, 4)),
        (4, 6, 5, (1, 3)),
        (3, 5, 4, (1, 1)),
        (5, 1, 4, (1, 1)),
        (2, 2, 0, (1, 1)),
    ],
)
def test_steps_are_whole_entries_or_heads_of_one(
    batch, heads, at_once, expected, monkeypatch
):
    monkeypatch.setattr(_batch_heads, "SCORES", at_once * BATCH_HEAD)
    shape = lambda length, heads: jax.ShapeDtypeStruct((batch, length, heads, 4), "f4")
    plan = block_plan(None, QUERIES, KEYS, **BLOCKS)
    query: Any = shape(QUERIES, 2 * heads)
    key: Any = shape(KEYS, heads)
    cut = _batch_heads.Cut.of(Operands(query, key, None, plan))
    assert (cut.batch_step, cut.head_step) == expected
    assert cut.steps == batch * heads // np.prod(expected)


@pytest.mark.parametrize(
    ("number", "most", "of", "expected"),
    [
        (12, 5, 1, 4),
        (12, 6, 1, 6),
        (12, 99, 1, 12),
        (12, 7, 2, 6),
        (12, 7, 4, 4),
        (12, 2, 3, 3),  # at least that
        (24, 23, 4, 12),
        (7, 6, 1, 1),
        (7, 0, 1, 1),
    ],
)
def test_heads_and_entries_are_cut_evenly(number, most, of, expected):
    assert _batch_heads._divisor(number, most, of) == expected


def test_the_gradient_of_what_steps_share_is_rounded_once(monkeypatch):
    """Of a bias of all batch entries, which are added up one after the other."""
    monkeypatch.setattr(_batch_heads, "SCORES", 1)
    query, key, value, weights = (draw(32, 4, 1, 3, seed=i) for i in range(4))
    bias = draw(1, 1, 4, 4, seed=4).astype(jnp.bfloat16)

    @jax.jit
    def slope(bias):
        attend = lambda bias: dot_product_attention(query, key, value, bias=bias)
        return jax.grad(lambda bias: (attend(bias) * weights).sum())(bias)

    wide = slope(bias.astype(jnp.float32))
    np.testing.assert_array_equal(slope(bias), wide.astype(jnp.bfloat16))


def test_scratch_memory_does_not_grow_with_the_batch_of_scores():
    def scratch(batch):
        shape = jax.ShapeDtypeStruct((batch, 128, 16, 8), jnp.float32)
        call = jax.jit(lambda q, k, v: dot_product_attention(q, k, v))
        memory = call.lower(shape, shape, shape).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes, 4 * batch * 128 * 16 * 8

    # All scores together would be 16 MiB more for 16 entries more; what grows is as
    # large as the arguments.
    (small, arguments_small), (large, arguments_large) = scratch(8), scratch(24)
    grown, arguments = large - small, arguments_large - arguments_small
    assert grown < 8 * arguments
    assert 8 * arguments < 16 * 16 * 128 * 128 * 4


@pytest.mark.parametrize(("few", "expected"), [(True, (1, 1)), (False, (4, 8))])
def test_a_large_tile_is_a_step_of_its_own_on_few_cores(few, expected, monkeypatch):
    monkeypatch.setattr(_batch_heads, "has_few_cores", lambda: few)
    x = jnp.zeros((4, 256, 8, 2))
    plan = block_plan(None, 256, 256, block_query=128, block_key=128)
    cut = _batch_heads.Cut.of(Operands(x, x, x, plan))
    assert (cut.batch_step, cut.head_step) == expected
    # Small ones share a step: their loop would cost more than their products.
    small = block_plan(None, 16, 16, block_query=16, block_key=16)
    assert _batch_heads.Cut.of(Operands(x, x, x, small)).is_one_step


def test_a_mask_is_evaluated_once_in_a_step():
    """Not anew in the maximum and in the sum: it is dear, and stops vectorisation."""
    arrays = [draw(1, 64, 1, 8, seed=i) for i in range(3)]
    options: Any = {"mask": masks.Radial(8), "block_query": 32, "block_key": 32}
    call = lambda q, k, v: dot_product_attention(q, k, v, **options)
    text: Any = jax.jit(call).lower(*arrays).compile().as_text()
    assert text.count(" count-leading-zeros(") == 1
