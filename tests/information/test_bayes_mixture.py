"""Bayesian mixtures: float64 oracle, vectors, guarantees, edges, errors."""

import functools
import itertools
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.test_util import check_grads

from softlib.testing import assert_close
from tests.compiled import information
from tests.host import jnp

DATA = pathlib.Path(__file__).parent.parent / "data/universality_lens_case0.npz"


def problem(seed: int = 0, dtype: Any = "float32") -> Any:
    random = np.random.default_rng(seed)
    values = np.log(random.uniform(0.05, 1, (2, 9, 5)))
    return jnp.asarray(values, dtype), jnp.asarray(random.normal(size=5), dtype)


def oracle(values, prior):
    """Products of probabilities in float64, for one sequence."""
    weights = np.exp(np.asarray(prior, np.float64))
    weights /= weights.sum()
    likelihoods, predictive, posterior = np.exp(np.asarray(values, np.float64)), [], []
    for row in likelihoods:
        predictive.append(weights @ row)
        weights = weights * row / predictive[-1]
        posterior.append(weights)
    return np.log(predictive), np.log(posterior)


def test_matches_independent_vectors():
    with jax.enable_x64(), np.load(DATA) as data:
        check = functools.partial(assert_close, dtype="float64", length=40)
        values, prior = jnp.asarray(data["in_loglik"]), jnp.asarray(data["in_logprior"])
        found = information.sequential_mixture(values, prior)
        check(found.log_predictive, data["out_predictive"])
        check(found.log_posterior, data["out_log_posterior"])
        check(found.regret.max(), data["out_regret_vs_best"])
        kl = jnp.asarray(data["in_kl"])
        bound = information.redundancy_bound(kl, prior, num_samples=40)
        check(bound.bound, data["out_redundancy_bound"])


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_matches_its_oracle(dtype):
    with jax.enable_x64(dtype == "float64"):
        values, prior = problem(dtype=dtype)
        found = information.sequential_mixture(values, prior)
        assert found.regret.dtype == jnp.promote_types(dtype, jnp.float32)
        check = functools.partial(assert_close, dtype=found.regret.dtype, length=9)
        log_prior = np.asarray(prior, np.float64)
        log_prior = log_prior - np.log(np.exp(log_prior).sum())
        for i in range(2):
            predictive, posterior = oracle(values[i], prior)
            check(found.log_predictive[i], predictive)
            check(found.log_posterior[i], posterior)
            own = np.asarray(values[i], np.float64).sum(0)
            check(found.regret[i], own - predictive.sum())
        check(found.regret_bound, -log_prior)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31), sharp=st.sampled_from([1.0, 30.0]))
def test_no_sequence_exceeds_the_regret_bound(seed, sharp):
    values, prior = problem(seed)
    found = information.sequential_mixture(sharp * values, sharp * prior)
    most = np.asarray(found.regret_bound) + 2e-5 * sharp
    assert (np.asarray(found.regret) <= most).all()


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31))
def test_the_expected_redundancy_is_within_its_bounds(seed):
    """Exactly, over all sequences of eight flips."""
    random = np.random.default_rng(seed)
    heads, truth = random.uniform(0.02, 0.98, 5), random.uniform(0.05, 0.95)
    prior = 2 * random.normal(size=5)
    flips = np.array(list(itertools.product([0, 1], repeat=8)))
    values = np.log(np.where(flips[..., None], heads, 1 - heads))
    own = np.log(np.where(flips, truth, 1 - truth)).sum(1)
    found = information.sequential_mixture(f32(values), f32(prior))
    total = np.asarray(found.log_predictive, np.float64).sum(1)
    redundancy = (np.exp(own) * (own - total)).sum() / 8
    kl = truth * np.log(truth / heads) + (1 - truth) * np.log((1 - truth) / (1 - heads))
    bound = information.redundancy_bound(f32(kl), f32(prior), num_samples=8)
    assert redundancy <= bound.mixture_bound + 1e-5
    assert bound.mixture_bound <= bound.bound + 1e-6
    weights = np.exp(prior) / np.exp(prior).sum()
    balls = [r - np.log(weights[kl <= r].sum()) / 8 for r in kl]
    assert_close(bound.bound, min(balls), dtype="float32", length=8)
    assert_close(bound.radius, kl[np.argmin(balls)], dtype="float32", length=8)


def f32(x: Any) -> Any:
    return jnp.asarray(x, jnp.float32)


# ---------------------------------------------------------------------------- promises
def test_observations_that_do_not_count_change_nothing():
    values, prior = problem()
    where = np.ones((2, 9), bool)
    where[0, 3] = where[1, 7:] = False
    dirty = jnp.where(where[..., None], values, jnp.nan)
    found = information.sequential_mixture(dirty, prior, where=jnp.asarray(where))
    assert (found.log_predictive[~where] == 0).all()
    np.testing.assert_array_equal(found.log_posterior[0, 3], found.log_posterior[0, 2])
    short = information.sequential_mixture(values[1, :7], prior)
    np.testing.assert_allclose(found.regret[1], short.regret, atol=1e-5)
    none = information.sequential_mixture(values, prior, where=jnp.asarray(False))
    np.testing.assert_allclose(none.regret, 0)


def test_excluded_hypotheses_stay_excluded():
    values, prior = problem()
    values = values[0].at[2, 1].set(-jnp.inf)
    found = information.sequential_mixture(values, prior)
    assert (found.log_posterior[2:, 1] == -jnp.inf).all()
    assert found.regret[1] == -jnp.inf
    assert jnp.isfinite(found.log_predictive).all()
    slope = jax.grad(
        lambda v: information.sequential_mixture(v, prior).log_predictive.sum()
    )(values)
    assert jnp.isfinite(slope).all()
    all_of_them = information.sequential_mixture(values.at[4].set(-jnp.inf), prior)
    assert (all_of_them.log_predictive[4:] == -jnp.inf).all()
    assert (all_of_them.regret == -jnp.inf).all()
    no_prior = information.sequential_mixture(values, jnp.full(5, -jnp.inf))
    assert jnp.isnan(no_prior.log_predictive).all()
    bound = information.redundancy_bound(
        f32([jnp.inf, 0.1, 0.0]), f32([0, 0, -jnp.inf]), num_samples=10
    )
    np.testing.assert_allclose(bound.bound, 0.1 + np.log(2) / 10, rtol=1e-6)
    for kl in ([jnp.inf] * 2, [-0.1, 0.2]):
        found = information.redundancy_bound(f32(kl), f32([0, 0]), num_samples=1)
        assert not jnp.isfinite(found.bound)
        assert not jnp.isfinite(found.mixture_bound)


def test_weights_do_not_drift_over_many_observations():
    """The total equals one log-sum-exp over the hypotheses."""
    values = np.log(np.random.default_rng(0).uniform(0.3, 0.7, (3000, 4)))
    found = information.sequential_mixture(f32(values), jnp.zeros(4))
    totals = values.sum(0)
    wanted = np.log(np.exp(totals - totals.max()).mean()) + totals.max()
    total = np.asarray(found.log_predictive, np.float64).sum()
    np.testing.assert_allclose(total, wanted, atol=5e-3)
    assert_close(jnp.exp(found.log_posterior[-1]).sum(), 1, dtype="float32", length=4)


def test_derivatives_are_those_of_differences():
    with jax.enable_x64():
        values, prior = problem(dtype="float64")
        kl = jnp.array([0.3, 0.1, 0.8, 0.05, 0.4])

        def run(v: Any, kl: Any, prior: Any) -> Any:
            bound = information.redundancy_bound(kl, prior, num_samples=7)
            return information.sequential_mixture(v, prior)[:3], bound

        check_grads(jax.jit(run), (values[0, :3], kl, prior), order=1)


@pytest.mark.usefixtures("untyped")
def test_errors_name_the_argument():
    values, prior = problem()
    run: Any = information.sequential_mixture
    with pytest.raises(ValueError, match=r"^sequential_mixture: `log_prior` must have"):
        run(values, jnp.zeros(3))
    with pytest.raises(ValueError, match=r"`log_prior` .* M at least 1, got \(0,\)"):
        run(jnp.zeros((3, 0)), jnp.zeros(0))
    with pytest.raises(
        ValueError, match=r"^sequential_mixture: `where` must broadcast"
    ):
        run(values, prior, where=jnp.ones(4, bool))
    with pytest.raises(ValueError, match=r"^redundancy_bound: `num_samples` must be"):
        information.redundancy_bound(jnp.zeros(2), jnp.zeros(2), num_samples=0)
