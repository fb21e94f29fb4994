"""Masks as values: equality, hash, pytree, static arguments, operators, shift."""

import functools

import jax
import numpy as np
import pytest

from softlib import masks
from tests.host import jnp

CHECKER = np.indices((4, 5)).sum(0) % 2 == 0

# Two equal values each, made apart.
STATIC = [
    lambda: masks.All(),
    lambda: masks.Causal(3),
    lambda: masks.Window(2, None),
    lambda: masks.Dilated(3),
    lambda: masks.Chunked(4),
    lambda: masks.Prefix(5),
    lambda: masks.GlobalTokens(1, 4),
    lambda: masks.Blocks(CHECKER.copy(), 8),
    lambda: masks.Radial(6),
    lambda: masks.Radial(6, 0, 0.5, 4, "pow2"),
    lambda: masks.Causal() & ~masks.Chunked(4) | masks.Blocks(CHECKER.copy(), 2),
    lambda: masks.Causal().shift(3, 1),
]


@pytest.mark.parametrize("make", STATIC)
def test_equal_masks_are_equal_hash_equal_and_have_no_leaves(make):
    one, other = make(), make()
    assert one == other
    assert hash(one) == hash(other)
    assert jax.tree.leaves(one) == []
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert jax.tree.map(lambda x: x, one) == one
    assert sum(one == m() for m in STATIC) == 1
    assert repr(one) == repr(other)


def test_masks_that_differ_in_a_parameter_or_in_content_differ():
    changed = CHECKER.copy()
    changed[3, 4] ^= True
    for one, other in (
        (masks.Causal(), masks.Causal(1)),
        (masks.Radial(6), masks.Radial(6, 0)),
        (masks.Radial(6, rule="pow2"), masks.Radial(6)),
        (masks.Blocks(CHECKER, 8), masks.Blocks(changed, 8)),
        (masks.Blocks(CHECKER, 8), masks.Blocks(CHECKER, (8, 4))),
        (masks.Blocks(CHECKER, 8), masks.Blocks(CHECKER.reshape(5, 4), 8)),
    ):
        assert one != other
    assert masks.Blocks(CHECKER, 8) == masks.Blocks(CHECKER, (8, 8))


def test_array_of_a_block_mask_is_a_copy_and_read_only():
    array = CHECKER.copy()
    mask = masks.Blocks(array, 2)
    array[:] = False
    np.testing.assert_array_equal(np.asarray(mask.array), CHECKER)
    with pytest.raises(ValueError, match="read-only"):
        np.asarray(mask.array)[0, 0] = False
    found = mask.materialize(8, 10)
    np.testing.assert_array_equal(found, CHECKER.repeat(2, 0).repeat(2, 1))


def test_mask_is_a_static_argument_that_does_not_compile_twice():
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def rows(mask, query):
        traces.append(mask)
        return mask(query[:, None], query[None, :]).sum(1)

    for make in (STATIC[7], STATIC[8], STATIC[10]):
        before = len(traces)
        first = rows(make(), jnp.arange(9))
        second = rows(make(), jnp.arange(9))
        assert len(traces) == before + 1
        np.testing.assert_array_equal(first, make().row_count(9))
        np.testing.assert_array_equal(second, first)


def test_mask_without_arrays_is_an_argument_of_jit_too():
    mask = masks.Radial(4) & masks.Causal()
    count = jax.jit(lambda mask: mask.row_count(12))(mask)
    np.testing.assert_array_equal(count, mask.row_count(12))


def test_double_negation_is_the_mask_and_shift_by_nothing_too():
    mask = masks.Chunked(3)
    assert ~~mask is mask
    assert mask.shift(0) is mask
    assert mask.shift(2, 1) == mask.shift(2, 1)


def test_shift_is_a_slice_of_the_whole():
    mask = (masks.Radial(5) & masks.Causal(2)) | masks.Dilated(7)
    whole = mask.materialize(40)
    for query, key in ((3, 0), (0, 11), (17, 12)):
        part = mask.shift(query, key).materialize(9, 14)
        np.testing.assert_array_equal(part, whole[query : query + 9, key : key + 14])
        traced = jax.jit(lambda q, k: mask.shift(q, k).materialize(9, 14))(query, key)
        np.testing.assert_array_equal(traced, part)
    status = masks.Causal().shift(jnp.int32(3)).block_status(0, 4, 4, 8)
    assert status == masks.Block.SOME  # an offset that is data proves nothing


def test_shift_by_an_offset_per_batch_entry():
    mask = masks.Causal()
    found = mask.shift(jnp.array([0, 4])).materialize(3, 6)
    assert found.shape == (2, 3, 6)
    for entry, offset in enumerate((0, 4)):
        np.testing.assert_array_equal(
            found[entry], mask.shift(offset).materialize(3, 6)
        )


def test_indices_may_be_numbers():
    assert masks.Radial(4)(3, 0)
    assert not masks.Radial(4, 0)(3, 8)
    assert masks.Blocks(CHECKER, 2)(3, 3)
    assert not masks.Causal()(2, 3)


def test_counts_of_a_long_sequence_do_not_look_at_pairs():
    """Ten million tokens: any array of pairs, or of a row of them, would not fit."""
    length = 10_000_000
    for mask, kept in (
        (masks.Causal(), length * (length + 1) // 2),
        (masks.Chunked(1000), length * 1000),
        (masks.Dilated(4), length**2 // 4),
        (~masks.Prefix(10), length * (length - 10)),
        (masks.GlobalTokens(0, 1), 2 * length - 1),
    ):
        assert mask.density(length) == kept / length**2


def test_bool_of_a_mask_raises():
    with pytest.raises(TypeError, match=r"use `&`, `|`, `~`"):
        bool(masks.Causal())


def test_other_operands_raise():
    for operation in (lambda m: m & True, lambda m: m | np.ones(3, bool)):
        with pytest.raises(TypeError):
            operation(masks.Causal())


def test_abstract_mask_has_no_definition():
    with pytest.raises(NotImplementedError):
        masks.Mask().attends(0, 0)
