"""`check_mask` finds what is wrong with a mask, and names the first wrong pair."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from softlib import masks
from softlib.masks import Block
from softlib.testing import check_mask
from tests.host import jnp
from tests.masks.own_masks import DocumentPrefix, Neighbours, Strided

LIBRARY = [
    masks.All(),
    masks.Causal(-2),
    masks.Window(5, None),
    masks.Dilated(3) & masks.Causal(),
    masks.Chunked(5) | masks.Prefix(3),
    masks.GlobalTokens(2, 4),
    masks.Blocks(np.eye(3, dtype=bool), (4, 8)),
    masks.Radial(3),
    masks.Segments(np.arange(30) // 7),
    masks.Padding(np.array([3, 30]), 9),
    ~masks.Chunked(4).shift(3, 1),
]


@pytest.mark.parametrize("mask", LIBRARY, ids=str)
def test_masks_of_the_library_pass(mask):
    check_mask(mask, 17, 22)


def test_long_sequences_are_looked_at_in_part():
    check_mask(Neighbours(20), 90)


# ------------------------------------------------------------------ a method that lies
def neighbours(**claims):
    """`Neighbours` with another pair of proofs."""

    class Mutant(Neighbours):
        def block_status(self, query_start, query_stop, key_start, key_stop):
            nearest = query_start // self.size - (key_stop - 1) // self.size
            farthest = (query_stop - 1) // self.size - key_start // self.size
            some = (nearest <= 1) & (farthest >= 0)
            every = (nearest >= 0) & (farthest <= 1)
            return Block.of(
                some=claims.get("some", lambda n, f: some)(nearest, farthest),
                every=claims.get("every", lambda n, f: every)(nearest, farthest),
            )

    return Mutant(3)


STATUS_MUTANTS = {
    "nearest < 1": neighbours(some=lambda n, f: (n < 1) & (f >= 0)),
    "farthest > 0": neighbours(some=lambda n, f: (n <= 1) & (f > 0)),
    "nearest <= 0": neighbours(some=lambda n, f: (n <= 0) & (f >= 0)),
    "nothing at all": neighbours(some=lambda n, f: n > f),
    "nearest >= -1": neighbours(every=lambda n, f: (n >= -1) & (f <= 1)),
    "farthest <= 2": neighbours(every=lambda n, f: (n >= 0) & (f <= 2)),
    "farthest alone": neighbours(every=lambda n, f: f <= 1),
    "nearest alone": neighbours(every=lambda n, f: n >= 0),
    "everything": neighbours(every=lambda n, f: n <= f),
}


def test_the_mutants_differ_in_their_proofs_alone():
    check_mask(neighbours(), 12)


@pytest.mark.parametrize("name", STATUS_MUTANTS)
def test_a_wrong_proof_is_found(name):
    with pytest.raises(AssertionError, match=r"Mutant.block_status: (NONE|ALL) of que"):
        check_mask(STATUS_MUTANTS[name], 12)


def test_the_message_has_the_smallest_wrong_block_and_a_pair_of_it():
    with pytest.raises(AssertionError) as caught:
        check_mask(STATUS_MUTANTS["nearest < 1"], 12)
    assert str(caught.value) == (
        "Mutant.block_status: NONE of queries [3, 4) and keys [0, 1), but query 3 "
        "attends to key 0"
    )
    with pytest.raises(AssertionError) as caught:
        check_mask(STATUS_MUTANTS["farthest <= 2"], 12)
    assert str(caught.value) == (
        "Mutant.block_status: ALL of queries [5, 7) and keys [0, 1), but query 6 does "
        "not attend to key 0"
    )


class Liar(masks.Mask):
    """A mask that says something wrong of one single block, and nothing of others."""

    mask: masks.Mask = masks.mask_field()
    block: tuple[int, ...]

    def attends(self, query_index, key_index):
        return self.mask.attends(query_index, key_index)

    def block_status(self, *edges):
        query, key = (np.arange(*self.block[i : i + 2]) for i in (0, 2))
        lie = Block.NONE if self.mask(query[:, None], key).any() else Block.ALL
        here = [edge == given for edge, given in zip(edges, self.block, strict=True)]
        return np.where(functools.reduce(np.logical_and, here), lie, Block.SOME)


@st.composite
def blocks(draw):
    edges = [draw(st.integers(0, 9)) for _ in range(2)]
    stops = [draw(st.integers(start + 1, 10)) for start in edges]
    return edges[0], stops[0], edges[1], stops[1]


@settings(max_examples=15, deadline=None)
@given(blocks(), st.sampled_from([Neighbours(3), masks.Causal(), ~masks.All()]))
def test_one_wrong_block_of_thousands_is_found(block, mask):
    q0, q1, k0, _ = block
    with pytest.raises(
        AssertionError, match=rf"queries \[{q0}, {q1}\) and keys \[{k0}, "
    ):
        check_mask(Liar(mask, block), 10)


def strided(count):
    class Mutant(Strided):
        def row_count(self, query_length, key_length=None):
            return count(np.arange(query_length), key_length, self.stride)

    return Mutant(3)


COUNT_MUTANTS = {
    "one less": lambda query, keys, s: np.minimum(query, keys - 1) // s,
    "the length": lambda query, keys, s: np.minimum(query, keys) // s + 1,
    "all keys": lambda query, keys, s: query // s + 1,
    "no queries": lambda query, keys, s: (keys - 1) // s + 1,
    "rounded up": lambda query, keys, s: -(-np.minimum(query, keys - 1) // s) + 1,
    "the last": lambda query, keys, s: np.minimum(query, keys - 1) // s + (query < 10),
}


@pytest.mark.parametrize("name", COUNT_MUTANTS)
def test_a_wrong_count_is_found(name):
    with pytest.raises(AssertionError, match=r"row_count: .* which attends to \d"):
        check_mask(strided(COUNT_MUTANTS[name]), 12)


def test_the_right_count_passes():
    check_mask(strided(lambda query, keys, s: np.minimum(query, keys - 1) // s + 1), 12)


# ----------------------------------------------------------- what else goes wrong often
class LooksAtData(DocumentPrefix):
    """Its proof is right where the array is at hand, as it is not in attention."""

    def block_status(self, query_start, query_stop, key_start, key_stop):
        return np.where(key_stop <= np.max(self.length), Block.ALL, Block.SOME)


class KnowsItsArray(DocumentPrefix):
    """It says more where the array is at hand."""

    def block_status(self, query_start, query_stop, key_start, key_stop):
        if isinstance(self.length, np.integer):
            return np.where(key_stop <= self.length, Block.ALL, Block.SOME)
        return np.asarray(Block.SOME)


class Optimist(DocumentPrefix):
    """Right for the first entry of the batch alone."""

    def block_status(self, query_start, query_stop, key_start, key_stop):
        return np.where(key_stop <= 5, Block.ALL, Block.SOME)


class Listed(masks.Mask):
    keys: list

    def attends(self, query_index, key_index):
        return (key_index == self.keys[0]) | (query_index == query_index)


class Branches(masks.Mask):
    def attends(self, query_index, key_index):
        if np.max(query_index) > 0:
            return key_index <= query_index
        return key_index == query_index


class ByShape(masks.Mask):
    def attends(self, query_index, key_index):
        place = np.arange(np.size(query_index)).reshape(np.shape(query_index))
        return key_index <= place


class Numbers(masks.Mask):
    def attends(self, query_index, key_index):
        return (query_index + key_index) % 2


class Strange(masks.Mask):
    def attends(self, query_index, key_index):
        return query_index >= key_index

    def block_status(self, query_start, query_stop, key_start, key_stop):
        return query_start - query_start + 3


class OneCount(masks.Mask):
    def attends(self, query_index, key_index):
        return query_index >= key_index

    def row_count(self, query_length, key_length=None):
        return jnp.ones(())


WRONG = {
    "LooksAtData.block_status: with objects in the place": LooksAtData(np.int32(5)),
    "with its arrays it gives another status": KnowsItsArray(np.int32(5)),
    "does not attend to key 2 in batch entry 1": Optimist(np.array([5, 2])),
    "the field `keys` is static and must be hashable, got list": Listed([3]),
    "Branches.attends: .*": Branches(),
    "ByShape.attends: asked alone, query 2 and key 1|ByShape.attends: ": ByShape(),
    "Numbers.attends: .* must return booleans": Numbers(),
    "Strange.block_status: 3 is no masks.Block": Strange(),
    "row_count: .* not an integer per query": OneCount(),
}


@pytest.mark.parametrize("message", WRONG)
def test_other_mistakes_are_found(message):
    with pytest.raises(AssertionError, match=message):
        check_mask(WRONG[message], 9)


@pytest.mark.usefixtures("untyped")
def test_arguments():
    with pytest.raises(
        TypeError, match="check_mask: `mask` must be a mask value, got n"
    ):
        check_mask(np.ones((3, 3), bool))  # pyrefly: ignore[bad-argument-type]
    with pytest.raises(ValueError, match="`key_length` must be at most 1024, because"):
        check_mask(masks.All(), 5, 2000)
    with pytest.raises(ValueError, match="check_mask: `query_length` must be"):
        check_mask(masks.All(), 0)


def test_it_leaves_no_trace_in_the_mask():
    length = jax.device_put(np.int32(4))
    mask = DocumentPrefix(length)
    check_mask(mask, 6)
    assert mask.length is length
