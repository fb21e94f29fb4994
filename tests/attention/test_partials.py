"""merge_partials: results over parts of the keys are those over all of them."""

import functools
import re

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from softlib.attention import decode_attention, merge_partials
from softlib.testing import assert_close, check_transformations
from tests.attention.decode_problems import oracle, problem
from tests.host import jnp


def oracle_of_parts(outs, lses):
    outs, lses = np.asarray(outs, np.float64), np.asarray(lses, np.float64)
    present = lses > -np.inf
    top = np.where(present, lses, -1e300).max(0, keepdims=True)
    weights = np.where(present, np.exp(lses - top), 0)
    total = weights.sum(0)
    out = np.where(present[..., None], weights[..., None] * outs, 0).sum(0)
    with np.errstate(divide="ignore"):
        lse = np.where(total == 0, -np.inf, top[0] + np.log(total))
    return out / np.where(total == 0, 1, total)[..., None], lse


def parts(count, dtype="float32", seed=0, absent=0.3):
    random = np.random.default_rng(seed)
    outs = random.normal(size=(count, 2, 3, 4, 5))
    lses = 5 * random.normal(size=(count, 2, 3, 4))
    gone = random.random(lses.shape) < absent
    outs[gone], lses[gone] = np.nan, -np.inf  # what an empty part holds is ignored
    return jnp.asarray(outs, dtype), jnp.asarray(lses, jnp.promote_types(dtype, "f4"))


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_matches_oracle(dtype, count):
    with jax.enable_x64(dtype == "float64"):
        outs, lses = parts(count, dtype)
        out, lse = jax.jit(merge_partials)(outs, lses)
        assert (out.dtype, lse.dtype) == (outs.dtype, lses.dtype)
        wanted_out, wanted_lse = oracle_of_parts(outs, lses)
        assert_close(out, wanted_out, dtype=dtype, length=count)
        assert_close(lse, wanted_lse, dtype=lses.dtype, length=count)


def test_a_sequence_is_the_stacked_array():
    outs, lses = parts(3)
    merge = jax.jit(merge_partials)
    for one, two in zip(merge(list(outs), tuple(lses)), merge(outs, lses), strict=True):
        np.testing.assert_array_equal(one, two)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31), absent=st.sampled_from([0.0, 0.5, 1.0]))
def test_monoid_laws(seed, absent):
    outs, lses = parts(3, seed=seed, absent=absent)
    a, b, c = zip(outs, lses, strict=True)
    merge = lambda one, two: merge_partials((one[0], two[0]), (one[1], two[1]))

    def equal(one, two):
        np.testing.assert_allclose(one[0], two[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(one[1], two[1], rtol=1e-6, atol=1e-6)

    equal(merge(a, merge(b, c)), merge(merge(a, b), c))
    equal(merge(a, b), merge(b, a))
    empty = jnp.full_like(a[0], jnp.nan), jnp.full_like(a[1], -jnp.inf)
    held = jnp.where(a[1][..., None] == -jnp.inf, 0, a[0]), a[1]
    equal(merge(a, empty), held)
    equal(merge(empty, a), held)


@pytest.mark.parametrize("cuts", [(1, 4, 9), (0, 11)])
def test_attention_to_parts_of_a_cache_is_attention_to_the_cache(cuts):
    arrays = problem(T=2)
    attend = jax.jit(functools.partial(decode_attention, return_lse=True))
    split = [np.split(arrays[name], cuts, axis=1) for name in ("key", "value")]
    found = [
        attend(
            arrays["query"],
            jnp.asarray(key),
            jnp.asarray(value),
            scale=arrays["scale"],
        )
        for key, value in zip(*split, strict=True)
    ]
    out, lse = merge_partials(*zip(*found, strict=True))
    expected = oracle(arrays)
    assert_close(out, expected.out, dtype="float32", length=11)
    assert_close(lse, expected.lse, dtype="float32", length=11)


def test_no_parts_and_empty_parts_are_empty():
    for count in (0, 2):
        outs = jnp.full((count, 2, 3), jnp.nan)
        out, lse = merge_partials(outs, jnp.full((count, 2), -jnp.inf))
        np.testing.assert_array_equal(out, jnp.zeros((2, 3)))
        np.testing.assert_array_equal(lse, jnp.full(2, -jnp.inf))


def test_empty_parts_have_the_gradient_zero():
    outs, lses = parts(3)

    def total(outs, lses):
        out, lse = merge_partials(outs, lses)
        return out.sum() + jnp.where(lse == -jnp.inf, 0, lse).sum()

    slopes = jax.jit(jax.grad(total, (0, 1)))(outs, lses)
    for slope in slopes:
        assert np.isfinite(slope).all()
        assert (np.asarray(slope)[np.isneginf(lses)] == 0).all()
        assert (np.asarray(slope)[~np.isneginf(lses)] != 0).all()


LATER = ("shard_map", "sharded_jit", "checkpoint", "hessian_vector_product")
SLOW = dict.fromkeys(LATER, "done by the slow test")


@pytest.mark.slow  # a few lines of arithmetic
@pytest.mark.parametrize(
    "skip", [SLOW, pytest.param({}, marks=pytest.mark.slow)], ids=["most", "all"]
)
def test_transformations(skip):
    outs, lses = parts(2, absent=0)
    outs, lses = (jnp.moveaxis(a[:, :, 0], 0, 1) for a in (outs, lses))
    first = lambda a: jnp.moveaxis(a, 1, 0)
    check_transformations(
        lambda outs, lses: merge_partials(first(outs), first(lses)),
        outs,
        lses,
        rows=(0, 1),
        skip=skip,
    )


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("outs", "lses", "error", "message"),
    [
        (np.zeros((2, 3), int), np.zeros(2), TypeError, "`outs` must have a floating"),
        (np.zeros((2, 3)), np.zeros(2, int), TypeError, "`lses` must have a floating"),
        (np.zeros(2), np.zeros(()), ValueError, "`outs` must have the axes (P, *rows"),
        (np.zeros((2, 3)), np.zeros((2, 3)), ValueError, "shape (2,) (that of `outs`"),
        ([], [], ValueError, "`outs` must hold arrays of one shape, got an empty"),
        (
            [np.zeros((4, 3)), np.zeros((1, 3))],
            np.zeros((2, 4)),
            ValueError,
            "`outs` must hold arrays of one shape, got (4, 3) and (1, 3)",
        ),
    ],
)
def test_errors(outs, lses, error, message):
    with pytest.raises(error, match=f"merge_partials: .*{re.escape(message)}"):
        merge_partials(outs, lses)
