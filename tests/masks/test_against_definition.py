"""Every mask against its definition, pair by pair: NumPy, traced, blocks, counts."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from softlib import masks
from tests.host import jnp
from tests.masks import random_masks
from tests.oracles import masks as oracle

# Positions before the sequence belong to the definition of every mask.
LENGTH, FIRST = 45, -7
POSITIONS = np.arange(FIRST, LENGTH)
QUERY, KEY = POSITIONS[:, None], POSITIONS[None, :]
STARTS, STOPS = (
    np.array([s for s in range(FIRST, LENGTH, 3) for _ in (1, 3, 8, 17)]),
    np.array(
        [min(s + n, LENGTH) for s in range(FIRST, LENGTH, 3) for n in (1, 3, 8, 17)]
    ),
)


def classified(pairs: np.ndarray) -> np.ndarray:
    """Every range of queries against every range of keys, looking at all pairs."""
    # before[i, j]: pairs in the rows before i and the columns before j.
    before = np.zeros((len(POSITIONS) + 1,) * 2, int)
    before[1:, 1:] = pairs.cumsum(0).cumsum(1)
    start, stop = STARTS - FIRST, STOPS - FIRST
    rows = before[stop] - before[start]
    found = rows[:, stop] - rows[:, start]
    size = (stop - start)[:, None] * (stop - start)
    return np.where(found == size, 2, (found > 0).astype(int))


def status(mask: masks.Mask) -> np.ndarray:
    block = STARTS[:, None], STOPS[:, None], STARTS[None, :], STOPS[None, :]
    return mask.block_status(*block)


def test_classification_by_sums_is_classification_by_looking():
    pairs = np.random.default_rng(0).random((len(POSITIONS),) * 2) < 0.9
    found = classified(pairs)
    for row in range(0, len(STARTS), 7):
        for column in range(0, len(STARTS), 5):
            rows, columns = (
                slice(STARTS[i] - FIRST, STOPS[i] - FIRST) for i in (row, column)
            )
            assert found[row, column] == oracle.classify(pairs[rows, columns])


@pytest.mark.parametrize("name", random_masks.PRIMITIVES)
def test_primitive_is_its_definition(name):
    @settings(max_examples=60 if name == "Radial" else 12)
    @given(case=random_masks.PRIMITIVES[name], offset=random_masks.offsets)
    def check(case, offset):
        pairs = oracle.dense(case.keeps, POSITIONS, POSITIONS)
        found = case.mask(QUERY, KEY)
        assert isinstance(found, np.ndarray)
        np.testing.assert_array_equal(np.broadcast_to(found, pairs.shape), pairs)
        traced = case.mask(jnp.asarray(QUERY), jnp.asarray(KEY))
        assert isinstance(traced, jax.Array)
        np.testing.assert_array_equal(np.broadcast_to(traced, pairs.shape), pairs)
        # Exact, not only sound; and so for the opposite and the shifted mask.
        np.testing.assert_array_equal(status(case.mask), classified(pairs))
        np.testing.assert_array_equal(status(~case.mask), classified(~pairs))
        shifted = random_masks.shifted(case, offset, -offset)
        pairs = oracle.dense(shifted.keeps, POSITIONS, POSITIONS)
        np.testing.assert_array_equal(status(shifted.mask), classified(pairs))

    check()


@settings(max_examples=120)
@given(case=random_masks.compositions)
def test_composition_is_its_definition_and_its_status_is_sound(case):
    pairs = oracle.dense(case.keeps, POSITIONS, POSITIONS)
    found = np.broadcast_to(case.mask(QUERY, KEY), pairs.shape)
    np.testing.assert_array_equal(found, pairs)
    claimed, truth = status(case.mask), classified(pairs)
    assert (claimed[claimed != masks.Block.SOME] == truth[claimed != 1]).all()


@settings(max_examples=120)
@given(
    case=random_masks.compositions,
    lengths=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    blocks=st.tuples(random_masks.sizes, random_masks.sizes),
)
def test_lengths_row_counts_density_and_block_map(case, lengths, blocks):
    mask = case.mask
    pairs = oracle.dense(case.keeps, *map(range, lengths))
    np.testing.assert_array_equal(mask.materialize(*lengths), pairs)
    count = mask.row_count(*lengths)
    assert count.dtype == np.int32
    np.testing.assert_array_equal(count, pairs.sum(1))
    assert mask.density(*lengths) == pytest.approx(pairs.mean() if pairs.size else 0)
    found = masks.block_map(mask, lengths, blocks)
    assert found.shape == tuple(
        -(-n // b) for n, b in zip(lengths, blocks, strict=True)
    )
    within = mask._within(*lengths)
    traced = within(jnp.arange(40)[:, None], jnp.arange(40)[None, :])
    traced = np.broadcast_to(traced, (40, 40))[: lengths[0], : lengths[1]]
    np.testing.assert_array_equal(traced, pairs)
    for (row, column), kind in np.ndenumerate(found):
        rows = slice(row * blocks[0], (row + 1) * blocks[0])
        columns = slice(column * blocks[1], (column + 1) * blocks[1])
        assert kind in (masks.Block.SOME, oracle.classify(pairs[rows, columns]))


@pytest.mark.parametrize("name", random_masks.PRIMITIVES)
def test_row_count_of_a_primitive(name):
    @settings(max_examples=80 if name == "Radial" else 20)
    @given(
        case=random_masks.PRIMITIVES[name],
        lengths=st.tuples(st.integers(0, 60), st.integers(0, 60)),
    )
    def check(case, lengths):
        pairs = oracle.dense(case.keeps, *map(range, lengths))
        for mask, truth in ((case.mask, pairs), (~case.mask, ~pairs)):
            count = mask.row_count(*lengths)
            assert count.dtype == np.int32
            np.testing.assert_array_equal(count, truth.sum(1))

    check()


@settings(max_examples=20)
@given(left=random_masks.primitives, right=random_masks.primitives)
def test_status_of_operators_is_the_minimum_the_maximum_and_the_complement(left, right):
    of_left, of_right = status(left.mask), status(right.mask)
    both, either = status(left.mask & right.mask), status(left.mask | right.mask)
    np.testing.assert_array_equal(both, np.minimum(of_left, of_right))
    np.testing.assert_array_equal(either, np.maximum(of_left, of_right))
    np.testing.assert_array_equal(status(~left.mask), 2 - of_left)


def test_status_of_many_pairs_of_blocks_at_once_is_that_of_each():
    mask = masks.Radial(5) & ~masks.Chunked(4)
    start = np.arange(0, 40, 6)
    grid = mask.block_status(start[:, None], start[:, None] + 6, start, start + 6)
    for i, row in enumerate(start):
        for j, column in enumerate(start):
            alone = mask.block_status(row, row + 6, column, column + 6)
            assert alone == grid[i, j]
            assert alone.dtype == np.int8
