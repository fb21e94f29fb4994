"""Ensembles, routing, retrieval and curves: oracles, vectors, edges, errors."""

import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from softlib.testing import assert_close, check_transformations
from tests.compiled import scoring
from tests.host import jnp

DATA = pathlib.Path(__file__).parent.parent / "data/adaptivelog_case0.npz"
MEMBERS, ROWS, CLASSES = 5, 7, 4


def softmax(z):
    weights = np.exp(z - z.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def entropy(p):
    return -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(-1)


def uncertainty(z, where):
    """The four numbers of each row by their definitions, over the members there."""
    p, found = softmax(np.asarray(z, np.float64)), []
    for row in range(p.shape[1]):
        own = p[where[:, row], row]
        if not len(own):
            found.append([0.0] * 4)
            continue
        whole, expected = entropy(own.mean(0)), entropy(own).mean()
        found.append([whole, expected, whole - expected, 1 - own.mean(0).max()])
    return np.array(found).T


# ----------------------------------------------------------------------------- oracles
def test_matches_independent_vectors():
    with jax.enable_x64(), np.load(DATA) as data:
        found = scoring.ensemble_uncertainty(jnp.asarray(data["in_logits"]))
        for name, wanted in (
            ("predictive_entropy", "predictive_entropy"),
            ("expected_entropy", "expected_entropy"),
            ("mutual_information", "mutual_information"),
            ("least_confidence", "one_minus_max"),
        ):
            assert_close(
                getattr(found, name), data[f"out_{wanted}"], dtype="float64", length=20
            )
        sent = scoring.route_by_uncertainty(found.predictive_entropy, budget=0.25)
        np.testing.assert_array_equal(sent, data["out_route_budget_025"])
        keys = jnp.asarray(data["in_keys"])
        cases = scoring.similar_cases(jnp.asarray(data["in_queries"]), keys, k=3)
        np.testing.assert_array_equal(cases.indices, data["out_top3"])


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_uncertainty_matches_its_oracle(dtype):
    random = np.random.default_rng(0)
    with jax.enable_x64(dtype == "float64"):
        z = jnp.asarray(3 * random.normal(size=(MEMBERS, ROWS, CLASSES)), dtype)
        where = random.uniform(size=(MEMBERS, ROWS)) < 0.7
        where[:, 0] = False
        z = z.at[1, 2, 3].set(-jnp.inf)
        where[1, 2] = True
        dirty = jnp.where(where[..., None], z, jnp.nan)
        found = scoring.ensemble_uncertainty(dirty, where=jnp.asarray(where))
        wanted = uncertainty(np.asarray(z, np.float64), where)
        for ours, theirs in zip(found, wanted, strict=True):
            assert ours.dtype == jnp.promote_types(dtype, jnp.float32)
            assert_close(ours, theirs, dtype=ours.dtype, length=MEMBERS * CLASSES)
        gradient = jax.grad(
            lambda z: sum(
                jnp.sum(a)
                for a in scoring.ensemble_uncertainty(z, where=jnp.asarray(where))
            )
        )(dirty)
        assert np.isfinite(np.asarray(gradient, np.float64)).all()
        assert not np.asarray(gradient)[~where].any()


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31), share=st.sampled_from([0, 0.2, 0.29, 0.5, 1]))
def test_routes_the_most_uncertain_and_the_curve_follows(seed, share):
    """Ties, rows that do not count, NaN: the order of a stable sort in Python."""
    random = np.random.default_rng(seed)
    u = random.choice([0.0, 0.5, 1.0, np.nan], 10)
    where = random.uniform(size=10) < 0.8
    small, large = random.normal(size=(2, 10)).astype(np.float32)
    rank = lambda i: (-np.inf if np.isnan(u[i]) else -u[i], i)
    order = sorted(np.flatnonzero(where), key=rank)
    count = int(np.floor(share * len(order) + 1e-9))
    given = jnp.asarray(u, jnp.float32), jnp.asarray(where)
    sent = scoring.route_by_uncertainty(given[0], budget=share, where=given[1])
    np.testing.assert_array_equal(np.flatnonzero(sent), sorted(order[:count]))
    curve = scoring.cascade_curve(given[0], small, large, where=given[1])
    for m in (0, count, 10):
        mine = np.array(order[:m], int)
        score = np.where(np.isin(np.arange(10), mine), large, small)[where]
        wanted = score.mean() if len(score) else 0.0
        assert_close(curve[m], wanted, dtype="float32", length=30)


# ---------------------------------------------------------------------------- promises
def test_members_that_agree_have_no_mutual_information():
    z = jnp.asarray(np.random.default_rng(1).normal(size=(1, ROWS, CLASSES)))
    same = scoring.ensemble_uncertainty(jnp.repeat(z, MEMBERS, 0))
    assert (np.asarray(same.mutual_information) < 1e-12).all()
    # A difference of the entropies is below its rounding, 1e-7.
    close = jnp.concatenate([z, z + 1e-4 * jnp.eye(CLASSES)[None, :1]])
    found = scoring.ensemble_uncertainty(close).mutual_information
    exact = uncertainty(np.asarray(close, np.float64), np.ones((2, ROWS), bool))[2]
    np.testing.assert_allclose(found, exact, rtol=0.05)


def test_a_certain_prediction_has_a_small_confidence_gap():
    z = jnp.zeros((2, 1, 3)).at[:, :, 0].set(30.0)
    found = scoring.ensemble_uncertainty(z).least_confidence
    np.testing.assert_allclose(found, 2 * np.exp(-30.0), rtol=1e-5)


def test_members_far_apart_and_members_without_a_probability():
    apart = jnp.asarray([[[200.0, 0.0]], [[0.0, 200.0]]])
    found = scoring.ensemble_uncertainty(apart)
    np.testing.assert_allclose(found.mutual_information, np.log(2), rtol=1e-6)
    bad = scoring.ensemble_uncertainty(jnp.full((2, 1, 3), -jnp.inf))
    assert all(np.isnan(each).all() for each in bad)


def test_thresholds_are_exceeded():
    u = jnp.array([0.2, 0.5, jnp.nan, 0.9])
    sent = scoring.route_by_uncertainty(u, threshold=0.5)
    np.testing.assert_array_equal(sent, [False, False, True, True])


def test_similar_cases_of_zeros_ties_and_absent_cases():
    cases = jnp.array([[1e30, 0.0], [0.0, 0.0], [1e-30, 0.0], [jnp.nan, 1.0]])
    where = jnp.array([True, True, True, False])
    queries = jnp.array([[2.0, 0.0], [0.0, 0.0]])

    def run(queries):
        found = scoring.similar_cases(queries, cases, k=4, where=where)
        return jnp.where(jnp.isneginf(found.scores), 0, found.scores).sum(), found

    gradient, found = jax.grad(run, has_aux=True)(queries)
    np.testing.assert_array_equal(found.indices, [[0, 2, 1, -1], [0, 1, 2, -1]])
    np.testing.assert_array_equal(found.scores[0, :3], [1, 1, 0])
    np.testing.assert_array_equal(found.scores[1, :3], 0)
    assert np.isfinite(gradient).all()


@pytest.mark.slow
def test_every_transformation():
    random = np.random.default_rng(0)
    z = jnp.asarray(random.normal(size=(8, 3, 4)), jnp.float32)

    def function(z):
        moved = jnp.moveaxis(z, 1, 0)
        return tuple(scoring.ensemble_uncertainty(moved))

    check_transformations(function, z)


@pytest.mark.usefixtures("untyped")
def test_errors_name_the_argument():
    u, z = jnp.ones(4), jnp.ones((2, 3, 4))
    route: Any = scoring.route_by_uncertainty
    for call, error, message in (
        (lambda: scoring.ensemble_uncertainty(z > 0), TypeError, "`logits` must have"),
        (lambda: scoring.ensemble_uncertainty(u), ValueError, "at least 2 axes"),
        (lambda: scoring.ensemble_uncertainty(z[:0]), ValueError, "at least one mem"),
        (lambda: route(u), ValueError, "one of `budget` and `threshold` must"),
        (lambda: route(u, budget=0.5, threshold=1.0), ValueError, "one of `budget`"),
        (lambda: route(u, budget=1.5), ValueError, r"`budget` must be in \[0, 1\]"),
        (lambda: route(u, budget="1"), TypeError, "`budget` must be a Python number"),
        (lambda: route(z, budget=1), ValueError, "must have one axis"),
        (
            lambda: scoring.cascade_curve(u, u[1:], u),
            ValueError,
            "`small_correct` must have shape",
        ),
        (
            lambda: scoring.similar_cases(z, z[0, 0], k=1),
            ValueError,
            r"`cases` must have shape \(N, 4\)",
        ),
        (lambda: scoring.similar_cases(z, z[0], k=4), ValueError, "`k` must be at m"),
    ):
        name = "ensemble_uncertainty|route_by_uncertainty|cascade_curve|similar_cases"
        with pytest.raises(error, match=rf"^({name}): .*{message}"):
            call()
