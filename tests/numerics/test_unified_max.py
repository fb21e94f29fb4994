"""The unified-max accumulator: values, monoid laws, the valid range, derivatives."""

import re

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from softlib.numerics import PlainSum, RunningMax, UnifiedMax
from softlib.testing import assert_close
from tests.host import jnp


def oracle(z, x):
    """Logsumexp per row, and the mean of x under the softmax."""
    z, x = np.asarray(z, np.float64), np.asarray(x, np.float64)
    top = np.where(np.isneginf(z.max(-1)), 0, z.max(-1))
    e = np.exp(z - top[:, None])
    total = e.sum(-1)
    with np.errstate(divide="ignore"):
        lse = top + np.log(total)
    return lse, e @ x / np.where(total == 0, 1, total)[:, None]


def accumulated(accumulator, blocks, values=None):
    """Folds blocks (and the values that belong to their columns) one after another."""
    rows = blocks[0].shape[0]
    zeros = None if values is None else jnp.zeros((rows, values[0].shape[1]))
    state = accumulator.init((rows,), blocks[0].dtype, weighted=zeros)
    for i, block in enumerate(blocks):
        weigh = None if values is None else (lambda e, i=i: e @ values[i])
        state = accumulator.update(state, block, weigh=weigh)
    return state


def problem(dtype, sizes=(1, 7, 3), scale=1.0, rows=4):
    rng = np.random.default_rng(0)
    blocks = [jnp.asarray(scale * rng.normal(size=(rows, n)), dtype) for n in sizes]
    values = [jnp.asarray(rng.normal(size=(n, 3)), dtype) for n in sizes]
    return blocks, values


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("sizes", [(1,), (1, 7, 3), (128, 1, 127)])
@pytest.mark.parametrize("criterion", ["row_max", "elementwise"])
def test_fold_matches_oracle(dtype, sizes, criterion):
    with jax.enable_x64(dtype == "float64"):
        blocks, values = problem(dtype, sizes)
        phi = jnp.asarray([-3.0, 0.0, 2.0, 20.0], dtype)  # one per row
        accumulator = UnifiedMax(phi, criterion=criterion)
        state = accumulated(accumulator, blocks, values)
        lse, mean = oracle(np.concatenate(blocks, 1), np.concatenate(values, 0))
        length = sum(sizes)
        assert not accumulator.needs_recompute(state).any()
        # Adding the reference rounds at its size.
        assert_close(accumulator.finalize(state), lse, dtype=dtype, length=length, c=12)
        assert_close(accumulator.mean(state), mean, dtype=dtype, length=length)


def test_all_accumulators_give_the_same():
    blocks, values = problem("float32")
    weights = [jnp.exp(block) for block in blocks]
    found = [
        (accumulator.finalize(state), accumulator.mean(state))
        for accumulator, given_ in (
            (RunningMax(), blocks),
            (UnifiedMax(1.0), blocks),
            (PlainSum(), weights),
        )
        for state in [accumulated(accumulator, given_, values)]
    ]
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("phi", [-20.0, -3.0, 0.0, 5.0, 20.0])
def test_results_do_not_depend_on_phi(phi):
    blocks, values = problem("float32", rows=7)
    lse, mean = oracle(np.concatenate(blocks, 1), np.concatenate(values, 0))
    accumulator = UnifiedMax(phi)
    state = accumulated(accumulator, blocks, values)
    np.testing.assert_allclose(accumulator.mean(state), mean, atol=1e-6)
    np.testing.assert_allclose(accumulator.finalize(state), lse, atol=4e-6)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), absent=st.floats(0, 1))
def test_monoid_laws(seed, absent):
    """Sums are added and extremes compared: commutative to the last bit."""
    rng = np.random.default_rng(seed)
    accumulator = UnifiedMax(0.5, criterion="elementwise")

    def state():
        z = np.where(rng.random((3, 4)) < absent, -np.inf, 5 * rng.normal(size=(3, 4)))
        return accumulator.update(accumulator.init((3,)), jnp.asarray(z, jnp.float32))

    def equal(one, two, rtol):
        for x, y in zip(*map(jax.tree.leaves, (one, two)), strict=True):
            np.testing.assert_allclose(x, y, rtol=rtol)

    a, b, c = state(), state(), state()
    merge, neutral = accumulator.merge, accumulator.init((3,))
    equal(merge(a, merge(b, c)), merge(merge(a, b), c), 1e-6)
    equal(merge(a, b), merge(b, a), 0)
    equal(merge(a, neutral), a, 0)
    equal(merge(neutral, a), a, 0)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 12])
def test_any_partition_merged_in_any_order_gives_the_same(count):
    rng = np.random.default_rng(count)
    z = jnp.asarray(4 * rng.normal(size=(3, 12)), jnp.float32)
    accumulator = UnifiedMax(1.0)
    parts = [
        accumulated(accumulator, [part])
        for part in (
            z[:, index] for index in np.array_split(rng.permutation(12), count)
        )
    ]
    parts.append(accumulator.init((3,)))  # an empty part
    order = rng.permutation(len(parts))
    merged = parts[order[0]]
    for i in order[1:]:
        merged = accumulator.merge(merged, parts[i])
    expected = jax.nn.logsumexp(z, axis=1)
    np.testing.assert_allclose(accumulator.finalize(merged), expected, rtol=2e-6)


def test_merging_needs_no_exponential():
    state = accumulated(RunningMax(), *problem("float32"))
    made = jax.make_jaxpr(lambda a, b: RunningMax().merge(a, b))(state, state)
    assert str(made).count("= exp ") == 2
    accumulator = UnifiedMax(0.0)
    state = accumulated(accumulator, *problem("float32"))
    text = str(jax.make_jaxpr(lambda a, b: accumulator.merge(a, b))(state, state))
    assert text.count("= add ") == 2
    assert text.count("= max ") == 1
    assert not re.search(r"= (exp|sub|mul|div) ", text)


# ------------------------------------------------------------------------ valid range
@pytest.mark.parametrize(
    ("scores", "row_max", "elementwise"),
    [
        ([1.0, 2.0], False, False),
        ([1.0, -9.0], False, True),  # a small score does no harm
        ([4.0, 2.0], True, True),  # the range is open
        ([3.99, 2.0], False, False),
        ([-2.0, -3.0], True, True),
        ([-1.99, -3.0], False, True),
        ([-np.inf, 1.0], False, False),
        ([-np.inf, -np.inf], False, False),
        ([np.nan, 1.0], True, True),
        ([np.inf, 1.0], True, True),
    ],
)
def test_flags_are_those_of_the_criterion(scores, row_max, elementwise):
    z = jnp.asarray([scores], jnp.float32)
    for criterion, flag in (("row_max", row_max), ("elementwise", elementwise)):
        accumulator = UnifiedMax(1.0, (-3.0, 3.0), criterion)
        state = accumulated(accumulator, [z])
        assert accumulator.needs_recompute(state).tolist() == [flag]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_row_that_is_not_flagged_is_accurate_up_to_the_ends_of_any_range(dtype):
    """The range may be as wide as one likes: what the dtype cannot hold is flagged."""
    with jax.enable_x64(dtype == "float64"):
        widest = 760 if dtype == "float64" else 110
        top = np.linspace(-widest, widest, 401)
        z = top[:, None] + np.array([0.0, -1.0, -15.0])
        x = jnp.asarray([[1.0], [-5.0], [7.0]], dtype)
        accumulator = UnifiedMax(0.0, (-1e9, 1e9))
        z = jnp.asarray(z, dtype)
        state = accumulated(accumulator, [z], [x])
        flagged = np.asarray(accumulator.needs_recompute(state))
        lse, mean = oracle(z, x)
        eps = float(jnp.finfo(dtype).eps)
        good = ~flagged
        assert good.sum() > 250
        assert flagged.sum() > 30
        actual = np.asarray(accumulator.finalize(state), np.float64)
        np.testing.assert_allclose(actual[good], lse[good], atol=4 * widest * eps)
        # A score carries its rounding error into the weights.
        actual = np.asarray(accumulator.mean(state), np.float64)
        np.testing.assert_allclose(actual[good], mean[good], atol=16 * eps)


def test_what_has_overflowed_or_vanished_is_nan():
    accumulator = UnifiedMax(0.0)
    state = accumulated(
        accumulator, [jnp.array([[300.0], [-300.0], [-jnp.inf]])], [jnp.ones((1, 1))]
    )
    nan = [True, True, False]
    np.testing.assert_array_equal(np.isnan(accumulator.finalize(state)), nan)
    np.testing.assert_array_equal(np.isnan(accumulator.mean(state)[:, 0]), nan)
    np.testing.assert_array_equal(accumulator.needs_recompute(state), nan)


def test_an_overflow_of_the_weighted_sum_alone_is_flagged():
    accumulator = UnifiedMax(0.0)
    z, x = jnp.array([[79.0], [1.0]]), jnp.array([[1e5]])
    state = accumulated(accumulator, [z], [x])
    assert np.isfinite(state.sum).all()
    np.testing.assert_array_equal(accumulator.needs_recompute(state), [True, False])


@pytest.mark.parametrize("phi", [-np.inf, np.inf, np.nan])
def test_a_reference_that_is_no_number_flags_all_but_empty_rows(phi):
    accumulator = UnifiedMax(phi)
    z = jnp.array([[0.0, 1.0], [-jnp.inf, -jnp.inf]])
    state = accumulated(accumulator, [z], [jnp.ones((2, 1))])
    np.testing.assert_array_equal(accumulator.needs_recompute(state), [True, False])
    assert accumulator.finalize(state)[1] == -np.inf
    assert accumulator.mean(state)[1] == 0


# ------------------------------------------------------------------------ derivatives
def test_first_and_second_derivatives_are_those_of_logsumexp():
    with jax.enable_x64():
        z = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6)))
        z = z.at[0, 2].set(-jnp.inf)
        accumulator = UnifiedMax(0.7)
        blocks = lambda z: [z[:, :4], z[:, 4:]]
        fold = lambda z: accumulator.finalize(accumulated(accumulator, blocks(z))).sum()
        plain = lambda z: jax.nn.logsumexp(z, axis=1).sum()
        for differentiate in (jax.grad, jax.hessian):
            one, two = (jax.jit(differentiate(f))(z) for f in (fold, plain))
            np.testing.assert_allclose(one, two, rtol=1e-12, atol=1e-14)


def test_phi_and_the_range_have_no_derivative():
    blocks, values = problem("float32")

    def results(phi, low):
        accumulator = UnifiedMax(phi, (low, 80.0))
        state = accumulated(accumulator, blocks, values)
        return accumulator.finalize(state).sum() + accumulator.mean(state).sum()

    for slope in jax.grad(results, (0, 1))(0.5, -70.0):
        assert slope == 0


def test_an_empty_row_is_minus_infinity_with_mean_and_gradient_zero():
    accumulator = UnifiedMax(3.0)
    z = jnp.array([[-jnp.inf, -jnp.inf], [0.0, 0.0]])

    def results(z):
        state = accumulated(accumulator, [z, z], [jnp.ones((2, 1))] * 2)
        return accumulator.finalize(state), accumulator.mean(state)

    lse, mean = results(z)
    np.testing.assert_allclose(lse, [-np.inf, np.log(4)], rtol=1e-6)
    np.testing.assert_allclose(mean[:, 0], [0, 1], rtol=1e-6)
    gradient = jax.grad(lambda z: results(z)[0][1] + results(z)[1].sum())(z)
    np.testing.assert_array_equal(gradient[0], 0)
    np.testing.assert_allclose(gradient[1], 0.5, rtol=1e-6)


def test_is_a_pytree_with_a_static_criterion():
    accumulator = UnifiedMax(jnp.zeros(3), (-5.0, jnp.ones(3)), "elementwise")
    leaves, structure = jax.tree.flatten(accumulator)
    assert len(leaves) == 3
    again = jax.tree.unflatten(structure, leaves)
    assert again.criterion == "elementwise"
    assert again.phi is accumulator.phi
    z = jnp.ones((3, 2))
    flags = jax.jit(lambda a, z: a.needs_recompute(accumulated(a, [z])))(accumulator, z)
    np.testing.assert_array_equal(flags, True)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "max"}, "`criterion` must be one of 'row_max', 'elementwise'"),
        ({"valid_range": (1.0, 1.0)}, "a < b, got (1.0, 1.0)"),
        ({"valid_range": (float("nan"), 1.0)}, "a < b, got (nan, 1.0)"),
        ({"valid_range": (1.0, 2.0, 3.0)}, "a pair (a, b), got 3 values"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=f"UnifiedMax: .*{re.escape(message)}"):
        UnifiedMax(0.0, **options)
