"""Leaked benchmark items: exact isolation against recursion, vectors, edges, errors."""

import functools
import math
import pathlib

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.test_util import check_grads

import softlib
from softlib.testing import assert_close, check_transformations
from tests.compiled import scoring
from tests.host import jnp

DATA = pathlib.Path(__file__).parent.parent / "data/benchmark_leakage_case0.npz"


def path_length(n):
    if n <= 2:
        return n - 1.0
    return 2 * (math.log(n - 1) + np.euler_gamma) - 2 * (n - 1) / n


def decisions(values):
    """By recursion over the intervals of sorted values, for each value."""
    x = np.sort(np.asarray(values, np.float64))
    count = len(x)
    limit = math.ceil(math.log2(count)) if count > 1 else 0

    @functools.cache
    def depth(target, i, j, k):
        if i == j or x[i] == x[j] or k == limit:
            return k + path_length(j - i + 1)
        total = 0.0
        for g in range(i, j):
            inner = (i, g) if target <= g else (g + 1, j)
            total += (x[g + 1] - x[g]) / (x[j] - x[i]) * depth(target, *inner, k + 1)
        return total

    usual = path_length(count) or 1.0
    of_place = [0.5 - 2 ** -(depth(t, 0, count - 1, 0) / usual) for t in range(count)]
    if count == 1:
        of_place = [0.0]
    places = np.searchsorted(x, values)
    return np.array(of_place)[places]


def test_orders_of_options():
    orders = softlib.scoring.option_permutations(4)
    assert orders.shape == (24, 4)
    assert orders.dtype == np.int32
    np.testing.assert_array_equal(orders[0], range(4))
    assert len({*map(tuple, orders.tolist())}) == 24


def test_matches_independent_vectors():
    with jax.enable_x64(), np.load(DATA) as data:
        scores = jnp.asarray(data["in_logp"])
        check = functools.partial(assert_close, dtype="float64", length=24)
        check(scoring.isolation_decision(scores), data["out_decision_all"])
        shuffled = scoring.benchmark_leakage(scores, scenario="shuffled")
        check(shuffled.decision, data["out_score_of_max"])
        np.testing.assert_array_equal(shuffled.leaked, data["out_leak_at_minus_0_2"])
        published = scoring.benchmark_leakage(scores, scenario="published")
        np.testing.assert_array_equal(published.leaked, data["out_first_is_max"])


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31), number=st.sampled_from([1, 2, 3, 7]))
def test_decisions_are_those_of_the_recursion(seed, number):
    """Few values, so that some are equal; other entries hold NaN."""
    random = np.random.default_rng(seed)
    values = np.round(10 * random.normal(size=number)) - 300
    where = np.zeros(7, bool)
    where[random.permutation(7)[:number]] = True
    row = np.full(7, np.nan)
    row[where] = values
    args = jnp.asarray(row, jnp.float32)
    found = scoring.isolation_decision(args, where=jnp.asarray(where))
    wanted = decisions(values)
    assert_close(found[where], wanted, dtype="float32", length=50)
    np.testing.assert_array_equal(found[~where], 0)
    leak = scoring.benchmark_leakage(
        args, scenario="shuffled", where=jnp.asarray(where)
    )
    assert_close(leak.decision, wanted[values.argmax()], dtype="float32", length=50)
    assert leak.most_likely == np.flatnonzero(where)[values.argmax()]
    # The place and the unit of the values do not matter.
    other = scoring.isolation_decision(4 * args + 64, where=jnp.asarray(where))
    assert_close(other, found, dtype="float32", length=50)


def test_random_cuts_agree_with_the_expectation():
    """The mean over 4,000 random trees, whose error is about 0.005."""
    random = np.random.default_rng(0)
    x = np.sort(random.normal(size=9))
    limit, target, total = 4, 8, 0.0
    for _ in range(4000):
        low, high, k = 0, 8, 0
        while low < high and k < limit:
            cut = random.uniform(x[low], x[high])
            at = np.searchsorted(x, cut) - 1
            low, high = (low, at) if target <= at else (at + 1, high)
            k += 1
        total += k + path_length(high - low + 1)
    mean = 0.5 - 2 ** -(total / 4000 / path_length(9))
    found = scoring.isolation_decision(jnp.asarray(x, jnp.float32))[target]
    assert abs(found - mean) < 0.02


def test_the_largest_rows_and_bfloat16():
    """The decision of the greatest value, by the recursion for it alone."""
    values = np.random.default_rng(0).normal(size=(1, 128))
    rounded = jnp.asarray(values, jnp.bfloat16)
    found = scoring.isolation_decision(rounded)
    assert found.dtype == jnp.float32
    leak = scoring.benchmark_leakage(rounded, scenario="shuffled")
    greatest = np.take_along_axis(np.asarray(found), leak.most_likely[:, None], 1)
    assert_close(greatest[:, 0], leak.decision, dtype="float32", length=1000)


# ---------------------------------------------------------------------------- promises
def test_items_without_orders_with_one_and_with_infinite_ones():
    scores = jnp.array(
        [[-1.0, -2.0, -3.0], [-1.0, -2.0, -3.0], [-1.0, -2.0, -3.0], [0, 0, -jnp.inf]]
    )
    where = jnp.array(
        [[False] * 3, [True, False, False], [False, True, True], [True] * 3]
    )
    for scenario, leaked in (
        ("published", [False, True, False, False]),
        ("shuffled", [False] * 4),
    ):
        leak = scoring.benchmark_leakage(scores, scenario=scenario, where=where)
        np.testing.assert_array_equal(leak.leaked, leaked)
    np.testing.assert_array_equal(leak.margin, [0, np.inf, -np.inf, np.nan])
    np.testing.assert_array_equal(leak.decision, [0, 0, 0, np.nan])
    assert np.isnan(scoring.isolation_decision(scores)[3]).all()


def test_an_unlikely_order_is_no_leak():
    scores = jnp.zeros((1, 24)).at[0, 5].set(-50.0)
    scores = scores + jnp.linspace(0, 1, 24)[None]
    leak = scoring.benchmark_leakage(scores, scenario="shuffled")
    assert scoring.isolation_decision(scores)[0, 5] < -0.2
    assert not leak.leaked.any()


def test_gradients_are_those_of_differences():
    with jax.enable_x64():
        x = jnp.asarray(np.random.default_rng(0).normal(size=6))
        where = jnp.arange(6) != 2

        def run(x):
            leak = scoring.benchmark_leakage(x, scenario="shuffled", where=where)
            some = scoring.isolation_decision(x, where=where)
            return leak.decision + leak.margin + (some * jnp.arange(6.0)).sum()

        check_grads(run, (x,), order=1, modes=["rev"])


@pytest.mark.slow
def test_every_transformation():
    random = np.random.default_rng(0)
    scores = jnp.asarray(random.normal(size=(8, 6)), jnp.float32)

    def function(scores):
        leak = scoring.benchmark_leakage(scores, scenario="shuffled")
        return tuple(leak), scoring.isolation_decision(scores)

    check_transformations(function, scores)


@pytest.mark.usefixtures("untyped")
def test_errors_name_the_argument():
    x = jnp.ones((2, 3))
    leakage = functools.partial(scoring.benchmark_leakage, scenario="shuffled")
    for call, error, message in (
        (lambda: scoring.option_permutations(9), ValueError, "at most 8"),
        (lambda: scoring.option_permutations(2.0), TypeError, "must be a Python int"),
        (lambda: scoring.isolation_decision(x > 0), TypeError, "`values` must have"),
        (lambda: scoring.isolation_decision(jnp.ones(129)), ValueError, "at most 128"),
        (lambda: leakage(x[:, :0]), ValueError, "at least one order"),
        (lambda: leakage(x, where=x), TypeError, "`where` must have"),
        (lambda: leakage(x, scenario="a"), ValueError, "`scenario` must be one of"),
        (lambda: leakage(x, threshold=x), ValueError, "`threshold` must be a number"),
    ):
        name = "option_permutations|isolation_decision|benchmark_leakage"
        with pytest.raises(error, match=rf"^({name}): .*{message}"):
            call()
