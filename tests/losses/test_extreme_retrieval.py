"""What decoupled softmax is for: queries with one label and with many in one task."""

import functools

import jax
import numpy as np
import pytest

from tests.heads import of_stored
from tests.host import jnp

QUERIES, LABELS, FEATURES, SCALE, STEPS = 200, 400, 8, 20.0, 400


def task(seed):
    """Of a bilinear score in 16 dimensions the first n_i labels, n_i from 1 to 15."""
    random = np.random.default_rng(seed)
    draw = lambda *shape: random.normal(size=shape)
    scores = draw(QUERIES, 16) @ draw(LABELS, 16).T
    counts = random.integers(1, 16, QUERIES)
    ranks = np.argsort(np.argsort(-scores, axis=1), axis=1)
    return jnp.asarray(ranks < counts[:, None])


def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


@functools.partial(jax.jit, static_argnums=0)
def trained(loss, positives, key):
    """Cosines of free embeddings after 400 steps of Adam."""
    keys = jax.random.split(key)
    shapes = ((QUERIES, FEATURES), (LABELS, FEATURES))
    start = tuple(map(jax.random.normal, keys, shapes))

    def total(embeddings):
        queries, labels = map(unit, embeddings)
        return loss(SCALE * queries @ labels.T, positives).mean()

    def step(carry, i):
        x, m, v = carry
        g = jax.grad(total)(x)
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, g)
        v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, v, g)
        fixed = lambda m, v: (m / (1 - 0.9**i)) / (jnp.sqrt(v / (1 - 0.999**i)) + 1e-8)
        x = jax.tree.map(lambda x, m, v: x - 0.03 * fixed(m, v), x, m, v)
        return (x, m, v), None

    zeros = jax.tree.map(jnp.zeros_like, start)
    steps = jnp.arange(1.0, STEPS + 1)
    (x, _, _), _ = jax.lax.scan(step, (start, zeros, zeros), steps)
    queries, labels = map(unit, x)
    return queries @ labels.T


def r_precision(cosines, positives):
    """Precision at the number of positives."""
    ranks = np.argsort(np.argsort(-cosines, axis=1), axis=1)
    counts = positives.sum(1)
    return float(((ranks < counts[:, None]) & positives).sum(1) @ (1 / counts)) / len(
        counts
    )


def spread(cosines, positives):
    """The mean standard deviation of a query's cosines with its positives."""
    several = positives.sum(1) > 1
    return float(
        np.mean(
            [
                np.std(c[p])
                for c, p in zip(cosines[several], positives[several], strict=True)
            ]
        )
    )


def softmax(scores, positives):
    """The sum over the positives."""
    return of_stored.softmax_cross_entropy(scores, positives.astype(scores.dtype))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_decoupled_finds_more_labels_than_softmax_and_both_than_one_versus_all(seed):
    positives, key = task(seed), jax.random.key(seed)
    found = {
        loss.__name__: np.asarray(trained(loss, positives, key))
        for loss in (
            softmax,
            of_stored.decoupled_softmax_loss,
            of_stored.one_versus_all_loss,
        )
    }
    known = np.asarray(positives)
    scores = [r_precision(cosines, known) for cosines in found.values()]
    spreads = [spread(cosines, known) for cosines in found.values()]
    print(seed, scores, spreads)
    together, decoupled, separate = scores
    assert decoupled > together + 0.02
    assert decoupled > 0.8
    assert together > separate + 0.2
    # Softmax asks for equal scores of all positives, decoupled softmax does not.
    assert spreads[1] > 1.8 * spreads[0]
