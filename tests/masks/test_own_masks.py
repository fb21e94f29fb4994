"""A mask written outside the library does all that one of the library does."""

import functools
from typing import Any

import jax
import numpy as np
import pytest

from softlib import attention, explain, masks
from softlib.testing import assert_close, check_mask
from tests.host import jnp
from tests.masks.own_masks import DocumentPrefix, Neighbours, Strided, Visible

LENGTHS = np.array([3, 20])
OWN = {
    "static": Neighbours(8),
    "strided": Strided(3),
    "a number that is data": DocumentPrefix(np.int32(9)),
    "one per sequence": DocumentPrefix(LENGTHS),
    "looks up": Visible(np.arange(64) % 3 > 0),
    "and": Neighbours(8) & masks.Causal(),
    "or": DocumentPrefix(LENGTHS) | Strided(5),
    "not": ~(masks.Window(9, 2) & ~Neighbours(16)),
    "shifted": Neighbours(8).shift(5, 3) | DocumentPrefix(LENGTHS).shift(2),
    "of two arrays": Visible(np.arange(64) % 3 > 0) & DocumentPrefix(LENGTHS),
}


@pytest.mark.parametrize("name", OWN)
def test_it_passes_the_check(name):
    check_mask(OWN[name], 24, 20)


@functools.cache
def problem(batch=2, length=48, heads=2, features=16):
    random = np.random.default_rng(0)
    shape = (4, batch, length, heads, features)
    return [jnp.asarray(x, jnp.float32) for x in random.normal(size=shape)]


@pytest.mark.parametrize("name", OWN)
def test_attention_and_its_gradient_are_those_of_the_array_of_the_mask(name):
    mask = OWN[name]
    *arrays, cotangent = problem()
    dense = jnp.asarray(mask.materialize(48))
    dense = dense.reshape(-1, 1, 48, 48)

    def both(mask, blocks):
        attend = functools.partial(
            attention.dot_product_attention, mask=mask, **blocks, implementation="xla"
        )
        out, pull = jax.vjp(attend, *arrays)
        return out, *pull(cotangent)

    sizes = {"block_query": 16, "block_key": 16}
    found = jax.jit(lambda mask: both(mask, sizes))(mask)
    for one, other in zip(found, jax.jit(both)(dense, {}), strict=True):
        assert_close(one, other, dtype=jnp.float32, length=48, c=8)


@pytest.mark.parametrize(
    "mask", [Neighbours(32), Strided(100) & Neighbours(64)], ids=str
)
def test_blocks_without_a_pair_are_not_visited(mask):
    size = 32
    plan = attention.block_plan(mask, 512, 512, block_query=size, block_key=size)
    held = mask.materialize(512).reshape(16, size, 16, size).any((1, 3))
    assert plan.visited < 0.4 * held.size
    assert plan.visited == held.sum()


def test_blocks_that_are_whole_are_not_evaluated():
    plan = attention.block_plan(Neighbours(32), 128, 128, block_query=32, block_key=32)
    assert (plan.whole.shape[1], plan.partial.shape[1]) == (7, 0)


def test_it_is_a_value():
    assert Neighbours(8) == Neighbours(8) != Neighbours(9)
    assert {Neighbours(8): "found"}[Neighbours(8)] == "found"
    assert jax.tree.leaves(Neighbours(8)) == []
    assert jax.tree.leaves(DocumentPrefix(3)) == [3]
    with pytest.raises(AttributeError):
        Neighbours(8).size = 9  # pyrefly: ignore[read-only]


def test_it_prints_as_it_is_written():
    mask = (Neighbours(8) & ~Strided()).shift(2) | DocumentPrefix(jnp.int32(3))
    assert (
        repr(mask) == "(Neighbours(8) & ~Strided()).shift(2) | DocumentPrefix(int32[])"
    )


def test_it_is_a_static_argument_that_does_not_compile_twice():
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def count(mask):
        traces.append(mask)
        return jnp.asarray(mask.row_count(9))

    np.testing.assert_array_equal(count(Strided(3)), count(Strided(3)))
    assert len(traces) == 1


def test_it_maps_over_a_batch_and_divides_with_it():
    counts = jax.vmap(lambda mask: mask.row_count(24))(DocumentPrefix(LENGTHS))
    np.testing.assert_array_equal(counts, DocumentPrefix(LENGTHS).row_count(24))


def test_it_is_drawn():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    ax = masks.plot(Neighbours(4), 16, block=4)
    np.testing.assert_array_equal(
        np.asarray(ax.images[0].get_array()) >= 2, Neighbours(4).materialize(16)
    )
    pyplot.close("all")


class ByJax(masks.Mask):
    """It uses jax.numpy wherever it can."""

    def attends(self, query_index, key_index):
        return jnp.abs(query_index - key_index) % 3 != 1

    def block_status(self, query_start, query_stop, key_start, key_stop):
        one = jnp.maximum(query_stop - query_start, key_stop - key_start) == 1
        return np.asarray(jnp.where(one & (query_start == key_start), 2, 1))


def test_it_may_use_jax_numpy_even_while_a_program_is_traced():
    check_mask(ByJax(), 12, 9)
    counts = jax.jit(lambda: jnp.asarray(ByJax().row_count(7)))()
    np.testing.assert_array_equal(counts, ByJax().materialize(7).sum(1))


class Broken(masks.Mask):
    def attends(self, query_index, key_index):
        return (query_index + key_index) % 2

    def block_status(self, query_start, query_stop, key_start, key_stop):
        return (key_start - query_stop) / 2


def test_what_is_no_boolean_and_no_status_is_refused():
    with pytest.raises(
        TypeError, match="Broken: `attends` must return booleans, got i"
    ):
        Broken().materialize(3)
    with pytest.raises(
        TypeError, match="Broken: `block_status` must return numbers of"
    ):
        Broken().block_status(0, 1, 0, 1)


# ------------------------------------------------------------------------ why no kernel
class Table(masks.Mask):
    """It looks into an array for every pair."""

    def attends(self, query_index, key_index):
        near = jnp.clip(query_index - key_index, 0, 511)
        return jnp.asarray(np.arange(512) % 5 > 0)[near]


class Signed(masks.Mask):
    """Its pairs take an operation that kernels for TPUs lack."""

    def attends(self, query_index, key_index):
        return jnp.sign(query_index - key_index) > 0


class Many(masks.Mask):
    """It looks into more arrays than a kernel holds, of a key each."""

    def attends(self, query_index, key_index):
        ok = query_index >= 0
        for step in range(2, 8):
            ok = ok & (jnp.asarray(np.arange(512) % step)[key_index] != query_index)
        return ok


class Fading(masks.Mask):
    """Its number is no integer."""

    slope: Any = masks.array_field(axes=0)

    def attends(self, query_index, key_index):
        return self.slope * (query_index - key_index) < 8


REASONS = {
    "the mask takes operations that it lacks: sign": Signed(),
    "the mask looks into an array inside": Table(),
    "the mask reads 6 numbers per key": Many(),
}


def explained(mask) -> str:
    given = jax.ShapeDtypeStruct((2, 512, 4, 64), jnp.bfloat16)

    def total(query, key, value):
        out = attention.dot_product_attention(query, key, value, mask=mask)
        return jnp.asarray(out).sum()

    return str(explain(jax.grad(total), given, given, given))


@pytest.mark.parametrize("reason", REASONS)
def test_explain_says_why_a_kernel_refuses_it(reason):
    assert f"not pallas_tpu: {reason}" in explained(REASONS[reason])


# What looks into an array by one index alone is evaluated outside of the kernel.
@pytest.mark.parametrize(
    "mask",
    [
        Strided(3),
        DocumentPrefix(LENGTHS),
        Neighbours(8),
        Visible(np.ones(512, bool)),
        Fading(np.float32(0.5)),
    ],
    ids=["strided", "document prefix", "neighbours", "visible", "fading"],
)
def test_kernels_take_one_of_arithmetic_and_look_ups_by_one_index(mask):
    assert explained(mask).count("tpu: pallas_tpu") == 2
