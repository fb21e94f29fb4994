"""Edges drawn at random that a graph does not have."""

import jax
import numpy as np
import pytest

from softlib import numerics
from tests.host import jnp

draw = jax.jit(
    numerics.sample_negative_edges, static_argnames=("num_nodes", "num_samples")
)


def test_what_the_graph_has_is_marked():
    random = np.random.default_rng(0)
    src, dst = random.integers(0, 9, (2, 40))
    where = random.uniform(size=40) < 0.7
    real = set(zip(src[where], dst[where], strict=True))
    found = draw(jax.random.key(0), src, dst, num_nodes=9, num_samples=500, where=where)
    pairs = list(zip(found.src.tolist(), found.dst.tolist(), strict=True))
    wanted = [pair not in real for pair in pairs]
    np.testing.assert_array_equal(found.where, wanted)
    assert 0 < sum(wanted) < 500
    assert set(found.src.tolist()) == set(src[where].tolist())


def test_first_nodes_are_those_of_edges_and_second_ones_uniform():
    src, dst = jnp.array([5, 5, 5, 2]), jnp.array([0, 1, 2, 3])
    n = 20_000
    found = draw(jax.random.key(1), src, dst, num_nodes=6, num_samples=n)
    np.testing.assert_allclose((found.src == 5).mean(), 0.75, atol=5 * 0.43 / n**0.5)
    shares = np.bincount(found.dst, minlength=6) / n
    np.testing.assert_allclose(shares, np.full(6, 1 / 6), atol=5 * 0.37 / n**0.5)


def test_ids_may_be_large():
    """A product of them would overflow."""
    n = 2**30
    src, dst = jnp.array([n, n]), jnp.array([0, 1])
    found = draw(jax.random.key(2), src, dst, num_nodes=2, num_samples=5)
    np.testing.assert_array_equal(found.where, np.zeros(5))


def test_no_edge_to_draw_from():
    ids = jnp.array([1, 2])
    found = draw(
        jax.random.key(0), ids, ids, num_nodes=3, num_samples=4, where=jnp.array(False)
    )
    np.testing.assert_array_equal(found.where, np.zeros(4))
    found = draw(jax.random.key(0), ids[:0], ids[:0], num_nodes=3, num_samples=4)
    np.testing.assert_array_equal(found.where, np.zeros(4))


@pytest.mark.usefixtures("untyped")
def test_errors():
    ids = jnp.array([1, 2])
    with pytest.raises(
        ValueError, match=r"^sample_negative_edges: `num_samples` must be"
    ):
        numerics.sample_negative_edges(
            jax.random.key(0), ids, ids, num_nodes=3, num_samples=0
        )
