"""PerAxis and Between: against their definition, as values, and what they reject."""

import dataclasses
import functools
import itertools
import re
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import softlib
from softlib.masks import Between, Block, Causal, Padding, PerAxis, Segments, Window
from tests.host import jnp
from tests.masks import random_masks
from tests.oracles import masks as oracle

LENGTHS = (9, 7, 8, 5)  # of the queries, then of up to three key axes


class Case(NamedTuple):
    mask: PerAxis
    keeps: Any  # of one integer per axis


def third(query, *keys):
    return (query + 2 * sum(keys)) % 3 != 0


@dataclasses.dataclass(frozen=True)
class Near:
    """The keys together at most `reach` beyond the query; it proves blocks."""

    reach: int

    def __call__(self, query, *keys):
        return sum(keys) <= len(keys) * query + self.reach

    def block_status(self, query_start, query_stop, *edges):
        keys = len(edges) // 2
        starts, stops = sum(edges[::2]), sum(edges[1::2]) - keys
        every = stops <= keys * query_start + self.reach
        some = starts <= keys * (query_stop - 1) + self.reach
        return some.astype(np.int8) + every


near = Near(4)


class Parts(NamedTuple):
    """Of a mask; it is made outside of strategies, where beartype may not draw."""

    axes: list[Any]
    joint: list[Any]  # functions, or (first, second, case)


def made(drawn) -> Case:
    axes, parts = drawn
    joint = tuple(
        part if callable(part) else Between(part[0], part[1], part[2].mask)
        for part in parts
    )

    def keeps(*index):
        pairs = [(index[0], key) for key in index[1:]]
        for axis, pair in zip(axes, pairs, strict=True):
            if axis is not None and not axis.keeps(*pair):
                return False
        return all(
            part(*index)
            if callable(part)
            else part[2].keeps(index[part[0]], index[part[1]])
            for part in parts
        )

    values = [None if axis is None else axis.mask for axis in axes]
    if len(joint) == 1:
        joint = joint[0]
    return Case(PerAxis(*values, joint=joint or None), keeps)


@st.composite
def mask_parts(draw, masks=random_masks.simple_compositions, joint=True):
    m = draw(st.integers(1, 3))
    axes = [draw(st.none() | masks) for _ in range(m)]
    between = st.tuples(st.permutations(range(m + 1)), masks).map(
        lambda drawn: (*drawn[0][:2], drawn[1])
    )
    kinds = st.sampled_from([third, near]) | between
    parts = draw(st.lists(kinds, max_size=2)) if joint else []
    return Parts(axes, parts)


def dense(keeps, starts, lengths):
    found = np.empty(lengths, bool)
    for index in np.ndindex(found.shape):
        found[index] = keeps(*(int(i + s) for i, s in zip(index, starts, strict=True)))
    return found


def edges(length, size):
    start = np.arange(0, length, size)
    return start, np.minimum(start + size, length)


def block_grid(lengths, sizes):
    """Starts and stops of the blocks of every axis, that broadcast to the grid."""
    found = []
    for t, (length, size) in enumerate(zip(lengths, sizes, strict=True)):
        shape = [-1 if u == t else 1 for u in range(len(lengths))]
        found += [ends.reshape(shape) for ends in edges(length, size)]
    return found


def classified(pairs, sizes):
    """Every block, looking at all its tuples."""
    found = np.empty([-(-n // b) for n, b in zip(pairs.shape, sizes, strict=True)], int)
    for index in np.ndindex(found.shape):
        block = tuple(
            slice(i * b, (i + 1) * b) for i, b in zip(index, sizes, strict=True)
        )
        found[index] = oracle.classify(pairs[block])
    return found


# ----------------------------------------------------------------------- the definition
@settings(max_examples=80)
@given(drawn=mask_parts(), sizes=st.tuples(*[st.integers(1, 5)] * 4))
def test_is_its_definition_and_its_status_is_sound(drawn, sizes):
    case = made(drawn)
    mask, rank = case.mask, 1 + len(case.mask.axes)
    lengths, sizes = LENGTHS[:rank], sizes[:rank]
    pairs = dense(case.keeps, (0,) * rank, lengths)
    found = mask.materialize(*lengths)
    assert isinstance(found, np.ndarray)
    np.testing.assert_array_equal(found, pairs)
    np.testing.assert_array_equal(
        mask.row_count(*lengths), pairs.sum(tuple(range(1, rank)))
    )
    assert mask.density(*lengths) == pytest.approx(pairs.mean())
    claimed = mask.block_status(*block_grid(lengths, sizes))
    truth = classified(pairs, sizes)
    assert claimed.dtype == np.int8
    assert claimed.shape == truth.shape
    proofs = claimed != Block.SOME
    np.testing.assert_array_equal(claimed[proofs], truth[proofs])


@settings(max_examples=40)
@given(
    drawn=mask_parts(random_masks.primitives, joint=False),
    sizes=st.tuples(*[st.integers(1, 5)] * 3),
)
def test_status_of_a_row_of_primitive_masks_is_exact(drawn, sizes):
    """A block of several rows may be empty although no axis of it is."""
    case = made(drawn)
    rank = 1 + len(case.mask.axes)
    lengths, sizes = LENGTHS[:rank], (1, *sizes)[:rank]
    found = case.mask.block_status(*block_grid(lengths, sizes))
    pairs = dense(case.keeps, (0,) * rank, lengths)
    np.testing.assert_array_equal(found, classified(pairs, sizes))


@settings(max_examples=40)
@given(drawn=mask_parts(), offsets=st.tuples(*[st.integers(-4, 12)] * 4))
def test_shift_is_a_slice_of_the_whole(drawn, offsets):
    case = made(drawn)
    rank = 1 + len(case.mask.axes)
    lengths, offsets = (5, 4, 6, 3)[:rank], offsets[:rank]
    shifted = case.mask.shift(*offsets)
    pairs = dense(case.keeps, offsets, lengths)
    np.testing.assert_array_equal(shifted.materialize(*lengths), pairs)
    sizes = (2, 3, 2, 2)[:rank]
    claimed, truth = (
        shifted.block_status(*block_grid(lengths, sizes)),
        classified(pairs, sizes),
    )
    proofs = claimed != Block.SOME
    np.testing.assert_array_equal(claimed[proofs], truth[proofs])
    back = shifted.shift(*(-offset for offset in offsets))
    whole = dense(case.keeps, (0,) * rank, lengths)
    np.testing.assert_array_equal(back.materialize(*lengths), whole)


def test_traced_indices_give_the_same():
    mask = PerAxis(
        Causal(3) & ~Window(1, 0),
        None,
        joint=(third, Between(2, 1, softlib.masks.Dilated(2)), near),
    )
    found = jax.jit(mask)(*map(jnp.asarray, np.ix_(*map(np.arange, (9, 7, 8)))))
    np.testing.assert_array_equal(found, mask.materialize(9, 7, 8))


def test_shift_by_nothing_is_the_mask_and_key_offsets_default_to_0():
    mask = PerAxis(Causal(), Window(2, 0), joint=third)
    assert mask.shift(0) == mask
    assert mask.shift(0, 0, 0) == mask
    assert mask.shift(3) == mask.shift(3, 0, 0)
    assert hash(mask.shift(3)) == hash(mask.shift(3, 0, 0))


def test_indices_broadcast_and_may_be_numbers():
    mask = PerAxis(Causal(), None, joint=Between(2, 1, Causal(-1)))
    assert mask(4, 2, 3)
    assert not mask(4, 3, 3)
    found = mask(np.arange(6), np.arange(6), 5)
    np.testing.assert_array_equal(found, [True] * 5 + [False])
    for one in (PerAxis(None, None), PerAxis(Causal(), None), PerAxis(None, Causal())):
        found = one(*np.ix_(np.arange(3), np.arange(4), np.arange(5)))
        assert found.shape == (3, 4, 5)


def test_key_axes_in_another_order_have_the_same_tuples():
    four = lambda i, j, k, m: (i + 2 * j + 3 * k + 5 * m) % 4 != 1
    joint = (four, Between(3, 1, Causal(1)), Between(0, 2, Window(3, 0)))
    mask, lengths = PerAxis(Causal(), Window(2, 0), None, joint=joint), (5, 6, 4)
    whole = mask.materialize(7, *lengths)
    for first in itertools.permutations(range(3)):
        for second in itertools.permutations(range(3)):
            moved = mask.shift(2, 1, 0, 3)._permuted(first)._permuted(second)
            order = [first[i] for i in second]
            offsets = (-2, *(-(1, 0, 3)[i] for i in order))
            found = moved.shift(*offsets).materialize(7, *(lengths[i] for i in order))
            expected = whole.transpose(0, *(i + 1 for i in order))
            np.testing.assert_array_equal(found, expected)


# ------------------------------------------------------------------------------ Between
def test_between_gives_unordered_pairs_once_and_pairs_of_different_keys():
    i, j, k = np.ogrid[:3, :6, :7]
    before = PerAxis(None, None, joint=Between(2, 1, Causal(-1)))
    expected = np.broadcast_to(j < k, (3, 6, 7))
    np.testing.assert_array_equal(before.materialize(3, 6, 7), expected)
    unequal = PerAxis(None, None, joint=Between(1, 2, ~Window(0, 0)))
    expected = np.broadcast_to(j != k, (3, 6, 7))
    np.testing.assert_array_equal(unequal.materialize(3, 6, 7), expected)
    early = PerAxis(None, None, joint=Between(0, 2, Causal()))
    expected = np.broadcast_to(k <= i, (3, 6, 7))
    np.testing.assert_array_equal(early.materialize(3, 6, 7), expected)


def test_status_of_between_is_that_of_its_mask():
    """Exact here, since the queries do not matter."""
    for mask in (Causal(-1), ~Window(0, 0), Window(2, 1)):
        joint = PerAxis(None, None, joint=Between(2, 1, mask))
        found = joint.block_status(*block_grid((4, 6, 8), (4, 2, 3)))
        truth = classified(joint.materialize(4, 6, 8), (4, 2, 3))
        np.testing.assert_array_equal(found, truth)
    whole = PerAxis(Causal(9), joint=Between(1, 0, Causal(9)))
    assert whole.block_status(0, 4, 0, 4) == Block.ALL


def test_a_function_proves_nothing_where_the_axes_leave_something():
    mask = PerAxis(Causal(), None, joint=third)
    found = mask.block_status(*block_grid((6, 6, 6), (2, 2, 6)))[..., 0]
    assert found.tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


def test_status_of_many_blocks_at_once_is_that_of_each():
    mask = PerAxis(Window(3, 1), Causal(), joint=(Between(1, 2, Window(1, 4)), near))
    grid = block_grid((9, 7, 8), (4, 2, 3))
    whole = mask.block_status(*grid)
    for index in np.ndindex(whole.shape):
        alone = [ends.reshape(-1)[index[t // 2]] for t, ends in enumerate(grid)]
        found = mask.block_status(*alone)
        assert found == whole[index]
        assert found.dtype == np.int8


def test_empty_axes_have_no_tuples():
    mask = PerAxis(Causal(), None, joint=third)
    for lengths in ((0, 3, 4), (3, 0, 4), (3, 4, 0)):
        assert mask.materialize(*lengths).shape == lengths
        np.testing.assert_array_equal(mask.row_count(*lengths), [0] * lengths[0])
        assert mask.density(*lengths) == 0


def test_one_length_is_that_of_all_axes():
    mask = PerAxis(Causal(), Window(1, 1), joint=third)
    np.testing.assert_array_equal(mask.materialize(5), mask.materialize(5, 5, 5))
    np.testing.assert_array_equal(mask.materialize(5, 4), mask.materialize(5, 4, 4))
    np.testing.assert_array_equal(mask.row_count(5), mask.row_count(5, 5, 5))
    assert mask.density(5, 4) == mask.density(5, 4, 4)


def test_counts_of_long_axes_do_not_look_at_tuples():
    length = 1_000_000
    count = PerAxis(Causal(), Window(9, 0)).row_count(length)
    assert count[-1] == length * 10
    density = PerAxis(Causal(), None).density(length)
    assert density == pytest.approx(0.5, rel=1e-5)


# --------------------------------------------------------------------------- as a value
STATIC = [
    lambda: PerAxis(None),
    lambda: PerAxis(None, None),
    lambda: PerAxis(Causal(), None),
    lambda: PerAxis(None, Causal()),
    lambda: PerAxis(Causal(), Window(2, 0)),
    lambda: PerAxis(Causal(), Window(2, 0), joint=third),
    lambda: PerAxis(Causal(), Window(2, 0), joint=near),
    lambda: PerAxis(Causal(), Window(2, 0), joint=Between(1, 2, Causal())),
    lambda: PerAxis(Causal(), Window(2, 0), joint=Between(2, 1, Causal())),
    lambda: PerAxis(Causal(), Window(2, 0), joint=(third, Between(2, 1, Causal()))),
    lambda: PerAxis(Causal(), Window(2, 0), joint=third).shift(3, 1, 2),
]


@pytest.mark.parametrize("make", STATIC)
def test_equal_values_are_equal_hash_equal_and_have_no_leaves(make):
    one, other = make(), make()
    assert one == other
    assert hash(one) == hash(other)
    assert jax.tree.leaves(one) == []
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert jax.tree.map(lambda x: x, one) == one
    assert sum(one == m() for m in STATIC) == 1
    assert repr(one) == repr(other)


def test_equal_betweens_are_equal():
    assert Between(1, 2, Causal()) == Between(1, 2, Causal())
    assert hash(Between(1, 2, Causal())) == hash(Between(1, 2, Causal()))
    assert Between(1, 2, Causal()) != Between(2, 1, Causal())
    assert Between(1, 2, Causal()) != Between(1, 2, Causal(1))
    assert jax.tree.leaves(Between(1, 2, Causal())) == []


@pytest.mark.parametrize(
    ("value", "field"), [(PerAxis(None), "axes"), (Between(0, 1, Causal()), "first")]
)
def test_is_frozen(value, field):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, field, 2)


def test_bool_raises():
    with pytest.raises(TypeError, match="PerAxis: the truth value is undefined"):
        bool(PerAxis(Causal()))


def test_is_a_static_argument_that_does_not_compile_twice():
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def dense(mask):
        traces.append(mask)
        return jnp.asarray(mask.materialize(5, 4, 6))

    make = STATIC[9]
    first, second = dense(make()), dense(make())
    assert len(traces) == 1
    np.testing.assert_array_equal(first, make().materialize(5, 4, 6))
    np.testing.assert_array_equal(second, first)


def test_without_arrays_it_is_an_argument_of_jit_too():
    mask = STATIC[9]()
    found = jax.jit(lambda mask: jnp.asarray(mask.materialize(5, 4, 6)))(mask)
    np.testing.assert_array_equal(found, mask.materialize(5, 4, 6))


# ---------------------------------------------------------------------- masks of arrays
QUERY_IDS = np.array([[0, 0, 1, 1, 2, 2, 2], [3, 3, 3, 3, 3, 0, 0]])
KEY_IDS = np.array([[0, 1, 1, 2, 0], [0, 3, 0, 3, 7]])
LIMITS = np.array([4, 2])


def with_arrays(kind=jnp.asarray, batch=slice(None)):
    """Segments, with a batch axis, on the first axis; a length on the second."""
    return PerAxis(
        Causal() & Segments(kind(QUERY_IDS[batch]), kind(KEY_IDS[batch])),
        Padding(key=kind(LIMITS[batch])),
        joint=(third, Between(1, 2, Window(None, 2))),
    )


def keeps_of_entry(b):
    def keeps(i, j, k):
        same = QUERY_IDS[b, i] == KEY_IDS[b, j]
        return same and j <= i and k < LIMITS[b] and third(i, j, k) and k <= j + 2

    return keeps


EXPECTED = np.stack([dense(keeps_of_entry(b), (0, 0, 0), (7, 5, 6)) for b in range(2)])


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_arrays_may_have_a_batch_axis_or_none(kind):
    found = with_arrays(kind).materialize(7, 5, 6)
    assert isinstance(found, jax.Array)
    np.testing.assert_array_equal(found, EXPECTED)
    for b in range(2):
        one = with_arrays(kind, b).materialize(7, 5, 6)
        np.testing.assert_array_equal(one, EXPECTED[b])


def test_some_arrays_with_a_batch_axis_and_some_without():
    mask = PerAxis(
        Segments(jnp.asarray(QUERY_IDS), jnp.asarray(KEY_IDS[0])), Padding(key=2)
    )
    found = mask.materialize(7, 5, 3)
    for b in range(2):
        same = QUERY_IDS[b][:, None] == KEY_IDS[0]
        expected = same[:, :, None] & (np.arange(3) < 2)
        np.testing.assert_array_equal(found[b], expected)


def test_arrays_are_arguments_and_not_constants():
    traces = []

    @jax.jit
    def dense(mask):
        traces.append(mask)
        return mask.materialize(7, 5, 6)

    for b in range(2):
        np.testing.assert_array_equal(dense(with_arrays(batch=b)), EXPECTED[b])
    assert len(traces) == 1
    np.testing.assert_array_equal(dense(with_arrays()), EXPECTED)


def test_vmap_over_the_arrays_of_a_mask():
    found = jax.vmap(lambda mask: mask.materialize(7, 5, 6))(with_arrays())
    np.testing.assert_array_equal(found, EXPECTED)


def test_row_count_of_arrays():
    np.testing.assert_array_equal(
        with_arrays().row_count(7, 5, 6), EXPECTED.sum((2, 3))
    )
    free = PerAxis(Causal(), Segments(jnp.asarray(QUERY_IDS), jnp.asarray(KEY_IDS)))
    expected = np.asarray(free.materialize(7, 6, 5)).sum((2, 3))
    np.testing.assert_array_equal(free.row_count(7, 6, 5), expected)


def test_status_of_data_claims_nothing_and_the_rest_what_it_can():
    ids = jnp.zeros(6, int)
    mask = PerAxis(Segments(ids), Causal(), joint=Between(1, 2, Segments(ids)))
    found = mask.block_status(*block_grid((6, 6, 6), (2, 6, 2)))[:, 0]
    assert found.tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


def test_shift_of_arrays():
    found = with_arrays().shift(2, 1, 3).materialize(5, 4, 3)
    np.testing.assert_array_equal(found, EXPECTED[:, 2:, 1:, 3:])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Table:
    """A joint condition that holds arrays."""

    array: Any

    def __call__(self, query, one, two):
        return jnp.asarray(self.array)[query % 3, (one + two) % 4]


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_a_joint_condition_may_hold_arrays(kind):
    table = np.random.default_rng(0).random((3, 4)) < 0.5
    i, j, k = np.ogrid[:5, :4, :6]
    traces = []

    @jax.jit
    def dense(mask):
        traces.append(mask)
        return mask.materialize(5, 4, 6)

    for array in (table, ~table):
        mask = PerAxis(None, None, joint=Table(kind(array)))
        np.testing.assert_array_equal(dense(mask), array[i % 3, (j + k) % 4])
        status = mask.block_status(0, 5, 0, 4, 0, 6)
        assert status == Block.SOME
    assert len(traces) == 1


def test_may_hold_anything_while_it_is_transformed():
    mask = with_arrays()
    assert jax.tree.map(lambda _: object(), mask) is not None
    axes = jax.tree.map(lambda _: 0, mask)
    stacked = jax.tree.map(lambda x: jnp.stack([x] * 3), mask)
    found = jax.vmap(lambda m: m.materialize(7, 5, 6), in_axes=(axes,))(stacked)
    np.testing.assert_array_equal(found[1], EXPECTED)


# ------------------------------------------------------------------------------- errors
masks: Any = softlib.masks  # the arguments are wrong on purpose
TWO = PerAxis(Causal(), None)
BAD = [
    (lambda: masks.PerAxis(), ValueError, "PerAxis: `axes` must", "got none"),
    (lambda: masks.PerAxis(Causal(), 3), TypeError, "PerAxis: `axes` must", "int"),
    (lambda: masks.PerAxis([Causal()]), TypeError, "PerAxis: `axes` must", "list"),
    (lambda: masks.PerAxis(Causal), TypeError, "PerAxis: `axes` must", "type"),
    (lambda: masks.PerAxis(TWO), TypeError, "PerAxis: `axes` must", "PerAxis"),
    (
        lambda: masks.PerAxis(None, joint=3),
        TypeError,
        "PerAxis: `joint` must",
        "got int",
    ),
    (
        lambda: masks.PerAxis(None, joint=Causal()),
        TypeError,
        "PerAxis: `joint` must",
        "got Causal",
    ),
    (
        lambda: masks.PerAxis(None, joint=(third, "third")),
        TypeError,
        "PerAxis: `joint` must",
        "got str",
    ),
    (lambda: masks.Between(-1, 1, Causal()), ValueError, "Between: `first`", "-1"),
    (lambda: masks.Between(1.0, 2, Causal()), TypeError, "Between: `first`", "float"),
    (lambda: masks.Between(1, True, Causal()), TypeError, "Between: `second`", "bool"),
    (lambda: masks.Between(2, 2, Causal()), ValueError, "Between: `second`", "2 for"),
    (lambda: masks.Between(1, 2, third), TypeError, "Between: `mask` must", "function"),
    (lambda: masks.Between(1, 2, None), TypeError, "Between: `mask` must", "NoneType"),
    (
        lambda: masks.PerAxis(None, joint=Between(1, 2, Causal())).materialize(3),
        ValueError,
        "Between: `first` and `second` must be below 2",
        "got 1 and 2",
    ),
    (lambda: TWO(1, 2), ValueError, "PerAxis: `key_indices` must", "got 1"),
    (lambda: TWO(1, 2, 3, 4), ValueError, "PerAxis: `key_indices` must", "got 3"),
    (lambda: TWO.block_status(0, 1, 0, 1), ValueError, "PerAxis: `edges` must", "4"),
    (lambda: TWO.shift(1, 2), ValueError, "PerAxis: `key_offsets` must", "got 1"),
    (
        lambda: TWO.materialize(3, 4, 5, 6),
        ValueError,
        "materialize: `key_lengths` must",
        "got 3",
    ),
    (
        lambda: TWO.materialize(-1, 4, 5),
        ValueError,
        "materialize: `query_length` must",
        "-1",
    ),
    (
        lambda: TWO.row_count(3, 4, -5),
        ValueError,
        "row_count: `key_lengths` must",
        "-5",
    ),
    (
        lambda: with_arrays().density(7, 5, 6),
        TypeError,
        "density: the mask must hold no arrays",
        "average `row_count` instead",
    ),
    (
        lambda: PerAxis(None, Segments(jnp.zeros((2, 2, 3), int))).materialize(3),
        ValueError,
        "Mask: an array of the mask must have 1 axes, or 2",
        "(2, 2, 3)",
    ),
]


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(("call", "error", "message", "got"), BAD)
def test_bad_argument(call, error, message, got):
    with pytest.raises(error, match=re.escape(message)) as caught:
        call()
    assert got in str(caught.value)
    assert str(caught.value).endswith(".")
