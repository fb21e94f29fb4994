"""PPO's clip with the forms of GRPO, group advantages, REINFORCE leave-one-out."""

import functools

import jax
import numpy as np
import pytest

import softlib
from softlib import losses
from softlib.testing import assert_close, check_transformations
from tests.host import jnp
from tests.oracles import policy_gradient as oracle

INF, NAN = jnp.inf, jnp.nan
B, T = 4, 5


def tokens(seed=0, scale=0.4):
    """Log-probabilities of new, old and reference policy, which tokens count."""
    random = np.random.default_rng(seed)
    old = -np.abs(random.normal(size=(B, T)))
    new, reference = old + scale * random.normal(size=(2, B, T))
    where = np.arange(T) < np.array([5, 3, 1, 0])[:, None]
    return new, old, reference, where


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize(
    ("level", "per_token", "kl_weight"),
    [("token", True, 0.3), ("token", False, 0.0), ("sequence", False, 0.3)],
)
def test_matches_oracle(level, per_token, kl_weight, dtype):
    """What does not count is NaN."""
    with jax.enable_x64(dtype == "float64"):
        new, old, reference, where = tokens()
        random = np.random.default_rng(1)
        advantages = random.normal(size=(B, T) if per_token else B)
        bad = [jnp.asarray(np.where(where, a, NAN), dtype) for a in (new, old)]
        given = jnp.asarray(np.where(where, reference, NAN), dtype)
        advantages = jnp.asarray(advantages, dtype)
        loss = jax.jit(
            lambda new, old, a, reference: losses.ppo_clip_loss(
                new,
                old,
                a,
                clip_high=0.3,
                level=level,
                reference_log_prob=reference,
                kl_weight=kl_weight,
                where=jnp.asarray(where),
            )
        )(*bad, advantages, given)
        exact = lambda a: np.asarray(a, np.float64)
        wanted = oracle.ppo_clip(
            exact(bad[0]),
            exact(bad[1]),
            exact(advantages),
            low=0.2,
            high=0.3,
            level=level,
            reference=exact(given),
            kl_weight=kl_weight,
            where=where,
        )
        assert loss.dtype == jnp.promote_types(dtype, jnp.float32)
        assert_close(loss, wanted, dtype=loss.dtype, length=T, c=16)


def test_gradients_are_those_of_the_clipped_ratio():
    old = jnp.log(jnp.full(4, 0.4))
    new = old + jnp.log(jnp.array([1.1, 1.5, 0.5, 0.9]))
    for advantage, slopes in ((2.0, [1.1, 0, 0.5, 0.9]), (-2.0, [1.1, 1.5, 0, 0.9])):
        loss = lambda x, a=advantage: losses.ppo_clip_loss(x, old, jnp.array(a)).sum()
        wanted = -advantage * np.array(slopes)
        np.testing.assert_allclose(jax.grad(loss)(new), wanted, rtol=1e-6)


def test_on_policy_it_has_the_gradient_of_reinforce():
    new, _, _, where = tokens()
    a, where = jnp.array([1.0, -2.0, 0.5, 3.0]), jnp.asarray(where)
    loss = lambda x: losses.ppo_clip_loss(x, new, a, where=where).sum()
    found = jax.grad(loss)(jnp.asarray(new))
    np.testing.assert_allclose(found, np.where(where, -a[:, None], 0), rtol=1e-6)
    by_sequence = lambda x: softlib.masked_mean(
        losses.ppo_clip_loss(x, new, a, level="sequence", where=where), where, axis=-1
    ).sum()
    count = np.maximum(where.sum(-1, keepdims=True), 1)
    found = jax.grad(by_sequence)(jnp.asarray(new))
    np.testing.assert_allclose(found, np.where(where, -a[:, None] / count, 0), 1e-6)


def test_old_and_reference_policy_and_advantages_have_no_gradient():
    new, old, reference, where = map(jnp.asarray, tokens())
    loss = lambda old, a, reference: losses.ppo_clip_loss(
        new, old, a, reference_log_prob=reference, kl_weight=0.1, where=where
    ).sum()
    for found in jax.jit(jax.grad(loss, (0, 1, 2)))(old, new, reference):
        np.testing.assert_array_equal(found, 0)


def test_impossible_and_undefined_ratios_are_limits_without_a_gradient():
    new = jnp.array([-INF, -INF, -1.0, -1.0, -INF, NAN, -1.0])
    old = jnp.array([-1.0, -1.0, -INF, -INF, -INF, -1.0, -1.0])
    a = jnp.array([2.0, -2.0, 2.0, -2.0, 0.0, 2.0, 2.0])
    loss = lambda x, **o: losses.ppo_clip_loss(x, old, a, **o)
    found = loss(new)
    np.testing.assert_allclose(found, [0, 1.6, -2.4, INF, NAN, NAN, -2], rtol=1e-6)
    slopes = jax.grad(lambda x: loss(x)[-1] + loss(x)[3])(new)
    np.testing.assert_array_equal(slopes, [0, 0, 0, 0, 0, 0, -2])
    reference = jnp.where(jnp.arange(7) == 4, -INF, -2.0)
    found = loss(new, reference_log_prob=reference, kl_weight=1.0)
    np.testing.assert_array_equal(
        jnp.isfinite(found), [False, False, True, False, False, False, True]
    )


def test_large_ratios_that_are_clipped_have_finite_gradients():
    new, old, a = jnp.array([[-1.0]]), jnp.array([[-500.0]]), jnp.array([1.0])
    loss = lambda x: losses.ppo_clip_loss(x, old, a).sum()
    value, slope = jax.value_and_grad(loss)(new)
    assert value == pytest.approx(-1.2)
    assert slope == 0


def test_a_kl_weight_needs_a_reference(untyped):
    new = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match="`reference_log_prob` must be given"):
        losses.ppo_clip_loss(new, new, new, kl_weight=0.1)
    with pytest.raises(ValueError, match=r"`advantages` must have shape \(2, 3\) or"):
        losses.ppo_clip_loss(new, new, jnp.zeros(3))


# --------------------------------------------------------------------------- advantages
@pytest.mark.parametrize("standardized", [True, False])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_advantages_match_oracle(baseline, standardized, dtype):
    with jax.enable_x64(dtype == "float64"):
        rewards = np.random.default_rng(0).normal(size=(B, T))
        rewards[1] = 2.0
        where = tokens()[-1]
        given = jnp.asarray(np.where(where, rewards, NAN), dtype)
        options = {"baseline": baseline, "standardized": standardized}
        found = jax.jit(functools.partial(losses.group_advantages, **options))(
            given, where=where
        )
        exact = np.asarray(given, np.float64)
        wanted = oracle.advantages(exact, baseline, standardized, 1e-4, where)
        assert_close(found, wanted, dtype=found.dtype, length=T, c=16)


def test_equal_rewards_have_no_advantage_whatever_epsilon():
    rewards = jnp.full((2, 3), 0.1)
    for epsilon in (0.0, 1e-4, jnp.float32(0)):
        found = losses.group_advantages(rewards, epsilon=epsilon)
        np.testing.assert_allclose(found, 0, atol=1e-3)
        assert not losses.group_advantages(rewards[:, :1], epsilon=epsilon).any()
    slope = jax.grad(lambda r: losses.group_advantages(r)[0, 0])(rewards)
    np.testing.assert_array_equal(slope, 0)


# ------------------------------------------------------------------------ leave-one-out
def test_leave_one_out_matches_its_definition():
    random = np.random.default_rng(0)
    log_prob, rewards = random.normal(size=(2, B, T))
    where = tokens()[-1]
    a = oracle.advantages(rewards, "leave_one_out", False, 0.0, where)
    bad = [jnp.asarray(np.where(where, x, NAN)) for x in (log_prob, rewards)]

    def run(log_prob, rewards):
        loss = losses.reinforce_leave_one_out_loss(
            log_prob, rewards, where=jnp.asarray(where)
        )
        return loss.sum(), loss

    slopes, loss = jax.jit(jax.grad(run, (0, 1), has_aux=True))(*bad)
    assert_close(loss, -a * log_prob, dtype="float32", length=T)
    assert_close(slopes[0], -a, dtype="float32", length=T)
    np.testing.assert_array_equal(slopes[1], 0)


def test_leave_one_out_is_unbiased_over_all_draws():
    """All pairs of draws from a policy of three actions, weighed by probability."""
    with jax.enable_x64():
        theta, reward = jnp.array([0.2, -0.5, 1.0]), jnp.array([1.0, 0.3, -2.0])
        one, two = map(jnp.ravel, jnp.meshgrid(jnp.arange(3), jnp.arange(3)))
        draws = jnp.stack([one, two], -1)
        weight = jax.nn.softmax(theta)[draws].prod(-1)

        def surrogate(theta):
            log_prob = jax.nn.log_softmax(theta)[draws]
            loss = losses.reinforce_leave_one_out_loss(log_prob, reward[draws])
            return (weight * loss.mean(-1)).sum()

        expected = lambda theta: -(jax.nn.softmax(theta) * reward).sum()
        found, wanted = jax.grad(surrogate)(theta), jax.grad(expected)(theta)
        np.testing.assert_allclose(found, wanted, atol=1e-14)


def test_an_impossible_answer_is_a_limit_and_one_without_advantage_costs_nothing():
    log_prob = jnp.array([[-INF, -INF, -2.0]])
    loss = lambda x, r: losses.reinforce_leave_one_out_loss(x, jnp.array([r]))
    np.testing.assert_array_equal(loss(log_prob, [1.0, 1.0, 1.0]), 0)
    np.testing.assert_array_equal(loss(log_prob, [2.0, 0.0, 1.0]), [[INF, -INF, 0]])
    slope = jax.grad(lambda x: loss(x, [0.0, 0.0, 1.0])[0, 2])(log_prob)
    np.testing.assert_allclose(slope, [[0, 0, -1]], rtol=1e-6)


@pytest.mark.slow
def test_every_transformation():
    random = np.random.default_rng(0)
    new, old, reference = jnp.asarray(random.normal(size=(3, 8, 3)), jnp.float32)
    rewards = jnp.asarray(random.normal(size=(8, 3)), jnp.float32)

    def function(new, old, reference, rewards, low, high, kl_weight):
        options = {"reference_log_prob": reference, "kl_weight": kl_weight}
        options |= {"clip_low": low, "clip_high": high}
        return (
            losses.ppo_clip_loss(new, old, rewards, **options),
            losses.ppo_clip_loss(new, old, rewards[:, 0], level="sequence", **options),
            losses.reinforce_leave_one_out_loss(new, rewards),
        )

    numbers = map(jnp.float32, (0.2, 0.3, 0.5))
    check_transformations(
        function,
        *(new, old, reference, rewards, *numbers),
        rows=(0, 1, 2, 3),
        differentiable=(0, 4, 5, 6),
    )
