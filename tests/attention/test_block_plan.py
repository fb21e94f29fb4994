"""block_plan: the lists are the dense classification, each block once."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from softlib import attention, masks
from softlib.attention import block_plan
from softlib.attention._engine import block_lists
from tests.host import jnp
from tests.oracles import masks as pairs

EXACT = {
    "causal": (masks.Causal(), pairs.causal()),
    "late": (masks.Causal(-11), pairs.causal(-11)),
    "window": (masks.Window(9, 2), pairs.window(9, 2)),
    "open": (masks.Window(None, 3), pairs.window(None, 3)),
    "chunked": (masks.Chunked(7), pairs.chunked(7)),
    "prefix": (masks.Prefix(5), pairs.prefix(5)),
    "radial": (masks.Radial(6), pairs.radial(6, 1, 1.0, 0, "paper")),
    "nothing": (~masks.All(), lambda q, k: False),
}


def classified(dense, blocks):
    """0, 1, 2 by looking at every pair, and short last blocks of keys are at most 1."""
    rows, columns = (
        range(0, n, size) for n, size in zip(dense.shape, blocks, strict=True)
    )
    found = np.array(
        [
            [
                pairs.classify(dense[q : q + blocks[0], k : k + blocks[1]])
                for k in columns
            ]
            for q in rows
        ]
    )
    if dense.shape[1] % blocks[1]:
        found[:, -1] = np.minimum(found[:, -1], 1)
    return found


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("lengths", [(32, 32), (37, 29), (8, 50), (1, 1)])
@pytest.mark.parametrize("blocks", [(8, 8), (4, 16), (16, 3)])
def test_lists_are_the_dense_classification(name, lengths, blocks):
    mask, keeps = EXACT[name]
    plan = block_plan(mask, *lengths, block_query=blocks[0], block_key=blocks[1])
    wanted = classified(pairs.dense(keeps, *map(range, lengths)), blocks)
    assert plan.grid == wanted.shape
    # In order of the rows, so that nothing is visited twice and nothing is padded.
    for found, kind in ((plan.whole, 2), (plan.partial, 1)):
        np.testing.assert_array_equal(found, np.stack(np.nonzero(wanted == kind)))
        assert found.dtype == np.int32
    assert plan.visited == np.count_nonzero(wanted)
    assert plan.density == plan.visited / wanted.size
    assert (plan.mask, plan.lengths, plan.blocks) == (mask, lengths, blocks)


leaf = st.sampled_from(
    [
        masks.Causal(),
        masks.Causal(5),
        masks.Window(4, 9),
        masks.Chunked(6),
        masks.Prefix(7),
        masks.Radial(5),
        masks.Dilated(3),
        masks.GlobalTokens(4, 6),
    ]
)
trees = st.recursive(
    leaf,
    lambda inner: st.one_of(
        st.builds(lambda a, b: a & b, inner, inner),
        st.builds(lambda a, b: a | b, inner, inner),
        st.builds(lambda a: ~a, inner),
    ),
    max_leaves=5,
)


@settings(max_examples=60)
@given(
    mask=trees,
    lengths=st.tuples(*[st.integers(1, 40)] * 2),
    blocks=st.tuples(*[st.integers(1, 12)] * 2),
    offset=st.integers(-9, 9),
)
def test_plans_of_composed_masks_are_sound(mask, lengths, blocks, offset):
    """What is left out holds no pair; what is whole holds every pair."""
    plan = block_plan(
        mask,
        *lengths,
        block_query=blocks[0],
        block_key=blocks[1],
        query_offset=offset,
    )
    query, key = np.arange(lengths[0])[:, None], np.arange(lengths[1])[None, :]
    dense = np.broadcast_to(mask(query + offset, key), lengths)
    wanted = classified(dense, blocks)
    visited = np.zeros(plan.grid, int)
    for found in (plan.whole, plan.partial):
        np.add.at(visited, tuple(found), 1)
    assert visited.max(initial=0) <= 1
    assert not np.any((visited == 0) & (wanted > 0))
    assert (wanted[tuple(plan.whole)] == 2).all()


def test_masks_that_hold_arrays_are_evaluated_where_the_arrays_decide():
    ids = jnp.zeros(32, jnp.int32)
    sizes = {"block_query": 8, "block_key": 8}
    plan = block_plan(masks.Segments(ids) & masks.Causal(), 32, 32, **sizes)
    assert plan.whole.shape == (2, 0)
    assert plan.visited == 10  # Causal leaves these
    plan = block_plan(masks.Padding(), 32, 32, **sizes)
    assert plan.whole.shape == (2, 16)
    # The lists are those of any other ids, traced ones too.
    inside = jax.jit(lambda ids: block_plan(masks.Segments(ids), 32, 32, **sizes))(ids)
    assert inside.partial.shape == (2, 16)
    np.testing.assert_array_equal(inside.mask.query, ids)


def test_plans_are_cached():
    one, two = (block_plan(masks.Causal(3), 300, 400) for _ in range(2))
    assert one.whole is two.whole
    assert one.partial is two.partial
    assert not one.whole.flags.writeable


def test_none_is_every_pair_and_lengths_may_be_0():
    plan = block_plan(None, 16, 16, block_query=8, block_key=8)
    assert plan.density == 1
    assert plan.partial.shape == (2, 0)
    for lengths in ((0, 16), (16, 0), (0, 0)):
        plan = block_plan(masks.Causal(), *lengths)
        assert (plan.visited, plan.density) == (0, 0)


@pytest.mark.parametrize("length", [1, 100, 128, 1000, 4096])
def test_sizes_are_chosen_out_of_three_and_no_larger_than_needed(length):
    for mask in (None, masks.Causal(), masks.Window(127, 0), masks.Radial(64)):
        plan = block_plan(mask, length, length)
        for size in plan.blocks:
            assert size in (128, 256, 512) or length <= size < length + 8
        # One that is given is taken.
        assert block_plan(mask, length, length, block_key=24).blocks[1] == 24


def test_few_cores_take_small_blocks_where_these_skip_something(monkeypatch):
    """Bands of 256 tokens a frame are narrower than a block: all blocks hold pairs."""
    sizes = {}
    for few in (True, False):
        monkeypatch.setattr(block_lists, "has_few_cores", lambda few=few: few)
        block_lists.cheapest.cache_clear()
        block_lists.lists.cache_clear()
        for tokens in (256, 1024):
            sizes[few, tokens] = block_plan(masks.Radial(tokens), *(16_384,) * 2).blocks
    block_lists.cheapest.cache_clear()
    block_lists.lists.cache_clear()
    assert sizes[True, 1024] == (128, 128)
    assert sizes[False, 1024] == (256, 256)
    assert sizes[True, 256] == sizes[False, 256] == (512, 512)


def test_a_narrow_window_gets_smaller_blocks_than_no_mask():
    narrow = block_plan(masks.Window(63, 0), 8192, 8192)
    wide = block_plan(None, 8192, 8192)
    assert narrow.blocks[0] < wide.blocks[0]
    area = lambda plan: plan.visited * plan.blocks[0] * plan.blocks[1]
    assert area(narrow) < area(wide) / 16


def test_is_a_pytree_whose_lists_are_leaves():
    plan = block_plan(masks.Causal(), 16, 16, block_query=8, block_key=8)
    leaves, structure = jax.tree.flatten(plan)
    assert [leaf.shape for leaf in leaves] == [(2, 1), (2, 2)]
    assert jax.tree.structure(jax.tree.map(jnp.asarray, plan)) == structure
    again = jax.jit(lambda plan: plan)(plan)
    assert (again.mask, again.grid, again.visited) == (plan.mask, plan.grid, 3)
    assert isinstance(again, attention.BlockPlan)
    assert dataclasses.replace(plan, whole=plan.whole[:, :0]).visited == 2


def test_a_linear_mask_has_a_linear_plan():
    for n in (1024, 2048, 4096):
        mask = masks.Window(100, 0)
        plan = block_plan(mask, n, n, block_query=64, block_key=64)
        assert plan.visited == 3 * (n // 64) - 3


def test_a_large_grid_is_classified_without_visiting_tokens():
    mask = masks.Radial(3600, rule="pow2", min_window=128)
    sizes = {"block_query": 512, "block_key": 512}
    plan = block_plan(mask, 460_800, 460_800, **sizes)  # 2.1e11 pairs
    assert plan.grid == (900, 900)
    assert 0.1 < plan.density < 0.3
