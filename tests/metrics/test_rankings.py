"""How good rankings of many labels are, against loops."""

import numpy as np
import pytest

from tests.compiled import metrics
from tests.host import jnp
from tests.oracles import extreme as oracle

ROWS, FEATURES, CLASSES = 6, 3, 13


def problem():
    random = np.random.default_rng(0)
    ranking = np.stack([random.permutation(CLASSES)[:5] for _ in range(ROWS)])
    positives = np.stack([random.permutation(CLASSES)[:4] for _ in range(ROWS)])
    positives[0, 1:], positives[1] = -1, -1
    ranking[2, 4] = -1
    return ranking, positives


@pytest.mark.parametrize("k", [1, 3, 5])
def test_measures_are_those_of_loops(k):
    ranking, positives = problem()
    counts = np.arange(CLASSES) ** 2
    known = metrics.label_propensities(jnp.asarray(counts), 1000)
    p = oracle.propensities(counts, 1000, 0.55, 1.5)
    np.testing.assert_allclose(known, p, rtol=1e-5)
    precision, recall, scored = oracle.ranking_scores(ranking, positives, 1 / p, k)
    arrays = jnp.asarray(ranking), jnp.asarray(positives)
    np.testing.assert_allclose(metrics.precision_at_k(*arrays, k=k), precision)
    np.testing.assert_allclose(metrics.recall_at_k(*arrays, k=k), recall, rtol=1e-6)
    ours = metrics.propensity_scored_precision_at_k(*arrays, known, k=k)
    np.testing.assert_allclose(ours, scored, rtol=1e-5)


def test_a_positive_without_a_propensity_is_nan_and_not_that_of_another():
    ranking, positives = (jnp.asarray(a) for a in problem())
    score = metrics.propensity_scored_precision_at_k
    known = jnp.full(CLASSES, 0.5)
    bad = positives.at[2, 0].set(CLASSES)
    assert np.isnan(score(ranking, bad, known, k=3))
    others = jnp.arange(ROWS) != 2
    wanted = score(ranking, positives, known, k=3, where=others)
    assert score(ranking, bad, known, k=3, where=others) == wanted > 0


def test_where_leaves_rows_out():
    ranking, positives = (jnp.asarray(a) for a in problem())
    where = jnp.arange(ROWS) % 2 == 0
    p = jnp.linspace(0.1, 1, CLASSES)
    score = metrics.propensity_scored_precision_at_k
    half = score(ranking[::2], positives[::2], p, k=3)
    np.testing.assert_allclose(score(ranking, positives, p, k=3, where=where), half)
    precision = metrics.precision_at_k(ranking, positives, k=3, where=where)
    np.testing.assert_array_equal(precision[1::2], 0)
    none = jnp.zeros((ROWS, 0), int)
    assert score(ranking, none, p, k=3) == 0
    np.testing.assert_array_equal(metrics.recall_at_k(ranking, none, k=3), 0)


def test_the_best_ranking_has_a_propensity_scored_precision_of_one():
    p = jnp.linspace(0.9, 0.1, CLASSES)  # the last label is the rarest
    positives = jnp.array([[3, 7, 1], [5, -1, -1]])
    ranking = jnp.array([[7, 3, 0], [5, 0, 1]])
    score = metrics.propensity_scored_precision_at_k(ranking, positives, p, k=2)
    np.testing.assert_allclose(score, 1, rtol=1e-6)


@pytest.mark.usefixtures("untyped")
def test_wrong_arguments_are_named():
    ranking, positives = (jnp.asarray(a) for a in problem())
    for call, error, message in (
        (
            lambda: metrics.precision_at_k(ranking, positives, k=6),
            ValueError,
            "precision_at_k: `k` must be at most the 5 ids .* got 6",
        ),
        (
            lambda: metrics.recall_at_k(ranking, positives[1:], k=1),
            ValueError,
            r"recall_at_k: `positives` must have shape \(6, K\)",
        ),
        (
            lambda: metrics.precision_at_k(ranking * 1.0, positives, k=1),
            TypeError,
            "precision_at_k: `ranking` must have an integer dtype",
        ),
        (
            lambda: metrics.label_propensities(ranking[0], 0),
            ValueError,
            "label_propensities: `num_examples` must be at least 1, got 0",
        ),
    ):
        with pytest.raises(error, match=message):
            call()
