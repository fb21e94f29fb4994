"""Density-ratio rewards and the pairs made of them: oracle, vectors, edges, errors."""

import functools
import itertools
import pathlib

import jax
import numpy as np
import pytest
from hypothesis import given, strategies as st

from softlib.testing import assert_close, check_transformations
from tests.compiled import losses, scoring
from tests.host import jnp
from tests.oracles import preference as oracle

DATA = pathlib.Path(__file__).parent.parent / "data"
INF, NAN = jnp.inf, jnp.nan
BATCH, LENGTH = (3, 4), 6


def problem(dtype="float32", seed=0):
    """Token log-probabilities of both models, and which tokens count; one has none."""
    random = np.random.default_rng(seed)
    draws = -np.abs(random.normal(size=(2, *BATCH, LENGTH)))
    where = random.uniform(size=(*BATCH, LENGTH)) < 0.7
    where[0, 0] = False
    strong, weak = (jnp.asarray(row, dtype) for row in draws)
    return strong, weak, jnp.asarray(where)


# ----------------------------------------------------------------------------- oracles
@pytest.mark.parametrize("normalize", ["sum", "mean"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_rewards_match_oracle(dtype, normalize):
    with jax.enable_x64(dtype == "float64"):
        strong, weak, where = problem(dtype)
        of = functools.partial(scoring.density_ratio_reward, normalize=normalize)
        actual = jax.jit(lambda s, w, m: of(s, w, where=m))(strong, weak, where)
        assert actual.dtype == jnp.promote_types(dtype, jnp.float32)
        wide = [np.asarray(a).astype(float) for a in (strong, weak)]
        wanted = oracle.density_ratio(wide[0], wide[1], where, normalize)
        assert_close(actual, wanted, dtype=actual.dtype, length=LENGTH)
        everywhere = np.ones_like(where)
        full = oracle.density_ratio(wide[0], wide[1], everywhere, normalize)
        assert_close(of(strong, weak), full, dtype=actual.dtype, length=LENGTH)


def test_rewards_pairs_and_simpo_match_independent_vectors():
    with jax.enable_x64(), np.load(DATA / "cdr_case0.npz") as data:
        strong, weak, where = (
            jnp.asarray(data[f"in_{name}"])
            for name in ("strong_logp", "weak_logp", "where")
        )
        rewards = scoring.density_ratio_reward(strong, weak, where=where)
        check = functools.partial(assert_close, dtype="float64", length=9)
        check(rewards, data["out_reward"])
        chosen, rejected, margin = scoring.annotate_preferences(rewards)
        np.testing.assert_array_equal(chosen, data["out_chosen"])
        np.testing.assert_array_equal(rejected, data["out_rejected"])
        check(margin, data["out_margin"])
        totals = jnp.where(where, strong, 0).sum(-1)
        lengths = where.sum(-1)
        at = lambda a, i: jnp.take_along_axis(a, i[:, None], 1)[:, 0]
        loss = losses.simpo_loss(
            *(at(totals, i) for i in (chosen, rejected)),
            *(at(lengths, i) for i in (chosen, rejected)),
            beta=float(data["in_beta"]),
            gamma=float(data["in_gamma"]),
        )
        check(loss, data["out_simpo_loss"])


@given(seed=st.integers(0, 200))
def test_pairs_match_oracle(seed):
    """Few values, so that many are equal; rows without and with one response."""
    random = np.random.default_rng(seed)
    rewards = random.choice([-np.inf, -1.0, 0.0, 0.5, 2.0], size=(6, 4))
    where = random.uniform(size=(6, 4)) < 0.6
    filled = np.where(where, rewards, np.nan)
    found = _annotate(jnp.asarray(filled, jnp.float32), jnp.asarray(where))
    for i, wanted in enumerate(oracle.annotate(rewards, where)):
        actual = (found.chosen_index[i], found.rejected_index[i], found.margin[i])
        np.testing.assert_array_equal(actual, wanted)


_annotate = jax.jit(lambda r, w: scoring.annotate_preferences(r, where=w))


# ---------------------------------------------------------------------------- promises
def test_tokens_that_do_not_count_may_hold_anything():
    """-inf for both models is nan before the selection, in the gradient too."""
    strong, weak, where = problem()
    for filling in (-INF, NAN):
        dirty = [jnp.where(where, a, filling) for a in (strong, weak)]

        def run(arrays, where=where):
            reward = scoring.density_ratio_reward(*arrays, where=where)
            return reward.sum(), reward

        gradients, reward = jax.jit(jax.grad(run, has_aux=True))(dirty)
        assert reward[0, 0] == 0
        wanted = scoring.density_ratio_reward(strong, weak, where=where)
        np.testing.assert_array_equal(reward, wanted)
        np.testing.assert_array_equal(gradients[0], where)
        np.testing.assert_array_equal(gradients[1], -1.0 * where)


def test_impossible_tokens_that_count():
    strong = jnp.array([[-INF, -1.0], [-1.0, -1.0], [-INF, -1.0]])
    weak = jnp.array([[-1.0, -1.0], [-INF, -1.0], [-INF, -1.0]])
    reward = scoring.density_ratio_reward(strong, weak)
    np.testing.assert_array_equal(reward, [-np.inf, np.inf, np.nan])


def test_no_pair_no_margin_and_no_gradient():
    rewards = jnp.array([[1.0, NAN, NAN], [NAN, NAN, NAN], [2.0, 2.0, 2.0]])
    where = jnp.array([[True, False, False], [False] * 3, [True] * 3])

    def run(rewards):
        found = scoring.annotate_preferences(rewards, where=where)
        return found.margin.sum(), found

    gradient, found = jax.jit(jax.grad(run, has_aux=True))(rewards)
    np.testing.assert_array_equal(found.margin, 0)
    np.testing.assert_array_equal(gradient, 0)
    np.testing.assert_array_equal(found.chosen_index, 0)
    np.testing.assert_array_equal(found.rejected_index, 0)


def test_the_margin_has_the_gradient_of_its_two_ends():
    rewards = jnp.array([[0.5, 2.0, -1.0]])
    margin = lambda r: scoring.annotate_preferences(r).margin.sum()
    np.testing.assert_array_equal(jax.grad(margin)(rewards), [[0, 1, -1]])


def test_a_nan_stays_with_its_prompt():
    rewards = jnp.array([[0.5, NAN, -1.0], [0.5, 2.0, -1.0]])
    margin = scoring.annotate_preferences(rewards).margin
    np.testing.assert_array_equal(margin, [np.nan, 3.0])


# ----------------------------------------------------------------- headline experiments
LETTERS, PLACES = 4, 3


def sequences():
    return np.array(list(itertools.product(range(LETTERS), repeat=PLACES)))


def token_log_probs(log_joint):
    """Of each sequence (64, 3) by the chain rule, from the joint (4, 4, 4)."""
    tokens, found = sequences(), []
    for place in range(PLACES):
        later = tuple(range(place + 1, PLACES))
        with_it = np.log(np.exp(log_joint).sum(later)) if later else log_joint
        before = np.log(np.exp(log_joint).sum((place, *later)))
        # before has the axes of the places before this one.
        found.append(
            with_it[tuple(tokens[:, : place + 1].T)]
            - before[tuple(tokens[:, :place].T)]
        )
    return np.stack(found, -1)


def toy(seed=0, beta=0.5, noise=0.0, scale=1.0):
    """Weak policy, reward, strong = weak exp(reward / beta) / Z; 64 responses."""
    random = np.random.default_rng(seed)
    shape = (LETTERS,) * PLACES
    weak = random.normal(size=shape)
    weak -= np.log(np.exp(weak).sum())
    reward = scale * random.normal(size=shape)
    strong = weak + reward / beta + noise * random.normal(size=shape)
    log_z = np.log(np.exp(strong).sum())
    return weak, reward, strong - log_z, log_z


def accuracy(ratio, reward):
    """Share of the pairs that the ratio puts in the order of the reward."""
    i, j = np.triu_indices(len(reward), 1)
    return np.mean((ratio[i] > ratio[j]) == (reward[i] > reward[j]))


def rewards_of(weak, strong):
    return _reward(*(jnp.asarray(token_log_probs(a)) for a in (strong, weak)))


_reward = jax.jit(scoring.density_ratio_reward)


def test_the_ratio_of_a_tuned_model_is_its_reward():
    """CDR = reward / beta - log Z to 1e-12, so that the rank correlation is 1."""
    beta = 0.5
    with jax.enable_x64():
        for seed in range(5):
            weak, reward, strong, log_z = toy(seed, beta)
            ratio = np.asarray(rewards_of(weak, strong))
            flat = reward.ravel()
            np.testing.assert_allclose(ratio, flat / beta - log_z, atol=1e-12)
            np.testing.assert_array_equal(ratio.argsort(), flat.argsort())
            assert accuracy(ratio, flat) == 1
            pair = scoring.annotate_preferences(jnp.asarray(ratio))
            assert (pair.chosen_index, pair.rejected_index) == (
                flat.argmax(),
                flat.argmin(),
            )


def test_annotation_is_worse_the_noisier_and_the_nearer_the_strong_model():
    """Mean accuracy over 20 draws falls with the noise, rises with KL(strong, weak)."""
    with jax.enable_x64():

        def mean(noise, scale):
            found = []
            for seed in range(20):
                weak, reward, strong, _ = toy(seed, noise=noise, scale=scale)
                ratio = np.asarray(rewards_of(weak, strong))
                kl = (np.exp(strong) * (strong - weak)).sum()
                found.append((accuracy(ratio, reward.ravel()), kl))
            return np.mean(found, axis=0)

        by_noise = [mean(noise, 1.0)[0] for noise in (0.0, 0.5, 1.0, 2.0, 4.0)]
        assert by_noise[0] == 1
        assert (np.diff(by_noise) < -0.03).all()
        assert by_noise[-1] > 0.5
        by_scale = np.array([mean(1.0, scale) for scale in (0.25, 0.5, 1.0, 2.0)])
        assert (np.diff(by_scale[:, 0]) > 0.03).all()  # accuracy
        assert (np.diff(by_scale[:, 1]) > 0.03).all()  # divergence


# --------------------------------------------------------------------------- transforms
@pytest.mark.slow
def test_every_transformation():
    random = np.random.default_rng(0)
    strong, weak = jnp.asarray(random.normal(size=(2, 8, 3, 4)), jnp.float32)

    def function(strong, weak):
        rewards = scoring.density_ratio_reward(strong, weak, normalize="mean")
        return rewards, tuple(scoring.annotate_preferences(rewards))

    check_transformations(function, strong, weak, rows=(0, 1))


# ------------------------------------------------------------------------------- errors
@pytest.mark.usefixtures("untyped")
def test_errors_name_the_argument():
    strong, weak, where = problem()
    reward, annotate = scoring.density_ratio_reward, scoring.annotate_preferences
    for call, error, message in (
        (
            lambda: reward(strong, weak[0]),
            ValueError,
            "`weak_log_prob` must have shape",
        ),
        (
            lambda: reward(strong.astype(int), weak),
            TypeError,
            "`strong_log_prob` must have",
        ),
        (lambda: reward(strong[0, 0, 0], weak[0, 0, 0]), ValueError, "at least 1 axis"),
        (
            lambda: reward(strong, weak, where=strong),
            TypeError,
            "`where` must have",
        ),
        (
            lambda: reward(strong, weak, where=where[0, 0, :2]),
            ValueError,
            "`where` must",
        ),
        (lambda: reward(strong, weak, normalize="max"), ValueError, "got 'max'"),
        (
            lambda: annotate(strong > 0),
            TypeError,
            "`rewards` must have a floating dtype",
        ),
        (lambda: annotate(strong[..., :0]), ValueError, "at least one response"),
        (lambda: annotate(strong, where=where[0, 0, :2]), ValueError, "`where` must"),
    ):
        name = "annotate_preferences|density_ratio_reward"
        with pytest.raises(error, match=rf"^({name}): .*{message}"):
            call()
