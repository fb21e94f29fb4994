"""Clusters of one size."""

import functools

import jax
import numpy as np
import pytest

from softlib.numerics import balanced_kmeans
from tests.host import jnp

clusters_of = functools.partial(jax.jit, static_argnums=1)(
    lambda x, size, key: balanced_kmeans(x, size, key=key)
)


def points(count, features=4, seed=0, dtype=jnp.float32):
    random = np.random.default_rng(seed)
    return jnp.asarray(random.normal(size=(count, features)), dtype)


@pytest.mark.parametrize(
    ("count", "size"),
    [(1, 3), (5, 1), (3, 2), (13, 4), (64, 16), (40, 100)],
)
def test_every_point_once_in_clusters_of_nearly_one_size(count, size):
    found = np.asarray(
        clusters_of(points(count, dtype=jnp.bfloat16), size, jax.random.key(0))
    )
    sizes = (found >= 0).sum(1)
    assert sorted(found[found >= 0]) == list(range(count))
    assert sizes.max() <= size
    assert sizes.min() >= 1
    assert sizes.max() - sizes.min() <= 1
    assert found.dtype == np.int32
    # -1 stands at the end.
    assert (np.diff((found < 0).astype(int), axis=1) >= 0).all()
    number = 1
    while -(-count // number) > size:
        number *= 2
    assert len(found) == (count if size == 1 else number)


def test_the_key_decides():
    x = points(64)
    one, same, other = (clusters_of(x, 8, jax.random.key(i)) for i in (0, 0, 3))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


@pytest.mark.parametrize("seed", range(5))
def test_separated_blobs_are_never_mixed(seed):
    random = np.random.default_rng(seed)
    means = np.eye(4)[np.arange(32) % 4]
    x = jnp.asarray(means + 0.05 * random.normal(size=(32, 4)), jnp.float32)
    for size in (4, 8):
        found = np.asarray(clusters_of(x, size, jax.random.key(seed))) % 4
        assert (found == found[:, :1]).all()


def test_scale_does_not_count_and_zeros_and_nan_are_somewhere():
    x = points(16)
    key = jax.random.key(0)
    scales = jnp.exp2(jnp.arange(16) % 5)[:, None]  # exact
    np.testing.assert_array_equal(
        clusters_of(x, 4, key), clusters_of(x * scales, 4, key)
    )
    bad = x.at[3].set(0).at[5].set(jnp.nan)
    assert sorted(np.asarray(clusters_of(bad, 4, key)).ravel()) == list(range(16))


@pytest.mark.usefixtures("untyped")
def test_wrong_arguments_are_named():
    key = jax.random.key(0)
    for call, error, message in (
        (lambda: balanced_kmeans(points(4), 0, key=key), ValueError, "`cluster_size`"),
        (
            lambda: balanced_kmeans(points(4), 2, key=key, num_steps=0),
            ValueError,
            "`num_steps` must be at least 1, got 0",
        ),
        (
            lambda: balanced_kmeans(jnp.zeros(3), 2, key=key),
            ValueError,
            "`x` must have",
        ),
        (
            lambda: balanced_kmeans(jnp.zeros((3, 2), int), 2, key=key),
            TypeError,
            "`x` must have a floating",
        ),
    ):
        with pytest.raises(error, match=f"balanced_kmeans: {message}"):
            call()
