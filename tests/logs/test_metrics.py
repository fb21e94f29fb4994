"""Measures of parsers, against sets of messages compared one with another."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from softlib import logs
from tests.compiled import compiled
from tests.host import jnp

grouping_metrics = compiled(logs.grouping_metrics)


def by_sets(true, predicted, same):
    """The four measures from their definitions."""
    groups = lambda ids: {i: {*np.flatnonzero(ids == i)} for i in set(ids.tolist())}
    truth, found = groups(true), groups(predicted)
    f1 = lambda p, r: 2 * p * r / (p + r) if p + r else 0
    if not len(true):
        return 0, 0, 0, 0
    exact = [group for group in truth.values() if group in found.values()]
    right = [
        group for group in found.values() if group <= truth[true[min(group)]]
        and all(same[list(group)])
    ]  # fmt: skip
    return (
        sum(map(len, exact)) / len(true),
        f1(len(exact) / len(found), len(exact) / len(truth)),
        same.mean(),
        f1(len(right) / len(found), len(right) / len(truth)),
    )


def measures(true, predicted, same=None, **options):
    given = None if same is None else jnp.asarray(same)
    return grouping_metrics(
        jnp.asarray(true),
        jnp.asarray(predicted),
        num_true=int(max(true, default=0)) + 3,
        num_pred=int(max(predicted, default=0)) + 2,
        same_template=given,
        **options,
    )


def test_matches_independent_vectors(repository):
    case = np.load(repository / "tests/data/loghub_metrics_case0.npz")
    given = case["in_true"], case["in_pred"], case["in_same_template"].astype(bool)
    wanted = case["out_ga_fga_pa_fta"]
    np.testing.assert_allclose(np.array(measures(*given)), wanted, rtol=1e-6)
    np.testing.assert_allclose(by_sets(*given), wanted, rtol=1e-12)


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.sampled_from([0, 1, 7, 40]), st.integers(1, 9))
def test_measures_are_those_of_sets(seed, count, kinds):
    random = np.random.default_rng(seed)
    true = random.integers(kinds, size=count)
    # Mostly right, or no group is ever exact.
    changed = random.random(count) < 0.1
    predicted = np.where(changed, random.integers(12, size=count), true)
    same = random.random(count) < 0.8
    wanted = by_sets(true, predicted, same)
    found = grouping_metrics(
        jnp.asarray(true),
        jnp.asarray(predicted),
        num_true=10,
        num_pred=13,
        same_template=jnp.asarray(same),
    )
    np.testing.assert_allclose(np.array(found), wanted, rtol=1e-6)
    where = random.random(count) < 0.5
    wanted = by_sets(true[where], predicted[where], same[where])
    masked = grouping_metrics(
        jnp.asarray(np.where(where, true, -7)),
        jnp.asarray(np.where(where, predicted, 99)),
        num_true=10,
        num_pred=13,
        same_template=jnp.asarray(same),
        where=jnp.asarray(where),
    )
    np.testing.assert_allclose(np.array(masked), wanted, rtol=1e-6)


def test_names_of_groups_do_not_matter_and_the_truth_is_perfect():
    true = np.array([0, 1, 1, 2, 3, 3, 3])
    renamed = np.array([5, 2, 2, 0, 1, 1, 1])
    found = measures(true, renamed)
    assert (found.ga, found.fga, found.pa, found.fta) == (1, 1, None, None)


def test_merging_two_groups_lowers_ga_by_both_sizes():
    true = np.array([0, 1, 1, 2, 3, 3, 3])
    merged = np.where(true == 1, 3, true)
    np.testing.assert_allclose(measures(true, merged).ga, 1 - 5 / 7, rtol=1e-6)


def test_a_parser_that_is_blind_to_rare_templates_has_high_ga_and_low_fga():
    true = np.repeat(np.arange(21), [1000] + 20 * [1])
    found = measures(true, np.minimum(true, 1))
    np.testing.assert_allclose(found.ga, 1000 / 1020, rtol=1e-6)
    np.testing.assert_allclose(found.fga, 2 / 23, rtol=1e-6)


def test_an_id_out_of_range_is_nan_unless_it_is_masked():
    ids = jnp.arange(4)
    bad = jnp.array([0, 1, -1, 3])
    where = jnp.arange(4) != 2
    of = lambda **options: grouping_metrics(ids, bad, num_true=4, num_pred=4, **options)
    assert np.isnan(of().ga)
    assert np.isnan(of().fga)
    assert of(where=where) == (1, 1, None, None)
    too_many = grouping_metrics(ids, ids, num_true=3, num_pred=4)
    assert np.isnan(too_many.fga)


@pytest.mark.parametrize("same", [None, True])
def test_no_messages_are_zero(same):
    found = measures(np.zeros(0, int), np.zeros(0, int), same and np.zeros(0, bool))
    assert all(value is None or value == 0 for value in found)


def test_errors(untyped):
    ids = jnp.arange(3)
    with pytest.raises(TypeError, match="`pred_ids` must have an integer dtype"):
        grouping_metrics(ids, jnp.ones(3), num_true=3, num_pred=3)
    with pytest.raises(ValueError, match=r"`pred_ids` must have shape \(3,\)"):
        grouping_metrics(ids, ids[:2], num_true=3, num_pred=3)
    with pytest.raises(ValueError, match="`num_true` must be at least 1, got 0"):
        grouping_metrics(ids, ids, num_true=0, num_pred=3)
    with pytest.raises(ValueError, match=r"`true_ids` must have one axis.*\(3, 1\)"):
        grouping_metrics(ids[:, None], ids, num_true=3, num_pred=3)
