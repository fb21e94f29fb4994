"""Masks that hold arrays: segments and padding, with and without a batch axis."""

import jax
import numpy as np
import pytest

from softlib import masks
from tests.host import jnp
from tests.oracles import masks as oracle

QUERY_IDS = np.array([[0, 0, 1, 1, 2, 2, 2], [3, 3, 3, 3, 3, 0, 0]])
KEY_IDS = np.array([[0, 1, 1, 2, 0], [0, 3, 0, 3, 7]])


def stacked(*definitions, lengths):
    return np.stack([oracle.dense(d, *map(range, lengths)) for d in definitions])


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_segments(kind):
    mask = masks.Segments(kind(QUERY_IDS[0]))
    expected = oracle.dense(
        oracle.segments(QUERY_IDS[0], QUERY_IDS[0]), *[range(7)] * 2
    )
    np.testing.assert_array_equal(mask.materialize(7), expected)
    mask = masks.Segments(kind(QUERY_IDS), kind(KEY_IDS))
    expected = stacked(
        *map(oracle.segments, QUERY_IDS, KEY_IDS),
        lengths=(7, 5),
    )
    np.testing.assert_array_equal(mask.materialize(7, 5), expected)
    np.testing.assert_array_equal(mask.row_count(7, 5), expected.sum(-1))


def test_segments_of_one_batch_of_queries_share_keys_without_a_batch_axis():
    mask = masks.Segments(jnp.asarray(QUERY_IDS), jnp.asarray(KEY_IDS[0]))
    expected = stacked(
        *(oracle.segments(ids, KEY_IDS[0]) for ids in QUERY_IDS), lengths=(7, 5)
    )
    np.testing.assert_array_equal(mask.materialize(7, 5), expected)


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_positions_without_an_id_attend_to_nothing(kind):
    mask = masks.Segments(kind(QUERY_IDS[0]), kind(KEY_IDS[0]))
    positions = np.arange(-3, 12)
    found = mask(positions[:, None], positions[None, :])
    expected = oracle.dense(
        oracle.segments(QUERY_IDS[0], KEY_IDS[0]), positions, positions
    )
    np.testing.assert_array_equal(found, expected)
    assert not found[:3].any()
    assert not found[:, 8:].any()


@pytest.mark.parametrize("query", [None, 3, np.array([0, 9])], ids=str)
@pytest.mark.parametrize("key", [None, jnp.int32(4), jnp.array([5, 0])], ids=str)
def test_padding(query, key):
    mask = masks.Padding(query, key)
    big = np.array([99, 99])
    of_query, of_key = (
        np.broadcast_to(big[0] if n is None else np.asarray(n), 2) for n in (query, key)
    )
    expected = stacked(*map(oracle.padding, of_query, of_key), lengths=(6, 7))
    found = np.asarray(mask.materialize(6, 7))
    np.testing.assert_array_equal(np.broadcast_to(found, (2, 6, 7)), expected)
    has_batch = any(np.ndim(n) == 1 for n in (query, key) if n is not None)
    assert found.ndim == 2 + has_batch
    count = np.asarray(mask.row_count(6, 7))
    np.testing.assert_array_equal(np.broadcast_to(count, (2, 6)), expected.sum(-1))


def test_padding_without_lengths_is_everything():
    mask = masks.Padding()
    assert hash(mask) == hash(masks.Padding())
    assert (masks.block_map(mask, (6, 6), (2, 3)) == masks.Block.ALL).all()
    assert mask.density(4) == 1


def test_arrays_are_arguments_and_not_constants():
    traces = []

    @jax.jit
    def dense(mask):
        traces.append(mask)
        return mask.materialize(7)

    causal = masks.Causal()
    for ids in QUERY_IDS:
        found = dense(causal & masks.Segments(jnp.asarray(ids)))
        keeps = oracle.segments(ids, ids)
        expected = oracle.dense(keeps, *[range(7)] * 2) & causal.materialize(7)
        np.testing.assert_array_equal(found, expected)
    assert len(traces) == 1


def test_batch_axis_reaches_compositions():
    mask = masks.Causal() & (
        ~masks.Segments(jnp.asarray(QUERY_IDS)) | masks.Padding(key=jnp.array([2, 4]))
    )
    found = jax.jit(lambda mask: mask.materialize(7))(mask)
    for entry, (ids, length) in enumerate(zip(QUERY_IDS, (2, 4), strict=True)):
        same = oracle.dense(oracle.segments(ids, ids), range(7), range(7))
        expected = np.tri(7, dtype=bool) & (~same | (np.arange(7) < length))
        np.testing.assert_array_equal(found[entry], expected)
    np.testing.assert_array_equal(mask.row_count(7), found.sum(-1))


def test_vmap_over_the_arrays_of_a_mask():
    mask = masks.Causal() & masks.Segments(jnp.asarray(QUERY_IDS))
    found = jax.vmap(lambda mask: mask.materialize(7))(mask)
    np.testing.assert_array_equal(found, mask.materialize(7))


def test_row_count_of_many_queries_is_made_in_blocks():
    ids = np.arange(300) // 7
    count = masks.Segments(jnp.asarray(ids)).row_count(300)
    np.testing.assert_array_equal(count, [(ids == i).sum() for i in ids])


def test_status_of_data_claims_nothing_and_compositions_claim_what_they_can():
    mask = masks.Segments(jnp.asarray(QUERY_IDS[0]))
    assert (masks.block_map(mask, (6, 6), (2, 3)) == masks.Block.SOME).all()
    found = masks.block_map(mask & masks.Causal(), (6, 6), (2, 2))
    assert found.tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    found = masks.block_map(masks.Padding(key=3) | masks.Causal(), (6, 6), (2, 2))
    assert found.tolist() == [[1, 1, 1], [2, 1, 1], [2, 2, 1]]


def test_only_masks_that_look_into_arrays_are_no_arithmetic():
    segments, array = masks.Segments(jnp.zeros(3, int)), np.ones((1, 1), bool)
    assert masks.Padding(key=3)._is_arithmetic()
    assert (masks.Causal() & ~masks.Radial(3))._is_arithmetic()
    for mask in (segments, masks.Blocks(array, 1)):
        assert not mask._is_arithmetic()
        assert not (masks.Causal() | ~mask.shift(1))._is_arithmetic()
        assert not (mask.shift(jnp.int32(1)) & masks.Causal())._is_arithmetic()
