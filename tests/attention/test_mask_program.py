"""Masks that look into arrays: numbers per position, and arithmetic on pairs."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.tpu.attention_mask import OPERATIONS
from softlib import masks
from softlib.attention._engine.mask_program import MOST_NUMBERS, program_of

T, S, B = 12, 20, 2
RANDOM = np.random.default_rng(0)
IDS = RANDOM.integers(-1, 3, (B, T)).astype(np.int32)
KEY_IDS = RANDOM.integers(-1, 3, (B, S)).astype(np.int32)
BIG = np.uint32(3_000_000_000)


class Table(masks.Mask):
    """Classes of positions, in tables that are part of the program."""

    def attends(self, query_index, key_index):
        table = np.arange(30) ** 2 % 7
        one, other = jnp.asarray(table)[query_index], jnp.asarray(table + 1)[key_index]
        # The branches are read in another order than they are computed.
        return jnp.where(query_index < key_index, one, other) < 4


class Near(masks.Mask):
    """Positions close in time."""

    times: Any = masks.array_field(axes=1)
    reach: Any = masks.array_field(axes=0)

    def attends(self, query_index, key_index):
        return jnp.abs(self.times[query_index] - self.times[key_index]) < self.reach


class Read(masks.Mask):
    """Keys that are visible, as booleans."""

    keys: Any = masks.array_field(axes=1)

    def attends(self, query_index, key_index):
        return self.keys[key_index]


class Groups(masks.Mask):
    """Operations that kernels lack, of one index each."""

    def attends(self, query_index, key_index):
        return query_index // 3 == jnp.sort(key_index // 3, axis=1)


class Sampled(masks.Mask):
    """A table of pairs."""

    pairs: Any = masks.array_field(axes=2)

    def attends(self, query_index, key_index):
        return self.pairs[query_index, key_index]


class Sums(masks.Mask):
    """Arithmetic that wraps, per pair."""

    ids: Any = masks.array_field(axes=1)

    def attends(self, query_index, key_index):
        return self.ids[query_index] + self.ids[key_index] == 3


def many(count: int) -> masks.Mask:
    found = masks.Segments(IDS[0], KEY_IDS[0])
    for n in range(1, count):
        found = found | masks.Segments(IDS[0] + n, KEY_IDS[0] - n)
    return found


SEGMENTS = masks.Segments(IDS, KEY_IDS)
UNSIGNED = np.where(IDS[0] < 0, BIG, IDS[0]).astype(np.uint32)
MASKS = {
    "ids": (SEGMENTS, (0, 1, 1)),
    "ids without a batch axis": (masks.Segments(IDS[0], KEY_IDS[1]), (0, 1, 1)),
    "one batch axis of two": (masks.Segments(IDS[0], KEY_IDS), (0, 1, 1)),
    "ids of both": (masks.Segments(KEY_IDS[0]), (0, 1, 1)),
    "fewer ids than positions": (masks.Segments(IDS[0, :9], KEY_IDS[0]), (0, 1, 1)),
    "narrow ids": (
        masks.Segments(IDS[0].astype(np.int8), KEY_IDS[0].astype(np.int16)),
        (0, 1, 1),
    ),
    "unsigned ids": (
        masks.Segments(IDS.astype(np.uint8), KEY_IDS.astype(np.uint8)),
        (0, 1, 1),
    ),
    "large ids": (masks.Segments(UNSIGNED, np.roll(KEY_IDS, 1)), (0, 1, 2)),
    "large ids in order": (
        masks.Segments(UNSIGNED, np.array([BIG, 1, 2] * 7, np.uint32)),
        (0, 1, 1),
    ),
    "causal": (SEGMENTS & masks.Causal(8), (0, 1, 1)),
    "not": (~SEGMENTS | masks.Window(1, 2), (0, 1, 1)),
    "shifted": (SEGMENTS.shift(3, -2) & masks.Causal(), (0, 1, 1)),
    "shifted by arrays": (
        (SEGMENTS & masks.Causal()).shift(np.array([0, 5], np.int32), 1),
        (2, 1, 1),
    ),
    "lengths": (SEGMENTS & masks.Padding(key=np.array([19, 3])), (1, 1, 1)),
    "tables": (Table(), (0, 1, 1)),
    "floats": (
        Near(RANDOM.normal(size=(B, S)).astype(np.float32), np.float32(0.7)),
        (1, 1, 1),
    ),
    "booleans": (Read(KEY_IDS > 0), (0, 0, 1)),
    "operations of one index": (Groups(), (0, 1, 1)),
    "many": (many(MOST_NUMBERS), (0, MOST_NUMBERS, MOST_NUMBERS)),
    "no array": (masks.Radial(4) & ~masks.Causal(-3), (0, 0, 0)),
}


@pytest.mark.parametrize("name", MASKS)
def test_pairs_from_numbers(name):
    mask, counts = MASKS[name]
    program = program_of(mask, (T, S), OPERATIONS)
    assert program.is_evaluable
    assert program.why_not is None
    assert (program.scalars, program.queries, program.keys) == counts
    expected = np.asarray(mask.materialize(T, S))
    expected = np.broadcast_to(expected, (B, T, S))
    numbers, found = jax.jit(functools.partial(everywhere, program))(mask)
    assert {x.dtype for x in numbers if x is not None} <= {np.dtype(np.int32)}
    for entry, shapes in enumerate(found):
        for pairs in shapes:
            np.testing.assert_array_equal(pairs, expected[entry])


def everywhere(program: Any, mask: masks.Mask) -> Any:
    """The pairs of each batch entry, in the shapes in which kernels have indices."""
    numbers = program.numbers(mask, B)
    query, key = jnp.arange(T), jnp.arange(S)
    column, row = (lambda x: x[:, None]), (lambda x: x[None])
    whole = lambda x: jnp.broadcast_to(x, (T, S))
    shapes = (
        (column, row, lambda x: x),
        (row, column, jnp.transpose),
        (lambda x: whole(column(x)), lambda x: whole(row(x)), lambda x: x),
    )

    def pairs(entry: int, of_query: Any, of_key: Any, back: Any) -> Any:
        scalars, queries, keys = (
            [] if x is None else list(x[entry % len(x)]) for x in numbers
        )
        given = [*map(of_query, queries), *map(of_key, keys)]
        found = program.attends(of_query(query), of_key(key), *scalars, *given)
        return back(found)

    return numbers, [[pairs(n, *shape) for shape in shapes] for n in range(B)]


def test_what_is_left_is_arithmetic_on_pairs():
    mask, _ = MASKS["ids"]
    program = program_of(mask, (T, S), OPERATIONS)
    index = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    shapes = index(T, 1), index(1, S)
    text = str(jax.make_jaxpr(program.attends)(*shapes, *shapes))
    assert "eq" in text
    assert "gather" not in text


REFUSED = {
    "looks into an array for every pair": Sampled(RANDOM.random((T, S)) < 0.5),
    f"reads {MOST_NUMBERS + 1} numbers per query": many(MOST_NUMBERS + 1),
    "with no uint8 per pair": Sums(IDS.astype(np.uint8)),
    "no numbers of float16": Near(np.zeros(S, np.float16), np.float16(1)),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_others_are_refused(reason):
    program = program_of(REFUSED[reason], (T, S), OPERATIONS)
    assert reason in str(program.why_not)
    assert not program.is_evaluable


def test_what_pairs_lack_is_named():
    mask = MASKS["floats"][0]
    program = program_of(mask, (T, S), OPERATIONS - {"abs"})
    assert program.lacks == ["abs"]
    program = program_of(mask, (T, S), OPERATIONS - {"bitcast_convert_type"})
    assert "no numbers of float32" in str(program.why_not)


def test_a_table_of_pairs_may_still_decide_whole_blocks():
    program = program_of(masks.Blocks(np.tri(3, dtype=bool), 8), (T, S), OPERATIONS)
    assert program.looks_up_pairs
    assert program.why_not is None
    assert not program.is_evaluable


def test_wide_ids_are_refused():
    with jax.enable_x64():
        wide = masks.Segments(jnp.asarray(IDS[0], jnp.int64))
        program = program_of(wide, (T, T), OPERATIONS)
        assert "no numbers of int64" in str(program.why_not)
