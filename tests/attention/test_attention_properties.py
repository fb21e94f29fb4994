"""Laws of attention: order and grouping of the keys, shifts, bounds."""

import functools
import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from softlib import attention, masks
from softlib.testing import assert_close
from tests.attention.problems import Shape, problem
from tests.host import jnp

SHAPE = Shape(T=13, S=21, N=2, K=1, B=2)
FEW = settings(max_examples=15)
seeds = st.integers(0, 2**32 - 1)
NORMALIZERS = pytest.mark.parametrize(
    "normalizer", ["softmax", "softplus", "stablemax"]
)


@functools.cache
def compiled(normalizer):
    """(out, lse) as a function of arrays, a bias and boolean pairs."""

    @jax.jit
    def call(arrays, pairs):
        return attention.dot_product_attention(
            **arrays,
            mask=(masks.Causal(8), pairs),
            normalizer=normalizer,
            return_lse=True,
            block_query=8,
            block_key=8,
        )

    return call


def drawn(seed):
    random = np.random.default_rng(seed)
    arrays = problem(SHAPE, bias="bnts", seed=seed)
    pairs = random.random((2, 2, 13, 21)) < random.random()
    return random, arrays, pairs


def allowed(pairs):
    query, key = np.arange(13)[:, None], np.arange(21)[None, :]
    return pairs & (key <= query + 8)


@NORMALIZERS
@FEW
@given(seed=seeds)
def test_the_order_of_the_keys_that_all_queries_see_is_arbitrary(normalizer, seed):
    random, arrays, pairs = drawn(seed)
    order = np.arange(21)
    order[:9] = random.permutation(9)  # these are visible to all under the mask
    moved = arrays | {name: arrays[name][:, order] for name in ("key", "value")}
    moved["bias"] = arrays["bias"][..., order]
    call = compiled(normalizer)
    for one, two in zip(
        call(arrays, jnp.asarray(pairs)),
        call(moved, jnp.asarray(pairs[..., order])),
        strict=True,
    ):
        assert_close(one, two, dtype="float32", length=21)


@NORMALIZERS
@FEW
@given(seed=seeds)
def test_two_sets_of_keys_merge_by_their_log_sums(normalizer, seed):
    random, arrays, pairs = drawn(seed)
    left = pairs & (np.arange(21) < random.integers(0, 22))
    call = compiled(normalizer)
    out, lse = call(arrays, jnp.asarray(pairs))
    parts = [call(arrays, jnp.asarray(some)) for some in (left, pairs & ~left)]
    total = np.logaddexp(parts[0][1], parts[1][1])
    assert_close(total, lse, dtype="float32", length=21)
    safe = np.where(total == -np.inf, 0, total)
    merged = sum(np.exp(part[1] - safe)[..., None] * part[0] for part in parts)
    assert_close(merged, out, dtype="float32", length=21)


@FEW
@given(seed=seeds)
def test_softmax_does_not_see_a_shift_of_the_scores_of_a_query(seed):
    random, arrays, pairs = drawn(seed)
    shift = jnp.asarray(random.integers(-20, 20, (2, 2, 13, 1)), jnp.float32)
    shifted = arrays | {"bias": arrays["bias"] + shift}
    call = compiled("softmax")
    (out, lse), (same, moved) = (call(a, jnp.asarray(pairs)) for a in (arrays, shifted))
    assert_close(same, out, dtype="float32", length=21, c=16)
    wanted = np.asarray(lse) + np.moveaxis(np.asarray(shift)[..., 0], 1, 2)
    assert_close(moved, wanted, dtype="float32", length=21)


@NORMALIZERS
@FEW
@given(seed=seeds)
def test_outputs_lie_between_the_values_that_are_seen(normalizer, seed):
    _, arrays, pairs = drawn(seed)
    out, lse = compiled(normalizer)(arrays, jnp.asarray(pairs))
    seen = allowed(pairs)
    value = np.asarray(arrays["value"])[:, None, None, :, 0]
    low = np.where(seen[..., None], value, np.inf).min(3)
    high = np.where(seen[..., None], value, -np.inf).max(3)
    empty = ~seen.any(-1)
    out, lse = np.moveaxis(np.asarray(out), 1, 2), np.moveaxis(np.asarray(lse), 1, 2)
    assert (out[empty] == 0).all()
    np.testing.assert_array_equal(lse == -np.inf, empty)
    assert (out[~empty] >= low[~empty] - 1e-5).all()
    assert (out[~empty] <= high[~empty] + 1e-5).all()


@NORMALIZERS
def test_more_keys_raise_the_log_sum(normalizer):
    _, arrays, pairs = drawn(5)
    lse = [
        compiled(normalizer)(arrays, jnp.asarray(pairs & (np.arange(21) < n)))[1]
        for n in range(0, 22, 3)
    ]
    for fewer, more in itertools.pairwise(lse):
        assert (fewer <= more + 1e-6).all()
