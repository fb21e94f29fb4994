"""Sequences drawn from a model, and what changes its logits."""

import functools

import jax
import numpy as np
import pytest

import softlib
from softlib import decoding
from softlib.decoding import RepetitionPenalty, TokenAutomaton, generate, typical_logits
from tests.host import jnp

KEY = jax.random.key(0)
# A chain over 5 tokens: the law of the next token is a row of the table.
LAWS = np.random.default_rng(0).dirichlet(np.ones(5), 6).astype(np.float32)
TABLE = np.log(LAWS)
FIRST = TABLE[5:]


def chain(tokens, state):
    return jnp.asarray(TABLE)[tokens], state + 1


def drawn(batch, key, **options):
    first = jnp.broadcast_to(FIRST, (batch, 5))
    return generate(chain, jnp.zeros(()), first, key=key, **options)


def by_hand(length, stop=()):
    """The greedy sequence and the log-probabilities of its tokens."""
    law, tokens, log_probs = TABLE[5], [], []
    for _ in range(length):
        tokens.append(int(law.argmax()))
        log_probs.append(law.max())
        if tokens[-1] in stop:
            break
        law = TABLE[tokens[-1]]
    return tokens, log_probs


def test_greedy_takes_the_likeliest_token_each_time():
    found = jax.jit(lambda: drawn(2, None, max_length=7))()
    tokens, log_probs = by_hand(7)
    np.testing.assert_array_equal(found.tokens, [tokens] * 2)
    np.testing.assert_allclose(found.log_probs, [log_probs] * 2, rtol=1e-5)
    np.testing.assert_array_equal(found.lengths, 7)
    # No step after the last token.
    assert found.state == 6
    assert not found.dead.any()


def test_sequences_are_drawn_with_the_probabilities_of_the_model():
    count = 20_000
    found = drawn(count, KEY, max_length=2)
    pairs = np.zeros((5, 5))
    np.add.at(pairs, tuple(np.asarray(found.tokens).T), 1)
    law = LAWS[5][:, None] * LAWS[:5]
    statistic = ((pairs - count * law) ** 2 / (count * law)).sum()
    assert statistic < 51.2  # chi-square of 24 degrees of freedom at 99.9 %
    tokens = np.asarray(found.tokens)
    np.testing.assert_allclose(found.log_probs[:, 0], TABLE[5][tokens[:, 0]], atol=1e-5)
    np.testing.assert_allclose(
        found.log_probs[:, 1], TABLE[tokens[:, 0], tokens[:, 1]], atol=1e-5
    )


def test_a_sequence_ends_with_its_stop_token_and_the_loop_with_the_last_sequence():
    found = drawn(64, KEY, max_length=50, stop=(0, 3))
    for row, length in zip(np.asarray(found.tokens), found.lengths, strict=True):
        assert row[length - 1] in (0, 3)
        assert not set(row[: length - 1]) & {0, 3}
        assert (row[length:] == -1).all()
    assert (found.log_probs == 0)[found.tokens < 0].all()
    assert found.state == found.lengths.max() - 1 < 49


def test_a_head_gives_the_sequences_of_its_logits():
    """Equal noise, so equal tokens; the head's logits are not formed."""
    hidden = jax.random.normal(KEY, (3, 8))
    table = jax.random.normal(jax.random.key(1), (40, 8))
    head = lambda hidden: softlib.LinearLogits(hidden, table)

    def step(form, tokens, hidden):
        hidden = jnp.tanh(hidden + table[tokens])
        return form(head(hidden)), hidden

    for key in (KEY, None):
        run = lambda form, key=key: generate(
            functools.partial(step, form), hidden, form(head(hidden)), key=key,
            max_length=6, stop=(7,),
        )  # fmt: skip
        ours, stored = run(lambda x: x), run(lambda x: x.materialize())
        np.testing.assert_array_equal(ours.tokens, stored.tokens)
        np.testing.assert_allclose(ours.log_probs, stored.log_probs, atol=1e-5)


def test_processors_run_in_order_and_remember():
    """Twice the temperature, then a token is never drawn again."""
    halve = lambda logits: logits / 2
    never = RepetitionPenalty(1e30)
    low = jnp.full((1, 5), -1.0).at[0, 2].set(-0.1)
    step = lambda tokens, state: (low.repeat(tokens.shape[0], 0), state)
    found = generate(step, (), low, key=None, max_length=3, processors=(halve, never))
    np.testing.assert_array_equal(found.tokens, [[2, 0, 1]])
    laws = np.array([-1, -1, -0.1, -1, -1]) / 2
    first = laws[2] - np.log(np.exp(laws).sum())
    np.testing.assert_allclose(found.log_probs[0, 0], first, rtol=1e-5)


def test_the_prompt_counts_as_seen():
    penalty = RepetitionPenalty(2.0, jnp.array([[1, -1], [0, 9]]))
    z = jnp.array([[1.0, 1.0, -1.0]] * 2)
    found = penalty.process(z, penalty.init(2, 3))
    np.testing.assert_array_equal(found, [[1, 0.5, -1], [0.5, 1, -1]])


def test_an_automaton_allows_only_its_language():
    """Words a b* c, where c is the stop token."""
    a, b, c = 0, 1, 2
    table = np.full((3, 5), -1)
    table[0, a], table[1, b], table[1, c] = 1, 1, 2
    found = drawn(
        300, KEY, max_length=60, stop=(c,), processors=(TokenAutomaton(table),)
    )
    for row, length in zip(np.asarray(found.tokens), found.lengths, strict=True):
        word = [a] + [b] * (int(length) - 2) + [c]
        assert row[:length].tolist() == word
    assert len(set(np.asarray(found.lengths))) > 3


def test_a_sequence_without_an_allowed_token_ends():
    """After token 1 nothing is allowed."""
    table = np.array([[-1, 1, -1, -1, -1], [-1] * 5])
    automaton = TokenAutomaton(table)
    for key in (None, KEY):
        found = drawn(2, key, max_length=4, processors=(automaton,))
        np.testing.assert_array_equal(found.tokens, [[1, -1, -1, -1]] * 2)
        np.testing.assert_array_equal(found.lengths, 1)
        assert found.dead.all()
        assert np.isfinite(found.log_probs).all()


def test_tokens_are_handed_out_while_they_are_drawn():
    heard = []
    hear = lambda tokens, count: heard.append((int(count), np.asarray(tokens).tolist()))
    found = drawn(2, KEY, max_length=3, on_token=hear)
    jax.effects_barrier()
    assert heard == [(i, np.asarray(found.tokens)[:, i].tolist()) for i in range(3)]


@pytest.mark.parametrize("mass", [0.2, 0.5, 0.9, 1.0])
def test_typical_tokens_oracle(mass):
    z = np.random.default_rng(1).normal(0, 2, (7, 30))
    found = np.isfinite(typical_logits(jnp.asarray(z, jnp.float32), mass=mass))
    for row, kept in zip(z, np.asarray(found), strict=True):
        p = np.exp(row - row.max())
        p /= p.sum()
        order = np.argsort(np.abs(-np.log(p) - (-(p * np.log(p)).sum())))
        count = int((np.cumsum(p[order]) < mass).sum()) + 1 if mass < 1 else 30
        assert set(np.flatnonzero(kept)) == set(order[:count])


def test_typical_logits_of_impossible_tokens():
    z = jnp.array([[0.0, -jnp.inf, -jnp.inf], [-jnp.inf] * 3])
    found = typical_logits(z, mass=0.5)
    np.testing.assert_array_equal(found, z)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_length": 0}, ValueError, "`max_length`"),
        ({"max_length": 2.0}, TypeError, "max_length"),
        ({"stop": (5,)}, ValueError, r"`stop` must hold tokens in \[0, 5\), got 5"),
        ({"stop": ("a",)}, TypeError, "stop"),
        ({"processors": (3,)}, TypeError, "processors"),
        (
            {"processors": (TokenAutomaton(np.zeros((2, 4), int)),)},
            ValueError,
            r"`transitions` must be \(states, V\) with V = 5",
        ),
        (
            {"processors": (RepetitionPenalty(2.0, jnp.zeros((3, 1), int)),)},
            ValueError,
            r"`prompt` must be \(2, T\)",
        ),
    ],
)
def test_what_cannot_be_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        drawn(2, KEY, **{"max_length": 2, **options})


def test_logits_need_a_row_per_sequence():
    with pytest.raises(ValueError, match=r"`logits` must be \(B, V\)"):
        generate(chain, (), jnp.zeros(5), key=None, max_length=1)
    with pytest.raises(ValueError, match="`penalty` must be >= 1"):
        RepetitionPenalty(0.5)
    with pytest.raises(ValueError, match="`mass`"):
        decoding.typical_logits(jnp.zeros(3), mass=0.0)
