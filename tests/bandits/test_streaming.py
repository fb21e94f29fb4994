"""Arms that pass once: vectors, an exact oracle of pulls, and the paper's ratios."""

import functools
import math
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from softlib.bandits import (
    eps_best_size,
    streaming_explore_then_commit,
    uniform_exploration_size,
)
from softlib.testing import assert_close
from tests.host import jnp

DATA = pathlib.Path(__file__).parent.parent / "data/streaming_bandits_case0.npz"


def instance(seed: int, arms: int) -> np.ndarray:
    """Normal means around a half, at most .8, and one arm of .82 among them."""
    random = np.random.default_rng(seed)
    means = np.clip(random.normal(0.5, 0.1, arms), 0, 0.8)
    means[random.integers(arms)] = 0.82
    return means


def test_matches_independent_vectors():
    """Deterministic, given the means that were measured."""
    with jax.enable_x64():
        data = np.load(DATA)
        means, horizon = jnp.asarray(data["in_p"]), int(data["in_horizon"])
        assert uniform_exploration_size(50, horizon) == data["out_batch_uniform"]
        assert eps_best_size(50, horizon) == data["out_batch_eps"]
        for rule, name in (("uniform", "uniform"), ("eps_best", "eps")):
            found = streaming_explore_then_commit(
                None,
                means,
                horizon=horizon,
                rule=rule,
                empirical_means=jnp.asarray(data[f"in_mean_{name}"]),
            )
            arm, regret = data[f"out_arm_regret_{name}"]
            assert found.arm == arm
            assert_close(found.regret, regret, dtype=jnp.float64, length=50)
            assert found.pulls == 50 * data[f"out_batch_{name}"]


@functools.cache
def regrets(arms: int, horizon: int, rule: Any) -> np.ndarray:
    """Of 30 instances; one program for all."""
    means = jnp.asarray(np.stack([instance(k, arms) for k in range(30)]), "float32")
    call = functools.partial(streaming_explore_then_commit, horizon=horizon, rule=rule)
    found = jax.jit(jax.vmap(call))(jax.random.split(jax.random.key(0), 30), means)
    assert (np.asarray(found.pulls) <= horizon).all()
    return np.asarray(found.regret)


@pytest.mark.parametrize(
    ("horizon", "ratio"), [(10**6, 0.58), (10**7, 0.54), (10**9, 0.37)]
)
def test_the_king_pays_less_than_uniform_exploration(horizon, ratio):
    """As much less as the independent program measured, with 500 arms."""
    king, uniform = (regrets(500, horizon, rule) for rule in ("king", "uniform"))
    assert abs(king.mean() / uniform.mean() - ratio) < 0.12


def test_telling_all_arms_apart_costs_two_to_three_times_as_much():
    naive, uniform = (regrets(500, 10**6, rule) for rule in ("eps_best", "uniform"))
    assert 1.8 < naive.mean() / uniform.mean() < 3.2


def test_regret_grows_as_the_horizon_to_two_thirds():
    """A line through logarithms; uniform exploration has log^(1/3) T beside it."""
    horizons = [10**6, 10**7, 10**9]
    means = [regrets(500, horizon, "king").mean() for horizon in horizons]
    slope = np.polyfit(np.log(horizons), np.log(means), 1)[0]
    assert abs(slope - 2 / 3) < 0.1


@pytest.mark.parametrize("rule", ["uniform", "eps_best", "king"])
def test_regret_is_what_pulls_cost(rule):
    """Never below 0, nor above the worst arm's; one arm costs nothing."""
    means = jnp.asarray(instance(3, 12), "float32")
    run = jax.jit(
        lambda key, means: streaming_explore_then_commit(
            key, means, horizon=5000, rule=rule
        )
    )
    found = jax.vmap(run, (0, None))(jax.random.split(jax.random.key(1), 40), means)
    worst = 5000 * float(means.max() - means.min())
    assert (found.regret >= 0).all()
    assert (found.regret <= worst).all()
    assert ((found.pulls > 0) & (found.pulls <= 5000)).all()
    # After exploring, the committed arm is usually among the best.
    assert np.mean(np.asarray(means)[found.arm]) > 0.7
    one = streaming_explore_then_commit(
        jax.random.key(0), jnp.array([0.3]), horizon=100, rule=rule
    )
    assert one.arm == 0
    assert one.regret == 0


@pytest.mark.parametrize("rule", ["uniform", "king"])
def test_fewer_pulls_than_arms_see_the_first_arms_only(rule):
    means = jnp.linspace(0.1, 0.9, 20)
    found = streaming_explore_then_commit(
        jax.random.key(0), means, horizon=5, rule=rule
    )
    assert found.arm < 5
    assert found.pulls <= 5
    assert found.regret <= 5 * 0.8 + 1e-5


def test_sizes_are_their_formulas():
    for arms, horizon in ((2, 10), (50, 200_000), (500, 10**9)):
        size = (horizon / arms) ** (2 / 3) * math.log(horizon) ** (1 / 3)
        assert uniform_exploration_size(arms, horizon) == max(
            min(int(size), horizon // arms), 1
        )
        size = math.log(arms) * (horizon / arms) ** (2 / 3)
        assert eps_best_size(arms, horizon) == max(min(int(size), horizon // arms), 1)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("changed", "error", "text"),
    [
        ({"horizon": 0}, ValueError, "`horizon` must"),
        ({"rule": "queen"}, ValueError, "`rule` must"),
        ({"arm_means": jnp.zeros((0,))}, ValueError, "`arm_means` must"),
        ({"arm_means": jnp.zeros((2, 2))}, ValueError, "`arm_means` must"),
        ({"empirical_means": jnp.zeros(2)}, ValueError, "`empirical_means` must"),
        ({"key": None}, TypeError, "`key` or"),
    ],
)
def test_errors_name_the_argument(changed, error, text):
    arguments: Any = {
        "key": jax.random.key(0),
        "arm_means": jnp.array([0.1, 0.4]),
        "horizon": 100,
    } | changed
    with pytest.raises(error, match=f"^streaming_explore_then_commit: {text}"):
        streaming_explore_then_commit(**arguments)
