"""Graph convolutions, dense and of lists of edges, and what is made of them."""

import functools
import pathlib

import jax
import numpy as np
import pytest

from softlib import attention, losses, nn
from softlib.testing import assert_close, check_transformations
from tests.compiled import compiled
from tests.host import jnp

DATA = pathlib.Path(__file__).parent.parent / "data/glad_case0.npz"
gcn_propagate = compiled(nn.gcn_propagate)
gcn_propagate_edges = compiled(nn.gcn_propagate_edges)


def oracle(adjacency, x, self_loops=True):
    """Node by node, pair by pair, in float64."""
    weights = np.array(adjacency, np.float64)
    if self_loops:
        weights += np.eye(len(weights))
    degrees = weights.sum(1)
    found = np.zeros(x.shape)
    for u, v in zip(*np.nonzero(weights), strict=True):
        found[u] += weights[u, v] * x[v] / np.sqrt(degrees[u] * degrees[v])
    return found


def problem(seed=0, nodes=7, features=3):
    """A graph with an isolated node, an edge with a weight on one side, and a loop."""
    random = np.random.default_rng(seed)
    adjacency = random.uniform(size=(nodes, nodes)) * (
        random.uniform(size=(nodes, nodes)) < 0.4
    )
    adjacency = np.triu(adjacency, 1)
    adjacency += adjacency.T
    adjacency[-1], adjacency[:, -1] = 0, 0
    adjacency[0, 0] = 2
    return adjacency, random.normal(size=(nodes, features))


@pytest.mark.parametrize("self_loops", [True, False])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_matches_oracle(dtype, self_loops):
    with jax.enable_x64(dtype == "float64"):
        adjacency, x = (jnp.asarray(each, dtype) for each in problem())
        exact = [np.asarray(each, np.float64) for each in (adjacency, x)]
        wanted = oracle(exact[0], exact[1], self_loops)
        found = gcn_propagate(adjacency, x, self_loops=self_loops)
        computed = jnp.promote_types(dtype, jnp.float32)
        assert found.dtype == computed
        assert_close(found, wanted, dtype=computed, length=7)
        src, dst = np.nonzero(exact[0])
        weight = adjacency[src, dst]
        edges = gcn_propagate_edges(x, src, dst, weight, self_loops=self_loops)
        assert_close(edges, wanted, dtype=computed, length=7)


def test_matches_independent_vectors():
    """Layers, attention of each node over time, scores of edges, and their loss."""
    with jax.enable_x64():
        data = {name: jnp.asarray(array) for name, array in np.load(DATA).items()}
        close = functools.partial(assert_close, dtype="float64", length=8)

        @jax.jit
        def model(data):
            rows = nn.gcn_propagate(data["in_adj"], data["in_x"])
            hidden = jax.nn.relu(rows @ data["in_gcn_kernel"])
            query = (hidden[-1] @ data["in_q"])[:, None, None]
            key, value = (
                jnp.swapaxes(hidden @ data[name], 0, 1)[:, :, None]
                for name in ("in_k", "in_v")
            )
            nodes = attention.dot_product_attention(query, key, value)[:, 0, 0]
            pair = nodes[data["in_src"]], nodes[data["in_dst"]]
            logit = jnp.einsum("ed,df,ef->e", pair[0], data["in_bilinear"], pair[1])
            logit *= data["in_scale"]
            loss = losses.edge_reconstruction_loss(logit, data["in_normal"])
            return hidden, nodes, logit, loss

        for found, name in zip(
            model(data), ("hidden", "nodes", "logit", "loss"), strict=True
        ):
            close(found, data[f"out_{name}"])


def test_nodes_may_have_any_order():
    adjacency, x = problem()
    order = np.random.default_rng(1).permutation(len(x))
    moved = gcn_propagate(
        jnp.asarray(adjacency[order][:, order]), jnp.asarray(x[order])
    )
    found = gcn_propagate(jnp.asarray(adjacency), jnp.asarray(x))
    assert_close(moved, found[order], dtype="float32", length=7)


def test_an_isolated_node_has_nothing_or_itself():
    adjacency, x = (jnp.asarray(each) for each in problem())
    np.testing.assert_array_equal(gcn_propagate(adjacency, x, self_loops=False)[-1], 0)
    np.testing.assert_array_equal(gcn_propagate(adjacency, x)[-1], x[-1])

    def total(adjacency):
        return nn.gcn_propagate(adjacency, x, self_loops=False).sum()

    assert np.isfinite(jax.jit(jax.grad(total))(adjacency)).all()


def test_edges_that_do_not_count_may_hold_anything():
    adjacency, x = problem()
    src, dst = np.nonzero(adjacency)
    weight = adjacency[src, dst]
    plain = gcn_propagate_edges(jnp.asarray(x), src, dst, jnp.asarray(weight))
    more = lambda array, *rest: jnp.asarray(np.append(array, rest))
    where = more(np.ones(len(src), bool), False, False, True, True).astype(bool)
    found = gcn_propagate_edges(
        jnp.asarray(x),
        more(src, 0, -100, -1, 0),
        more(dst, 0, 3, 2, 7),
        more(weight, np.nan, 1, 1, 1),
        where=where,
    )
    np.testing.assert_array_equal(found, plain)


def test_transformations():
    adjacency, x = (jnp.asarray(each, jnp.float32) for each in problem(2, 4, 2))
    batch = jnp.stack([adjacency[:3, :3]] * 4) + 0.5
    features = jnp.stack([x[:3], 2 * x[:3], -x[:3], x[1:]])
    check_transformations(nn.gcn_propagate, batch, features, rows=(0, 1))


@pytest.mark.usefixtures("untyped")
def test_errors():
    x = jnp.zeros((3, 2))
    with pytest.raises(ValueError, match=r"^gcn_propagate: `adjacency` must end in"):
        nn.gcn_propagate(jnp.zeros((3, 2)), x)
    with pytest.raises(ValueError, match=r"^gcn_propagate: the batch axes of `x` must"):
        nn.gcn_propagate(jnp.zeros((2, 3, 3)), jnp.zeros((4, 3, 2)))
    ids = jnp.zeros(4, int)
    with pytest.raises(ValueError, match=r"^gcn_propagate_edges: `dst` must have"):
        nn.gcn_propagate_edges(x, ids, ids[:3])
    with pytest.raises(ValueError, match=r"^gcn_propagate_edges: `x` must be"):
        nn.gcn_propagate_edges(x[0], ids, ids)
