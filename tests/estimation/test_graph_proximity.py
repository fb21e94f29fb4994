"""Proximities of graphs: float64 oracle, vectors, range, metrics, edges, errors."""

import functools
import itertools
import math
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
import scipy.linalg
from jax.test_util import check_grads

from softlib.estimation._graph_proximity import KINDS
from softlib.testing import assert_close
from tests.compiled import estimation
from tests.host import jnp

DATA = pathlib.Path(__file__).parent.parent / "data/log_proximity_measures_case0.npz"
NODES = 7
METRICS = ("walk", "forest")


def graph(seed: int, *, symmetric: bool = True) -> np.ndarray:
    """Weights of a random connected graph, some with an edge to themselves."""
    random = np.random.default_rng(seed)
    edges = random.uniform(size=(NODES, NODES)) < 0.3
    edges |= np.eye(NODES, k=1, dtype=bool) | np.eye(NODES, k=1 - NODES, dtype=bool)
    weights = edges * random.uniform(0.2, 2, (NODES, NODES))
    return weights + weights.T if symmetric else weights


def range_of(kind: str, weights: np.ndarray) -> float:
    """Returns where t ends, or a large value of it."""
    spectral_radius = np.abs(np.linalg.eigvals(weights)).max()
    return {"walk": 1 / spectral_radius, "pagerank": 1.0}.get(kind, 3.0)


def plain(kind: str, a: np.ndarray, t: float) -> np.ndarray:
    """By inverses and matrix exponentials in float64."""
    a = np.asarray(a, np.float64)
    laplacian = np.diag(a.sum(1)) - a
    one = np.eye(len(a))
    return {
        "walk": lambda: np.linalg.inv(one - t * a),
        "communicability": lambda: scipy.linalg.expm(t * a),
        "forest": lambda: np.linalg.inv(one + t * laplacian),
        "heat": lambda: scipy.linalg.expm(-t * laplacian),
        "pagerank": lambda: np.linalg.inv(one - t * a / a.sum(1)[:, None]),
    }[kind]()


def test_matches_independent_vectors():
    with jax.enable_x64(), np.load(DATA) as data:
        a = jnp.asarray(data["in_adjacency"])
        check = functools.partial(assert_close, dtype="float64", length=100, c=16)
        for kind, t in zip(KINDS, data["in_t"], strict=True):
            name = "ppr" if kind == "pagerank" else kind
            log_h = estimation.log_graph_proximity(a, kind=kind, t=jnp.asarray(t))
            check(np.exp(log_h), data[f"out_{name}"])
            found = estimation.proximity_distance(log_h)
            check(found.distance, data[f"out_log_distance_{name}"])
            if kind == "communicability":
                found = estimation.proximity_distance(jnp.exp(log_h))
                check(found.distance, data["out_distance_communicability"])


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_matches_its_oracle(kind, dtype):
    with jax.enable_x64(dtype == "float64"):
        for seed, share in ((0, 0.3), (1, 0.98)):
            a = jnp.asarray(graph(seed, symmetric=False), dtype)
            t = jnp.float32(share * range_of(kind, np.asarray(a, np.float64)))
            found = estimation.log_graph_proximity(a, kind=kind, t=t)
            assert found.dtype == jnp.promote_types(dtype, jnp.float32)
            wanted = np.log(plain(kind, np.asarray(a, np.float64), float(t)))
            # The condition number of a walk near its end is 50; rounding errors of an
            # exponential are those of an exponent of 20.
            c = {"walk": 400, "communicability": 200, "heat": 200}.get(kind, 16)
            assert_close(found, wanted, dtype=found.dtype, length=NODES, c=c)


@pytest.mark.parametrize("kind", METRICS)
def test_logarithms_are_metrics(kind):
    for seed, share in itertools.product(range(8), (0.1, 0.9)):
        a = graph(seed)
        t: Any = jnp.float32(share * range_of(kind, a))
        a = jnp.asarray(a, jnp.float32)
        log_h = estimation.log_graph_proximity(a, kind=kind, t=t)
        assert estimation.proximity_distance(log_h).triangle_excess <= 2e-6


def test_the_excess_is_the_greatest_over_triples():
    d = np.random.default_rng(0).uniform(size=(5, 5))
    found = estimation.proximity_distance(jnp.asarray(d))
    d = np.asarray(found.distance)
    triples = itertools.permutations(range(5), 3)
    wanted = max(d[i, k] - d[i, j] - d[j, k] for i, j, k in triples)
    assert wanted > 0
    assert_close(found.triangle_excess, wanted, dtype="float32", length=3)
    # Communicability is no metric in logarithms.
    path = jnp.asarray(np.eye(5, k=1) + np.eye(5, k=-1), jnp.float32)
    log_h = estimation.log_graph_proximity(path, kind="communicability", t=0.1)
    assert estimation.proximity_distance(log_h).triangle_excess > 0.1


@pytest.mark.parametrize("kind", METRICS)
def test_distances_add_up_at_a_node_that_every_path_passes(kind):
    """In a path of nodes with different weights that is every node between."""
    weights = np.diag([0.3, 1.0, 2.0, 0.5], 1)
    a = jnp.asarray(weights + weights.T, jnp.float32)
    log_h = estimation.log_graph_proximity(a, kind=kind, t=jnp.float32(0.3))
    d = np.asarray(estimation.proximity_distance(log_h).distance)
    np.testing.assert_allclose(d[0, 4], np.diagonal(d, 1).sum(), rtol=1e-5)


# ---------------------------------------------------------------------------- promises
def test_nodes_beyond_the_range_of_floats_keep_their_proximity():
    a = jnp.asarray(np.eye(60, k=1) + np.eye(60, k=-1), jnp.float32)
    first = lambda kind: 59 * math.log(0.01) - (kind == "heat") * 0.02
    for kind in ("communicability", "heat"):
        log_h = estimation.log_graph_proximity(a, kind=kind, t=0.01)
        wanted = first(kind) - math.lgamma(60)
        np.testing.assert_allclose(log_h[0, -1], wanted, rtol=1e-4)
        if kind == "communicability":
            large = estimation.log_graph_proximity(a, kind=kind, t=jnp.float32(500.0))
            assert 980 < large[0, 0] < 1000
    # Of a path: the product of the continued fraction's pivots.
    log_h = estimation.log_graph_proximity(a, kind="walk", t=0.01)
    pivots = [1.0]
    for _ in range(59):
        pivots.append(1 - 1e-4 / pivots[-1])
    wanted = 59 * math.log(0.01) - np.log(pivots).sum()
    np.testing.assert_allclose(log_h[0, -1], wanted, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_no_path_is_infinitely_far(kind):
    a = np.zeros((4, 4), np.float32)
    a[0, 1] = a[1, 0] = 1
    log_h = estimation.log_graph_proximity(jnp.asarray(a), kind=kind, t=0.5)
    reached = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], bool)
    np.testing.assert_array_equal(np.isfinite(log_h), reached)
    np.testing.assert_allclose(np.diagonal(log_h)[2:], [0, 0], atol=1e-6)
    found = estimation.proximity_distance(log_h)
    np.testing.assert_array_equal(np.isfinite(found.distance), reached)
    assert found.triangle_excess == -np.inf
    slope = jax.grad(
        lambda a: jnp.where(
            reached, estimation.log_graph_proximity(a, kind=kind, t=0.5), 0
        ).sum()
    )(jnp.asarray(a))
    assert jnp.isfinite(slope).all()
    assert (np.asarray(slope)[a == 0] == 0).all()


def test_what_is_out_of_range_is_nan():
    ring = jnp.asarray(graph(0), jnp.float32)
    run = estimation.log_graph_proximity
    for kind, t in (("walk", 5.0), ("pagerank", 1.0), ("communicability", 1e8)):
        assert jnp.isnan(run(ring, kind=kind, t=jnp.float32(t))).all(), kind
    for kind in KINDS:
        assert jnp.isnan(run(ring, kind=kind, t=jnp.float32(-0.1))).all()
        assert jnp.isnan(run(ring.at[0, 1].set(-1), kind=kind, t=0.01)).all()


@pytest.mark.parametrize("kind", ["walk", "forest", "heat"])
def test_derivatives_are_those_of_differences(kind):
    with jax.enable_x64():
        a = jnp.asarray(np.random.default_rng(0).uniform(0.5, 1.5, (3, 3)))
        t = jnp.asarray(0.2)
        run = lambda a, t: estimation.log_graph_proximity(a, kind=kind, t=t)
        check_grads(jax.jit(run), (a, t), order=1)


def test_graphs_and_parameters_in_a_batch():
    a = jnp.asarray(np.stack([graph(s) for s in range(2)]), jnp.float32)
    t = jnp.array([0.1, 0.7])
    for kind in ("forest", "communicability"):
        run = functools.partial(estimation.log_graph_proximity, kind=kind)
        found = jax.vmap(lambda a, t, run=run: run(a, t=t))(a, t)
        for i in range(2):
            np.testing.assert_allclose(found[i], run(a[i], t=t[i]), atol=1e-5)


@pytest.mark.usefixtures("untyped")
def test_errors_name_the_argument():
    run: Any = estimation.log_graph_proximity
    a = jnp.ones((2, 2))
    with pytest.raises(ValueError, match=r"^log_graph_proximity: `adjacency` .* \(n"):
        run(jnp.ones((2, 3)), kind="walk", t=0.1)
    with pytest.raises(
        ValueError, match=r"^log_graph_proximity: `kind` must be one of"
    ):
        run(a, kind="commute", t=0.1)
    with pytest.raises(ValueError, match=r"`t` must be >= 0, got -1"):
        run(a, kind="walk", t=-1.0)
    with pytest.raises(TypeError, match=r"^proximity_distance: `proximity` must have"):
        estimation.proximity_distance(jnp.ones((2, 2), int))
