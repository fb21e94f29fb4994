"""The two-pass accumulator: values, monoid laws, anchors, derivatives, the engines."""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from softlib.attention import _dot_product as attention_module, dot_product_attention
from softlib.attention._engine.scores import Softmax
from softlib.numerics import PlainSum, RunningMax, TwoPass, UnifiedMax
from softlib.testing import assert_close
from tests import operations
from tests.host import jnp
from tests.oracles import extended as oracle

ACCUMULATOR = TwoPass()


def accumulated(blocks, values=None, accumulator: Any = ACCUMULATOR):
    """Folds blocks (and the values that belong to their columns) one after another."""
    rows = blocks[0].shape[0]
    zeros = None if values is None else jnp.zeros((rows, values[0].shape[1]))
    state = accumulator.init((rows,), blocks[0].dtype, weighted=zeros)
    for i, block in enumerate(blocks):
        weigh = None if values is None else (lambda e, i=i: e @ values[i])
        state = accumulator.update(state, block, weigh=weigh)
    return state


@functools.partial(jax.jit, static_argnames="sizes")
def results(z, x, sizes):
    cuts = np.cumsum(sizes)[:-1]
    state = accumulated(jnp.split(z, cuts, 1), jnp.split(x, cuts, 0))
    return ACCUMULATOR.finalize(state), ACCUMULATOR.mean(state)


def expected(z, x):
    """Logsumexp per row, and the mean of x under the softmax."""
    return oracle.logsumexp(z), oracle.softmax(z) @ np.asarray(x).astype(oracle.LONG)


# Scores far apart, of both signs, on both sides of the anchor.
OFFSETS = [0.0, 100.0, -200.0, 3e4, -3e4, 1e6, -1e6, 1e30]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("sizes", [(1,), (1, 7, 3), (128, 1, 127)])
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_fold_matches_longdouble(dtype, sizes, scale):
    with jax.enable_x64(dtype == "float64"):
        rng, length = np.random.default_rng(0), sum(sizes)
        z = scale * rng.normal(size=(8, length)) + np.array(OFFSETS)[:, None]
        z, x = jnp.asarray(z, dtype), jnp.asarray(rng.normal(size=(length, 3)), dtype)
        lse, mean = results(z, x, sizes)
        exact_lse, exact_mean = expected(z, x)
        assert lse.dtype == mean.dtype == np.dtype(dtype)
        assert_close(mean, exact_mean, dtype=dtype, length=length)
        # 4 units of the last place, and not of the largest row.
        unit = np.spacing(np.abs(exact_lse).astype(dtype))
        error = np.abs(np.asarray(lse) - exact_lse)
        np.testing.assert_array_less(error, 4 * unit)


def test_values_of_the_data_file(repository):
    case = np.load(repository / "tests/data/two_pass_softmax_case0.npz")
    z, k = jnp.asarray(case["in_x"]), int(case["in_split"])
    parts = [state_of(part) for part in (z[:, :k], z[:, k:])]
    names = ("lse_left", "lse_right", "logsumexp")
    for state, name in zip([*parts, merge(*parts)], names, strict=True):
        exact = case[f"out_{name}"]
        found = np.asarray(ACCUMULATOR.finalize(state), np.float64)
        np.testing.assert_array_equal(np.isneginf(found), np.isneginf(exact))
        finite = np.isfinite(exact)
        unit = np.spacing(np.abs(exact[finite]).astype(np.float32))
        error = np.abs(found[finite] - exact[finite])
        np.testing.assert_array_less(error, 4 * unit)


@pytest.mark.parametrize(
    ("axis", "shape"), [(1, (3, 2)), ((0, -1), (5,)), ((0, 1, 2), ())]
)
def test_reduced_axes_may_be_any(axis, shape):
    z = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, 2)), jnp.float32)
    init = ACCUMULATOR.init(shape)
    fold = lambda z: ACCUMULATOR.finalize(ACCUMULATOR.update(init, z, axis=axis))
    exact = jax.nn.logsumexp(z, axis=axis)
    np.testing.assert_allclose(jax.jit(fold)(z), exact, rtol=1e-6)


# ------------------------------------------------------------------------- monoid laws
def lse_of(state):
    return np.asarray(ACCUMULATOR.finalize(state))


@jax.jit
def state_of(z):
    return ACCUMULATOR.update(ACCUMULATOR.init(z.shape[:-1]), z)


merge = jax.jit(ACCUMULATOR.merge)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    absent=st.sampled_from([0.0, 0.3, 0.9]),
    scale=st.sampled_from([1.0, 99.0, 1e4]),
)
def test_any_tree_of_merges_gives_the_same(seed, absent, scale):
    """Leaves in any order, empty states among them, rows beyond the anchor too."""
    rng = np.random.default_rng(seed)
    z = scale * rng.normal(size=(8, 20)) + np.array(OFFSETS)[:, None]
    z = np.where(rng.random(z.shape) < absent, -np.inf, z).astype(np.float32)
    # Five pieces of four scores, in any order; one of them empty.
    order = rng.permutation(20).reshape(5, 4)
    states: list[Any] = [state_of(jnp.asarray(z[:, columns])) for columns in order]
    states.append(ACCUMULATOR.init((8,)))
    while len(states) > 1:
        i, j = rng.choice(len(states), 2, replace=False)
        joined = merge(states[i], states[j])
        states = [s for k, s in enumerate(states) if k not in (i, j)] + [joined]
    found, exact = lse_of(states[0]), oracle.logsumexp(z)
    np.testing.assert_array_equal(np.isneginf(found), np.isneginf(exact))
    finite = np.isfinite(exact)
    unit = np.spacing(np.maximum(np.abs(exact[finite]), 1).astype(np.float32))
    np.testing.assert_array_less(np.abs(found[finite] - exact[finite]), 2 * unit)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31))
def test_merging_commutes_to_the_last_bit_and_with_nothing_is_nothing(seed):
    rng = np.random.default_rng(seed)
    draw = lambda: jnp.asarray(99 * rng.normal(size=(8, 4)), jnp.float32)
    offset = jnp.asarray(OFFSETS, jnp.float32).reshape(-1, 1)
    a, b = state_of(draw() + offset), state_of(draw() + offset)
    neutral = ACCUMULATOR.init((8,))
    for one, two in (
        (merge(a, b), merge(b, a)),
        (merge(a, neutral), a),
        (merge(neutral, a), a),
        (merge(neutral, neutral), neutral),
    ):
        for x, y in zip(*map(jax.tree.leaves, (one, two)), strict=True):
            np.testing.assert_array_equal(x, y)


def test_rescaling_rounds_nothing():
    """The first term, seen through a thousand larger exponents and back in the sum."""
    z = jnp.arange(0.0, 64.0, 0.0625).reshape(1, -1)

    @jax.jit
    def weighted(z):
        def step(state, column):
            block, x = column
            weigh = lambda e: e[:, 0] * x
            block = block.reshape(1, 1)
            return ACCUMULATOR.update(state, block, weigh=weigh), 0

        state = ACCUMULATOR.init((1,), weighted=jnp.zeros(1))
        x = jnp.zeros(z.shape[1]).at[0].set(1)
        return jax.lax.scan(step, state, (z[0], x))[0]

    state = weighted(z)
    # e^0 = 1 = 2^n: only a power of 2 has come between.
    assert state.weighted[0] * 2.0 ** float(state.exponent[0]) == 1


def test_all_four_accumulators_give_the_same():
    rng = np.random.default_rng(0)
    blocks = [jnp.asarray(3 * rng.normal(size=(4, n)), jnp.float32) for n in (1, 7, 3)]
    values = [jnp.asarray(rng.normal(size=(n, 3)), jnp.float32) for n in (1, 7, 3)]
    weights = [jnp.exp(block) for block in blocks]

    def found_by(accumulator, blocks):
        state = accumulated(blocks, values, accumulator)
        return accumulator.finalize(state), accumulator.mean(state)

    found = [
        jax.jit(functools.partial(found_by, accumulator))(given_)
        for accumulator, given_ in (
            (TwoPass(), blocks),
            (RunningMax(), blocks),
            (UnifiedMax(1.0), blocks),
            (PlainSum(), weights),
        )
    ]
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------- edges
def test_a_million_is_not_a_million_and_one():
    """Beyond the exact range of exponents, and across it, in every order of blocks."""
    for scores in (
        [1e6, 1e6 + 1],
        [-1e6, -1e6 - 1],
        [32_767.0, 32_769.0],
        [-32_767.0, -32_769.0],
        [44_999.0, 45_001.0],
        [-1e30, -1e30],
        [1e6, -1e6],
        [3e38, -3e38],
        [5.0, -1e9],
    ):
        for order in (scores, scores[::-1]):
            z = np.array([order], np.float32)
            x = np.array([[1.0], [2.0]], np.float32)
            lse, mean = results(jnp.asarray(z), jnp.asarray(x), (1, 1))
            exact_lse, exact_mean = expected(z, x)
            np.testing.assert_allclose(mean, np.float64(exact_mean), rtol=3e-7)
            np.testing.assert_allclose(lse, np.float64(exact_lse), rtol=1.2e-7)


def test_an_empty_row_is_minus_infinity_with_mean_and_gradient_zero():
    z = jnp.array([[-jnp.inf] * 4, [0.0] * 4])
    x = jnp.ones((4, 1))
    lse, mean = results(z, x, (2, 2))
    np.testing.assert_allclose(lse, [-np.inf, np.log(4)], rtol=1e-6)
    np.testing.assert_array_equal(mean[:, 0], [0, 1])

    @jax.jit
    @jax.grad
    def gradient(z):
        lse, mean = results(z, x, (2, 2))
        return lse[1] + jnp.where(jnp.isfinite(lse[0]), lse[0], 0) + mean.sum()

    np.testing.assert_array_equal(gradient(z)[0], 0)
    np.testing.assert_allclose(gradient(z)[1], 0.25, rtol=1e-6)


def test_nan_and_infinity_stay_in_their_rows():
    z = jnp.array([[jnp.nan, 0.0], [1.0, jnp.inf], [1e6, jnp.inf], [1.0, 1.0]])
    lse, mean = results(z, jnp.ones((2, 1)), (1, 1))
    np.testing.assert_array_equal(np.isnan(lse), [True, True, True, False])
    np.testing.assert_array_equal(np.isnan(mean[:, 0]), [True, True, True, False])


def test_minus_infinity_counts_as_absent():
    z = jnp.array([[1.0, -jnp.inf, 2.0]])
    with_absent, without = state_of(z), state_of(z[:, ::2])
    for x, y in zip(*map(jax.tree.leaves, (with_absent, without)), strict=True):
        np.testing.assert_array_equal(x, y)


# ----------------------------------------------------------------- derivatives, loops
@pytest.mark.parametrize("offset", [0.0, 40_000.0])
def test_first_and_second_derivatives_are_those_of_logsumexp(offset):
    with jax.enable_x64():
        z = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6))) + offset
        z = z.at[0, 2].set(-jnp.inf)
        x = jnp.asarray(np.random.default_rng(1).normal(size=(6, 1)))
        weigh = lambda lse, mean: (lse + mean[:, 0] ** 2).sum()
        fold = lambda z: weigh(*results(z, x, (4, 2)))
        plain = lambda z: weigh(
            jax.nn.logsumexp(z, axis=1), jax.nn.softmax(z, axis=1) @ x
        )
        # Beyond the anchor the second as well, of which the first is a part.
        differentiate = jax.hessian if offset else jax.grad
        one, two = (jax.jit(differentiate(f))(z) for f in (fold, plain))
        np.testing.assert_allclose(one, two, rtol=1e-11, atol=1e-13)


def test_states_pass_through_loops():
    z = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 5)), jnp.float32)

    @jax.jit
    def fold(z):
        step = lambda state, block: (ACCUMULATOR.update(state, block), None)
        return ACCUMULATOR.finalize(jax.lax.scan(step, ACCUMULATOR.init((4,)), z)[0])

    exact = jax.nn.logsumexp(z, axis=(0, 2))
    np.testing.assert_allclose(fold(z), exact, rtol=1e-6)


@dataclasses.dataclass(frozen=True)
class TwoPassSoftmax(Softmax):
    accumulator: ClassVar[Any] = TwoPass()


def test_attention_folds_with_it(monkeypatch):
    rng = np.random.default_rng(0)
    shape = (2, 24, 2, 8)
    query, key, value = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in "qkv"
    )

    def attend(query, key, value):
        out, lse = dot_product_attention(
            30 * query,
            key,
            value,
            is_causal=True,
            block_query=8,
            block_key=8,
            return_lse=True,
            implementation="xla",
        )
        return out, lse

    def with_gradient(*arrays):
        loss = lambda *arrays: sum(jnp.sin(x).sum() for x in attend(*arrays))
        return attend(*arrays), jax.grad(loss, (0, 1, 2))(*arrays)

    by_maximum = jax.jit(with_gradient)(query, key, value)
    monkeypatch.setitem(attention_module._KINDS, "softmax", TwoPassSoftmax())
    # A new function: what is cached for the other was traced with the maximum.
    program = jax.jit(lambda *arrays: with_gradient(*arrays))
    assert "shift_left" in str(operations.make_jaxpr(program)(query, key, value))
    by_exponents = program(query, key, value)
    for x, y in zip(*map(jax.tree.leaves, (by_exponents, by_maximum)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)
