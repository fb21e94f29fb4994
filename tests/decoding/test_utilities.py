"""Utilities and probabilities of sequences, and the choice: oracles, edges, errors."""

import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import softlib
from softlib.testing import assert_close, check_transformations
from tests.compiled import decoding, losses
from tests.host import jnp

DATA = (
    pathlib.Path(__file__).parent.parent / "data/utility_probability_duality_case0.npz"
)
BATCH, CANDIDATES, TOKENS, CLASSES = 2, 5, 4, 7


def utility(logits, tokens, where):
    """The sum of the chosen logits, a token at a time."""
    found = np.zeros(tokens.shape[:-1])
    for at in np.ndindex(tokens.shape):
        if where[at]:
            found[at[:-1]] += logits[at][tokens[at]]
    return found


def probabilities(scores, lengths, power, temperature, where):
    """The softmax over the candidates that count, a row at a time."""
    found = np.zeros(scores.shape)
    for row in range(len(scores)):
        weights = {}
        for n in np.flatnonzero(where[row]):
            weights[n] = np.exp(scores[row, n] / lengths[row, n] ** power / temperature)
        for n, weight in weights.items():
            found[row, n] = weight / sum(weights.values())
    return found


def choice(p, gain):
    """The first candidate of the greatest expected gain among those there are."""
    expected = {
        i: sum(p[j] * gain[i, j] for j in range(len(p)) if p[j] > 0)
        for i in range(len(p))
        if p[i] > 0
    }
    return max(expected, key=lambda i: (expected[i], -i)) if expected else -1


def problem(seed, dtype="float32"):
    random = np.random.default_rng(seed)
    logits = random.normal(size=(BATCH, CANDIDATES, TOKENS, CLASSES))
    tokens = random.integers(0, CLASSES, (BATCH, CANDIDATES, TOKENS))
    lengths = random.integers(1, TOKENS + 1, (BATCH, CANDIDATES))
    where = np.arange(TOKENS) < lengths[..., None]
    return jnp.asarray(logits, dtype), tokens, lengths, where


# ----------------------------------------------------------------------------- oracles
def test_matches_independent_vectors():
    with jax.enable_x64(), np.load(DATA) as data:
        logits, tokens, where, gain = (
            jnp.asarray(data[f"in_{name}"])
            for name in ("logits", "tokens", "where", "gain")
        )
        close = lambda found, name: assert_close(
            found, data[f"out_{name}"], dtype="float64", length=50
        )
        close(decoding.sequence_utility(logits, tokens, where=where), "utility")
        log_probs = softlib.logits.sequence_log_probs(logits, tokens, where=where)
        close(log_probs, "logp")
        found = decoding.candidate_log_probs(
            log_probs, lengths=where.sum(-1), length_power=1.0
        )
        close(found, "candidate_logp_length_normalised")
        chosen = decoding.minimum_bayes_risk(found, gain)
        np.testing.assert_array_equal(chosen, data["out_mbr_choice"])
        # What maximum likelihood does to the utilities of a step.
        labels = jnp.asarray(data["in_step_label"])
        loss = lambda u: losses.softmax_cross_entropy(u, labels).sum()
        update = -jax.grad(loss)(jnp.asarray(data["in_step_utilities"]))
        close(update, "mle_update")


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_oracles(dtype):
    with jax.enable_x64(dtype == "float64"):
        logits, tokens, lengths, where = problem(1, dtype)
        found = decoding.sequence_utility(logits, tokens, where=where)
        wide = np.asarray(logits, np.float64)
        assert found.dtype == jnp.promote_types(dtype, jnp.float32)
        assert_close(found, utility(wide, tokens, where), dtype=found.dtype, length=9)

        scores = jnp.asarray(-3 * np.abs(wide[:, :, 0, 0]), dtype)
        there = np.asarray(wide[:, :, 0, 1] < 1)
        found = decoding.candidate_log_probs(
            scores, lengths=lengths, length_power=0.7, temperature=0.5, where=there
        )
        exact = np.asarray(scores, np.float64)
        wanted = probabilities(exact, lengths, 0.7, 0.5, there)
        assert found.dtype == jnp.promote_types(dtype, jnp.float32)
        assert_close(jnp.exp(found), wanted, dtype=found.dtype, length=9)
        gain = jnp.asarray(wide[:, :, :, 0] @ wide[:, :, :, 1].swapaxes(1, 2), dtype)
        for row in range(BATCH):
            best = choice(wanted[row], np.asarray(gain[row], np.float64))
            assert decoding.minimum_bayes_risk(found[row], gain[row]) == best


def test_a_head_has_the_utilities_of_its_logits():
    _, tokens, _, where = problem(2)
    random = np.random.default_rng(0)
    hidden = jnp.asarray(random.normal(size=(*tokens.shape, 3)), jnp.float32)
    weight = jnp.asarray(random.normal(size=(CLASSES, 3)), jnp.float32)
    head = softlib.LinearLogits(hidden, weight, softcap=2.0)
    of = lambda z: decoding.sequence_utility(z, tokens, where=where)
    assert_close(of(head), of(head.materialize()), dtype="float32", length=12)


# -------------------------------------------------------------------------------- edges
def test_tokens_that_do_not_count_may_hold_anything():
    logits, tokens, _, where = problem(3)
    spoilt = jnp.where(jnp.asarray(where)[..., None], logits, jnp.nan)
    strange = np.where(where, tokens, -9)

    def total(logits, tokens):
        found = decoding.sequence_utility(logits, tokens, where=where)
        return found.sum(), found

    gradient, found = jax.grad(total, has_aux=True)(spoilt, strange)
    wanted = decoding.sequence_utility(logits, tokens, where=where)
    np.testing.assert_array_equal(found, wanted)
    assert np.isfinite(gradient).all()
    wrong = tokens.copy()
    wrong[0, 1, 0] = CLASSES  # always counts
    found = np.asarray(decoding.sequence_utility(logits, wrong, where=where))
    assert np.isnan(found[0, 1])
    assert np.isnan(found).sum() == 1


def test_a_shift_of_a_step_moves_every_utility():
    logits, tokens, *_ = problem(4)
    moved = np.asarray(logits)
    moved = moved + 2.5 * (np.arange(TOKENS) == 1)[:, None]
    of = decoding.sequence_utility
    assert_close(of(moved, tokens), of(logits, tokens) + 2.5, dtype="float32", length=9)


def test_the_empty_sequence_loses_its_advantage_with_a_power_of_the_length():
    scores, lengths = jnp.array([-2.0, -5.0]), np.array([1, 6])
    of = decoding.candidate_log_probs
    assert jnp.argmax(of(scores)) == 0
    assert jnp.argmax(of(scores, lengths=lengths, length_power=1.0)) == 1


def test_candidates_that_do_not_count():
    nan, inf = jnp.nan, jnp.inf
    scores = jnp.array([[nan, 0.0, 0.0], [0.0, -inf, 0.0], [-inf] * 3, [nan] * 3])
    where = np.array([[False, True, True], [True] * 3, [True] * 3, [False] * 3])

    def total(scores):
        found = decoding.candidate_log_probs(
            scores, lengths=np.ones((4, 3), int), length_power=1.0, where=where
        )
        return jnp.where(jnp.isfinite(found), found, 0).sum(), found

    gradient, found = jax.grad(total, has_aux=True)(scores)
    half = np.log(0.5)
    wanted = [[-inf, half, half], [half, -inf, half], [-inf] * 3, [-inf] * 3]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert np.isfinite(gradient).all()
    gain = jnp.where(jnp.asarray(found)[:, None] > -inf, jnp.ones((4, 3, 3)), nan)
    chosen = decoding.minimum_bayes_risk(found, gain)
    np.testing.assert_array_equal(chosen, [1, 0, -1, -1])


def test_bad_values_spoil_their_row():
    scores = jnp.array([[jnp.nan, 0.0], [jnp.inf, 0.0], [0.0, 0.0], [-1.0, 0.0]])
    lengths = np.array([[1, 1], [1, 1], [0, 1], [1, 1]])
    found = decoding.candidate_log_probs(scores, lengths=lengths, length_power=1.0)
    np.testing.assert_array_equal(np.isnan(found).all(1), [True, True, True, False])
    # Without a power a length does not matter.
    assert np.isfinite(decoding.candidate_log_probs(scores, lengths=lengths)[2:]).all()
    gain = jnp.stack([jnp.eye(2), jnp.full((2, 2), jnp.nan)])
    zeros = jnp.zeros((2, 2))
    np.testing.assert_array_equal(decoding.minimum_bayes_risk(zeros, gain), [0, -1])
    assert decoding.minimum_bayes_risk(jnp.array([jnp.nan, 0.0]), jnp.eye(2)) == -1
    assert decoding.minimum_bayes_risk(jnp.zeros((3, 0)), jnp.zeros((3, 0, 0))).size


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_the_identity_as_gain_chooses_the_most_probable(seed):
    scores = jnp.asarray(np.random.default_rng(seed).normal(size=(4, 5)), jnp.float32)
    found = decoding.minimum_bayes_risk(scores, jnp.broadcast_to(jnp.eye(5), (4, 5, 5)))
    np.testing.assert_array_equal(found, jnp.argmax(scores, -1))


@pytest.mark.slow
def test_every_transformation():
    random = np.random.default_rng(0)
    scores, logits = (
        jnp.asarray(random.normal(size=shape), jnp.float32)
        for shape in ((8, 5), (8, 3, 4))
    )
    tokens = jnp.asarray(random.integers(0, 4, (8, 3)))

    def function(scores, logits, temperature):
        found = decoding.candidate_log_probs(
            scores,
            lengths=jnp.broadcast_to(jnp.arange(1, 6), scores.shape),
            length_power=0.5,
            temperature=temperature,
        )
        gain = jnp.sin(scores[:, :, None] * scores[:, None])
        best = decoding.minimum_bayes_risk(found, gain)
        return found, best, decoding.sequence_utility(logits, tokens[: len(logits)])

    skip = {"vmap": "the tokens are not an argument", "shard_map": "as vmap"}
    check_transformations(
        function, scores, logits, jnp.float32(0.7), rows=(0, 1), skip=skip
    )


@pytest.mark.usefixtures("untyped")
def test_errors_name_the_argument():
    of: Any = decoding.candidate_log_probs
    utility: Any = decoding.sequence_utility
    choose: Any = decoding.minimum_bayes_risk
    x, ids = jnp.ones((2, 3)), jnp.ones((2, 3), int)
    for call, error, message in (
        (lambda: of(ids), TypeError, "`scores` must have a floating"),
        (lambda: of(jnp.ones(())), ValueError, "`scores` must have at least 1 axis"),
        (lambda: of(x, length_power=1.0), ValueError, "`lengths` must be given with"),
        (lambda: of(x, lengths=x), TypeError, "`lengths` must have an integer"),
        (lambda: of(x, lengths=ids[0]), ValueError, r"`lengths` must have shape \(2,"),
        (lambda: of(x, lengths=ids, length_power=-1), ValueError, "`length_power` mu"),
        (lambda: of(x, temperature=0.0), ValueError, "`temperature` must be positive"),
        (lambda: of(x, where=x[0, 0]), TypeError, "`where` must have dtype bool"),
        (lambda: utility(x[0], ids[0, 0]), ValueError, "`logits` must have at least 2"),
        (lambda: utility(x, x[:, 0]), TypeError, "`tokens` must have an integer"),
        (lambda: utility(x, ids), ValueError, r"`tokens` must have shape \(2,\)"),
        (lambda: choose(x, x), ValueError, r"`gain` must have shape \(2, 3, 3\)"),
        (lambda: choose(ids, x), TypeError, "`candidate_log_probs` must have a float"),
    ):
        name = "candidate_log_probs|sequence_utility|minimum_bayes_risk"
        with pytest.raises(error, match=rf"^({name}): .*{message}"):
            call()
