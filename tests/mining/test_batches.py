"""Batches with hard negatives: clusters, draws, positives, and what is in them."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from softlib import mining
from softlib.numerics import balanced_kmeans
from tests.host import jnp


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 2**31),
    shape=st.sampled_from([(1, 1), (5, 2), (4, 4), (7, 3)]),
    batch_size=st.sampled_from([1, 3, 8]),
)
def test_batches_hold_each_point_once_in_whole_clusters(seed, shape, batch_size):
    number, size = shape
    random = np.random.default_rng(seed)
    clusters = np.arange(number * size).reshape(shape)
    clusters[random.uniform(size=number) < 0.5, -1] = -1
    batches = _batches(jnp.asarray(clusters), jax.random.key(seed), batch_size)
    flat = np.asarray(batches).reshape(-1)
    points = flat[flat >= 0]
    assert batches.shape[1] == batch_size
    assert sorted(points) == sorted(clusters[clusters >= 0])
    assert (flat[len(points) :] == -1).all()
    place = {point: i for i, point in enumerate(points)}
    for cluster in clusters:
        members = [place[point] for point in cluster if point >= 0]
        assert (
            members == list(range(members[0], members[0] + len(members)))
            if (members)
            else True
        )


_batches = jax.jit(
    lambda clusters, key, size: mining.ngame_batches(
        clusters, batch_size=size, key=key
    ),
    static_argnums=2,
)


def test_batches_depend_on_the_key_alone():
    clusters = jnp.arange(64)[:, None]
    one, same, other = (_batches(clusters, jax.random.key(i), 8) for i in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


def test_drawn_positives_are_uniform_and_none_is_minus_one():
    positives = jnp.array([[4, -1, 9], [-1, -1, -1], [-1, 2, -1]])
    keys = jax.random.split(jax.random.key(0), 2000)
    draw = jax.jit(jax.vmap(lambda key: mining.draw_positives(key, positives)))
    drawn = np.asarray(draw(keys))
    np.testing.assert_array_equal(np.unique(drawn[:, 0]), [4, 9])
    assert (drawn[:, 0] == 4).mean() == pytest.approx(0.5, abs=0.06)
    np.testing.assert_array_equal(drawn[:, 1:], [[-1, 2]] * 2000)
    none = mining.draw_positives(keys[0], jnp.zeros((3, 0), int))
    np.testing.assert_array_equal(none, -1)


def test_positives_of_a_batch_are_found_off_the_diagonal_too():
    positives = jnp.array([[0, 2, -1], [1, -1, -1], [2, 0, 1], [3, -1, -1]])
    labels = jnp.array([0, 1, 2, -1])
    found = mining.in_batch_positives(positives, labels)
    wanted = [[1, 0, 1, 0], [0, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    np.testing.assert_array_equal(found, np.array(wanted, bool))


def test_recall_counts_what_is_in_the_batch():
    random = np.random.default_rng(0)
    x, y = random.normal(size=(12, 3)), random.normal(size=(12, 3))
    positives = random.uniform(size=(12, 12)) < 0.2
    batches = np.append(random.permutation(12)[:11], -1).reshape(3, 4)
    found = mining.hard_negative_recall(
        jnp.asarray(x, jnp.float32),
        jnp.asarray(y, jnp.float32),
        jnp.asarray(batches),
        num_negatives=4,
        positives=jnp.asarray(positives),
    )
    for i in range(12):
        others = [j for j in range(12) if j != i and not positives[i, j]]
        hardest = sorted(others, key=lambda j: -x[i] @ y[j])[:4]
        own = next((set(b) for b in batches.tolist() if i in b), set())
        wanted = len(own & set(hardest)) / len(hardest)
        assert found[i] == pytest.approx(wanted, abs=1e-6)


def test_larger_clusters_hold_more_of_the_hardest_negatives():
    """The claim of the paper, on 32 Gaussian blobs in 16 dimensions."""
    random = np.random.default_rng(0)
    means = random.normal(size=(32, 16))
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    x = means[np.arange(512) % 32] + 0.6 / 4 * random.normal(size=(512, 16))
    x = jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), jnp.float32)
    found = []
    for size in (1, 8, 64):
        clusters = jax.jit(balanced_kmeans, static_argnums=1)(
            x, size, key=jax.random.key(0)
        )
        batches = mining.ngame_batches(clusters, batch_size=64, key=jax.random.key(1))
        share = jax.jit(mining.hard_negative_recall)(x, x, batches).mean()
        found.append(float(share))
    assert found[0] == pytest.approx(64 / 512, abs=0.02)
    assert found == sorted(found)
    assert found[2] > 4 * found[0]


@pytest.mark.usefixtures("untyped")
def test_wrong_batches_are_named():
    for call, message in (
        (
            lambda: mining.ngame_batches(
                jnp.arange(4), batch_size=2, key=jax.random.key(0)
            ),
            r"ngame_batches: `clusters` must have shape \(clusters, size\), got \(4,\)",
        ),
        (
            lambda: mining.hard_negative_recall(
                jnp.eye(3), jnp.eye(3), jnp.zeros((1, 3), int), num_negatives=3
            ),
            "hard_negative_recall: `num_negatives` must be below the number of .* 3",
        ),
        (
            lambda: mining.in_batch_positives(jnp.zeros((2, 1), int), jnp.array(0)),
            "in_batch_positives: `labels` must have one axis",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(
        TypeError, match="in_batch_positives: `labels` must have an int"
    ):
        mining.in_batch_positives(jnp.zeros((2, 1), int), jnp.zeros(3))
