"""Similarity depth, distance quantile, DKW radius: oracle, vectors, edges, errors."""

import pathlib

import jax
import numpy as np
import pytest

from softlib import numerics as library
from tests.compiled import compiled
from tests.host import jnp
from tests.oracles import similarity as oracle

DATA = pathlib.Path(__file__).parent.parent / "data"
INF, NAN = jnp.inf, jnp.nan
distance_quantile = compiled(library.distance_quantile)
dkw_radius = compiled(library.dkw_radius)
similarity_depth = compiled(library.similarity_depth)


def test_vectors():
    with np.load(DATA / "sdm_case0.npz") as data, jax.enable_x64(True):
        of = lambda name: jnp.asarray(data[name])
        prediction = of("in_logits").argmax(-1)
        keys = of("in_keys"), prediction, of("in_key_pred"), of("in_key_labels")
        q, nearest = jax.jit(similarity_depth)(of("in_embeddings"), *keys)
        np.testing.assert_array_equal(q, data["out_q"])
        np.testing.assert_allclose(nearest, data["out_nearest"], rtol=1e-13)
        known, labels = of("in_cal_nearest"), of("in_cal_labels")
        where = of("in_cal_q") > 0
        d = distance_quantile(nearest, known, labels, num_classes=3, where=where)
        np.testing.assert_allclose(d, data["out_d"], rtol=1e-13)
        radius = dkw_radius(jnp.array([0, 5, 50]), alpha=0.95)
        np.testing.assert_allclose(radius, data["out_dkw_n_0_5_50"], rtol=1e-6)


@pytest.mark.parametrize("max_depth", [None, 4, 99])
def test_depth_matches_oracle_with_duplicates_and_excluded_keys(max_depth):
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 4, (30, 2)).astype("f4")  # many equal distances
    queries = np.concatenate([keys[:6], rng.integers(0, 4, (6, 2)).astype("f4")])
    labels = (keys.sum(1) > 3).astype(int)
    prediction = np.where(rng.random(30) < 0.2, 1 - labels, labels)
    query_prediction = (queries.sum(1) > 3).astype(int)
    exclude = np.array([*range(6), -1, -1, -1, 99, 0, 1])
    arguments = queries, keys, query_prediction, prediction, labels
    expected, nearest = oracle.similarity_depth(*arguments, exclude)
    call = jax.jit(similarity_depth, static_argnames="max_depth")
    arrays = [jnp.asarray(x) for x in arguments]
    q, found = call(*arrays, exclude_index=jnp.asarray(exclude), max_depth=max_depth)
    assert q.dtype == jnp.int32
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(q, np.minimum(expected, max_depth or 30))
    np.testing.assert_allclose(found, nearest, rtol=1e-6)


def test_a_duplicate_of_the_query_is_not_the_query():
    keys = jnp.array([[1.0], [1.0], [5.0]])
    one = jnp.ones(3, int)
    depth = lambda index: similarity_depth(
        keys[:1], keys, one[:1], one, one, exclude_index=jnp.array([index])
    )
    assert [int(x[0]) for x in depth(0)] == [2, 0]
    assert [int(x[0]) for x in depth(-1)] == [3, 0]


def test_missing_keys_nan_and_no_keys():
    keys = jnp.array([[1.0], [2.0], [NAN]])
    one = jnp.ones(3, int)
    queries = jnp.array([[0.0], [NAN]])
    where = jnp.array([False, True, True])
    q, nearest = similarity_depth(queries, keys, one[:2], one, one, where=where)
    assert q.tolist() == [1, 0]
    assert nearest[0] == 2
    assert jnp.isnan(nearest[1])
    none = jnp.zeros((0, 1)), one[:1], one[:0], one[:0]
    q, nearest = similarity_depth(queries[:1], *none)
    assert (q[0], nearest[0]) == (0, INF)
    for gradient in jax.grad(
        lambda a, b: similarity_depth(a, b, one[:1], one, one)[1].sum(), (0, 1)
    )(queries[:1], keys):
        assert not gradient.any()


def test_quantile_matches_oracle():
    rng = np.random.default_rng(1)
    known = rng.integers(0, 9, 40).astype("f4")  # many equal distances
    labels, where = rng.integers(0, 3, 40), rng.random(40) < 0.8
    nearest = np.concatenate([np.arange(10), [0.5, 8.5, np.inf]]).astype("f4")
    expected = oracle.distance_quantile(nearest, known, labels, where, 3)
    arrays = [jnp.asarray(x) for x in (nearest, known, labels)]
    call = jax.jit(distance_quantile, static_argnames="num_classes")
    found = call(*arrays, num_classes=3, where=jnp.asarray(where))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found[0] == 1
    assert found[-1] == 0
    batched = call(arrays[0][:12].reshape(3, 4), *arrays[1:], num_classes=3)
    assert batched.shape == (3, 4)


def test_quantile_of_empty_classes_and_nan():
    known, labels = jnp.array([1.0, 2, NAN]), jnp.array([0, 0, 1])
    nearest = jnp.array([0.5, NAN])
    one = distance_quantile(nearest, known, labels, num_classes=1)
    assert one[0] == 1
    assert jnp.isnan(one[1])
    assert distance_quantile(nearest, known, labels, num_classes=2)[0] == 0
    none = jnp.zeros(0), jnp.zeros(0, int)
    assert distance_quantile(nearest, *none, num_classes=1)[0] == 0


def test_radius():
    radius = dkw_radius(jnp.array([0.0, 1, 2, 1000, -1, NAN]), alpha=jnp.float32(0.9))
    expected = np.sqrt(np.log(20) / 2000)
    np.testing.assert_allclose(radius[:4], [1, 1, np.sqrt(np.log(20) / 4), expected])
    assert jnp.isnan(radius[4:]).all()
    slopes = jax.grad(lambda n: dkw_radius(n).sum())(jnp.array([0.0, 1.0, 100.0]))
    np.testing.assert_allclose(slopes, [0, 0, -float(dkw_radius(100)) / 200], rtol=1e-5)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: dkw_radius(3, alpha=1.0), ValueError, r"`alpha` must be in \(0, 1\)"),
        (lambda: dkw_radius(3, alpha=2.0), ValueError, r"`alpha` must be in \[0, 1\]"),
        (
            lambda: distance_quantile(
                jnp.zeros(2), jnp.zeros(3), jnp.zeros(2, int), num_classes=2
            ),
            ValueError,
            r"`calibration_labels` must have shape \(3,\)",
        ),
        (
            lambda: similarity_depth(
                jnp.zeros((2, 3)), jnp.zeros((4, 2)), *[jnp.zeros(4, int)] * 3
            ),
            ValueError,
            r"`keys` must have shape \(4, 3\)",
        ),
        (
            lambda: similarity_depth(
                jnp.zeros((4, 2)),
                jnp.zeros((4, 2)),
                *[jnp.zeros(4, int)] * 3,
                max_depth=0,
            ),
            ValueError,
            "`max_depth` must be at least 1",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
