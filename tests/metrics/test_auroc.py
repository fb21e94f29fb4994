"""The area under the curve against all pairs."""

import jax
import numpy as np
import pytest

from softlib import metrics
from softlib.testing import assert_close
from tests.host import jnp

auroc = jax.jit(metrics.auroc)


def oracle(scores, labels):
    pairs = [(p, n) for p in scores[labels] for n in scores[~labels]]
    return np.mean([(p > n) + 0.5 * (p == n) for p, n in pairs])


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("seed", range(3))
def test_matches_oracle_with_ties_and_infinities(dtype, seed):
    random = np.random.default_rng(seed)
    scores = random.integers(-3, 4, 41).astype(float)
    scores[:4] = np.inf, np.inf, -np.inf, -np.inf
    labels = random.uniform(size=41) < 0.3
    labels[:4] = True, False, True, False
    with jax.enable_x64(dtype == "float64"):
        found = auroc(jnp.asarray(scores, dtype), jnp.asarray(labels))
        computed = jnp.promote_types(dtype, jnp.float32)
        assert found.dtype == computed
        assert_close(found, oracle(scores, labels), dtype=computed, length=41)
        # What does not count may hold anything.
        where = np.append(np.ones(41, bool), [False, False])
        more = jnp.asarray(np.append(scores, [np.nan, 9.0]), dtype)
        again = auroc(more, jnp.asarray(np.append(labels, [True, False])), where=where)
        assert_close(again, found, dtype=computed, length=41)


def test_many_scores_are_counted_exactly_enough():
    """More pairs than float32 has integers."""
    n = 100_000
    scores = np.random.default_rng(0).permutation(n)
    labels = scores % 2 == 1
    wanted = (n // 2 + 1) / 2 / (n // 2)
    found = auroc(jnp.asarray(scores, jnp.float32), jnp.asarray(labels))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_nothing_to_rank_is_a_half():
    scores = jnp.array([1.0, 2.0])
    assert auroc(scores, jnp.array([1, 1])) == 0.5
    assert auroc(scores, jnp.array([0, 0])) == 0.5
    assert auroc(scores, jnp.array([0, 1]), where=jnp.array(False)) == 0.5
    assert auroc(jnp.zeros(0), jnp.zeros(0, bool)) == 0.5


def test_a_score_that_is_nan_makes_it_nan():
    assert np.isnan(auroc(jnp.array([1.0, jnp.nan]), jnp.array([0, 1])))


@pytest.mark.usefixtures("untyped")
def test_errors():
    with pytest.raises(ValueError, match=r"^auroc: `scores` must be \(n,\)"):
        metrics.auroc(jnp.zeros((2, 2)), jnp.zeros((2, 2), int))
