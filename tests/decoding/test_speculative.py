"""Speculative decoding: the output has the law of the model, whatever the draft."""

import pathlib
from typing import Any

import jax
import numpy as np
import pytest

import softlib
from softlib import decoding
from softlib.decoding import speculative_verify, speculative_verify_tree
from tests.host import jnp

DATA = pathlib.Path(__file__).parent.parent / "data"
KEY = jax.random.key(0)
RNG = np.random.default_rng(0)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_vectors():
    case = np.load(DATA / "speculative_scaling_laws_case0.npz")
    with jax.enable_x64():
        found = speculative_verify(
            None,
            jnp.asarray(case["in_target_logits"]),
            jnp.asarray(case["in_draft_logits"]),
            jnp.asarray(case["in_draft_tokens"]),
            uniforms=(case["in_uniform"], case["in_uniform_residual"]),
        )
        np.testing.assert_array_equal(found.num_accepted, case["out_num_accepted"])
        np.testing.assert_array_equal(found.next_token, case["out_next_token"])
        accept = decoding.speculative_acceptance(
            jnp.asarray(case["in_target_logits"][:, :-1]),
            jnp.asarray(case["in_draft_logits"]),
        )
        np.testing.assert_allclose(accept, case["out_accept_prob"], rtol=1e-12)
        tokens = decoding.expected_accepted_tokens(0.8, draft_length=5)
        np.testing.assert_allclose(
            tokens, case["out_expected_tokens_a08_g5"], rtol=1e-12
        )
        speedup = decoding.speculative_speedup(0.8, draft_length=5, cost_ratio=0.1)
        np.testing.assert_allclose(speedup, case["out_speedup_a08_g5_c01"], rtol=1e-12)


def chi_square(counts, law):
    wanted = counts.sum() * law
    return ((counts - wanted) ** 2 / wanted).sum()


# 99.9 % of chi-square with 5, 35 and 215 degrees of freedom.
QUANTILES = {5: 20.5, 35: 66.6, 215: 283.1}


def words(count, step, tokens):
    """The first two tokens of each trial: accepted ones, then the model's own."""
    accepted, last = np.asarray(step.num_accepted), np.asarray(step.next_token)
    tokens = np.concatenate([np.asarray(tokens), np.zeros((count, 1), int)], axis=1)
    tokens[np.arange(count), accepted] = last
    return tokens, accepted


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("top_p", [None, 0.8])
def test_a_chain_has_the_law_of_the_model(temperature, top_p):
    """40,000 trials of a draft of 2; with temperature and a filter in both models."""
    count, vocabulary = 40_000, 6
    # The model's law depends on the tokens before.
    p1 = RNG.normal(0, 1, vocabulary)
    p2 = RNG.normal(0, 1, (vocabulary, vocabulary))
    q1, q2 = RNG.normal(0, 1, vocabulary), RNG.normal(0, 1, (vocabulary, vocabulary))
    if top_p is not None:
        keep = lambda z: (
            np.asarray(
                softlib.softmax.top_p_logits(
                    jnp.asarray(z, jnp.float32) / temperature, p=top_p
                )
            )
            * temperature
        )
        p1, p2, q1, q2 = map(keep, (p1, p2, q1, q2))
    key_1, key_2, key = jax.random.split(KEY, 3)
    warm = lambda z: jnp.asarray(z, jnp.float32) / temperature
    x1 = jax.random.categorical(key_1, warm(q1), shape=(count,))
    x2 = jax.random.categorical(key_2, warm(q2)[x1])
    tokens = jnp.stack([x1, x2], 1)
    rows = lambda z: jnp.asarray(z, jnp.float32)
    target = jnp.stack(
        [
            rows(p1)[None].repeat(count, 0),
            rows(p2)[x1],
            rows(p1)[None].repeat(count, 0),
        ],
        axis=1,
    )
    draft = jnp.stack([rows(q1)[None].repeat(count, 0), rows(q2)[x1]], axis=1)
    step = jax.jit(lambda *given: speculative_verify(*given, temperature=temperature))(
        key, target, draft, tokens
    )
    found, accepted = words(count, step, tokens)
    law_1, law_2 = softmax(p1 / temperature), softmax(p2 / temperature)
    possible = law_1 > 0
    counts = np.bincount(found[:, 0], minlength=vocabulary)
    assert counts[~possible].sum() == 0
    assert chi_square(counts[possible], law_1[possible]) < QUANTILES[5]
    # The second token, where the first one was accepted.
    pairs = np.zeros((vocabulary, vocabulary))
    np.add.at(pairs, tuple(found[accepted >= 1, :2].T), 1)
    first = pairs.sum(1)
    wanted = first[:, None] * law_2
    some = wanted > 0
    assert pairs[~some].sum() == 0
    statistic = ((pairs - wanted)[some] ** 2 / wanted[some]).sum()
    assert statistic < QUANTILES[35]
    # The acceptance is 1 minus the total variation distance.
    overlap = np.minimum(law_1, softmax(q1 / temperature)).sum()
    assert abs((accepted >= 1).mean() - overlap) < 4 * np.sqrt(0.25 / count)


def test_a_tree_has_the_law_of_the_model():
    """Three children of the prefix, two of the first of them: 60,000 trials."""
    count, vocabulary, parents = 60_000, 6, (-1, -1, -1, 0, 0)
    p = RNG.normal(0, 1, (2, vocabulary))
    q = RNG.normal(0, 1, (2, vocabulary))
    key_1, key_2, key = jax.random.split(KEY, 3)
    rows = lambda z: jnp.asarray(z, jnp.float32)
    first = jax.random.categorical(key_1, rows(q[0]), shape=(count, 3))
    second = jax.random.categorical(key_2, rows(q[1]), shape=(count, 2))
    tokens = jnp.concatenate([first, second], axis=1)
    spread = lambda z: jnp.broadcast_to(rows(z), (count, *np.shape(z)))
    draft = spread(q[[0, 0, 0, 1, 1]])
    target = spread(p[[0, 1, 1, 1, 1, 1]])
    found = jax.jit(lambda *given: speculative_verify_tree(*given, parents=parents))(
        key, target, draft, tokens
    )
    path, taken = np.asarray(found.nodes), np.asarray(found.num_accepted)
    drafted = np.asarray(tokens)
    head = np.where(
        taken >= 1,
        drafted[np.arange(count), np.maximum(path[:, 0], 0)],
        np.asarray(found.next_token),
    )
    law = softmax(p[0])
    assert chi_square(np.bincount(head, minlength=vocabulary), law) < QUANTILES[5]
    went_on = path[:, 0] == 0
    tail = np.where(
        taken == 2,
        drafted[np.arange(count), np.maximum(path[:, 1], 0)],
        np.asarray(found.next_token),
    )[went_on]
    law = softmax(p[1])
    assert chi_square(np.bincount(tail, minlength=vocabulary), law) < QUANTILES[5]
    # Three tries are better than one.
    assert (taken >= 1).mean() > np.minimum(softmax(p[0]), softmax(q[0])).sum() + 0.05


def test_a_tree_of_single_children_accepts_as_a_chain():
    logits = jnp.asarray(RNG.normal(0, 1, (500, 4, 7)), jnp.float32)
    draft = jnp.asarray(RNG.normal(0, 1, (500, 3, 7)), jnp.float32)
    tokens = jax.random.categorical(KEY, draft)
    tree = speculative_verify_tree(KEY, logits, draft, tokens, parents=(-1, 0, 1))
    key_accept, _ = jax.random.split(KEY)
    uniforms = jax.random.uniform(key_accept, (3, 500)).T
    chain = speculative_verify(
        None, logits, draft, tokens, uniforms=(uniforms, jnp.zeros(500))
    )
    np.testing.assert_array_equal(tree.num_accepted, chain.num_accepted)
    steps = np.where(
        np.arange(3) < np.asarray(tree.num_accepted)[:, None], range(3), -1
    )
    np.testing.assert_array_equal(tree.nodes, steps)


def test_greedy_verification_is_the_greedy_sequence():
    target = jnp.asarray(np.eye(5)[[[0, 1, 2, 3], [0, 1, 2, 3]]], jnp.float32)
    tokens = jnp.array([[0, 1, 2], [0, 4, 2]])
    draft = jnp.full((2, 3, 5), jnp.nan)  # not read
    found = speculative_verify(None, target, draft, tokens, temperature=0)
    np.testing.assert_array_equal(found.num_accepted, [3, 1])
    np.testing.assert_array_equal(found.next_token, [3, 1])


def test_a_shorter_draft_ends_before_the_first_false():
    p = jnp.log(jnp.asarray(RNG.dirichlet(np.ones(5), (1, 4)), jnp.float32))
    tokens = jnp.argmax(p[:, :3], -1)
    certain = jnp.where(jax.nn.one_hot(tokens, 5) > 0, 0.0, -jnp.inf)
    zeros = jnp.zeros((1, 3)), jnp.full((1,), 0.999)
    for drafted in range(4):
        found = speculative_verify(
            None,
            p,
            certain,
            tokens,
            where=jnp.arange(3)[None] < drafted,
            uniforms=zeros,
        )
        assert found.num_accepted[0] == drafted
        # The next token is the model's own there, not of a residual.
        held = np.cumsum(np.exp(p[0, drafted]))
        assert found.next_token[0] == min((held <= 0.999).sum(), 4)


def test_equal_laws_accept_everything_and_leave_the_model_s_law():
    z = jnp.asarray(RNG.normal(0, 30, (50, 2, 9)), jnp.float32)
    tokens = jax.random.categorical(KEY, z[:, :1])
    found = speculative_verify(KEY, z, z[:, :1], tokens)
    np.testing.assert_array_equal(found.num_accepted, 1)
    residual = decoding.speculative_residual(z[:, 0], z[:, 0])
    np.testing.assert_allclose(residual, jax.nn.log_softmax(z[:, 0]), atol=1e-5)


def test_residual_is_exact_where_both_are_tiny_oracle():
    with jax.enable_x64():
        z, y = RNG.normal(0, 1, (2, 20, 50)) * 1.0
        z[:, 0], y[:, 0] = -700, -701  # both underflow in float32
        found = decoding.speculative_residual(jnp.asarray(z), jnp.asarray(y))
        p, q = softmax(z), softmax(y)
        rest = np.maximum(p - q, 0)
        with np.errstate(divide="ignore"):
            wanted = np.log(rest / rest.sum(-1, keepdims=True))
        np.testing.assert_allclose(found[:, 1:], wanted[:, 1:], rtol=1e-9)
        narrow = decoding.speculative_residual(
            jnp.asarray(z, jnp.float32), jnp.asarray(y, jnp.float32)
        )
        assert np.isfinite(narrow[:, 0]).all()
        np.testing.assert_allclose(narrow[:, 0], found[:, 0], rtol=1e-5)


def test_a_head_is_verified_as_its_logits():
    hidden = jax.random.normal(KEY, (4, 3, 8))
    table = jax.random.normal(jax.random.key(1), (40, 8))
    head = softlib.LinearLogits(hidden, table)
    draft = 0.7 * head.materialize()[:, :2]
    tokens = jax.random.categorical(KEY, draft)
    for temperature in (1.0, 0.5):
        options: Any = {"temperature": temperature}
        ours = speculative_verify(KEY, head, draft, tokens, **options)
        stored = speculative_verify(KEY, head.materialize(), draft, tokens, **options)
        np.testing.assert_array_equal(ours.num_accepted, stored.num_accepted)
        np.testing.assert_array_equal(ours.next_token, stored.next_token)


def test_nan_accepts_nothing():
    z = jnp.full((1, 2, 4), jnp.nan)
    found = speculative_verify(KEY, z, jnp.zeros((1, 1, 4)), jnp.zeros((1, 1), int))
    assert (int(found.num_accepted[0]), int(found.next_token[0])) == (0, -1)


@pytest.mark.parametrize("length", [0, 1, 4])
def test_expected_tokens_and_their_slope(length):
    alpha = jnp.array([0.0, 1e-6, 0.3, 0.999999, 1.0])
    count = lambda a: decoding.expected_accepted_tokens(a, draft_length=length)
    wanted = sum(np.asarray(alpha, float) ** i for i in range(length + 1))
    np.testing.assert_allclose(count(alpha), wanted, rtol=2e-6)
    slope = jax.vmap(jax.grad(count))(alpha)
    wanted = sum(i * np.asarray(alpha, float) ** (i - 1) for i in range(1, length + 1))
    np.testing.assert_allclose(slope, wanted + 0 * alpha, rtol=1e-3, atol=1e-6)
    assert np.isnan(count(jnp.array([-0.1, 1.1]))).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": (2, 3, 5)}, r"`logits` must be \(2, 3, 4\)"),
        ({"tokens": (2, 1)}, "`draft_tokens`"),
        ({"temperature": -1.0}, "`temperature`"),
        ({"key": None}, "exactly one of `key` and `uniforms`"),
        ({"where": (3, 3)}, "`where`"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    shapes = {"target": (2, 3, 4), "tokens": (2, 2)} | change
    options: dict[str, Any] = {}
    if "temperature" in change:
        options["temperature"] = change["temperature"]
    if "where" in change:
        options["where"] = jnp.ones(change["where"], bool)
    with pytest.raises(ValueError, match=message):
        speculative_verify(
            change.get("key", KEY),
            jnp.zeros(shapes["target"]),
            jnp.zeros((2, 2, 4)),
            jnp.zeros(shapes["tokens"], int),
            **options,
        )


def test_a_tree_s_parents_stand_before_their_children():
    given = jnp.zeros((1, 3, 4)), jnp.zeros((1, 2, 4)), jnp.zeros((1, 2), int)
    with pytest.raises(ValueError, match=r"`parents\[0\]` must be in \[-1, 0\), got 1"):
        speculative_verify_tree(KEY, *given, parents=(1, 0))
    with pytest.raises(ValueError, match="`parents` must have 2 entries"):
        speculative_verify_tree(KEY, *given, parents=(-1,))
