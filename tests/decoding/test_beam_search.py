"""The likeliest sequences, compared with all of them."""

import itertools

import jax
import numpy as np
import pytest

import softlib
from softlib.decoding import TokenAutomaton, beam_search, generate
from tests.host import jnp

# The next token depends on the two before it: (6, 6, 5), token 5 is none.
LAWS = np.random.default_rng(3).dirichlet(0.5 * np.ones(5), (2, 6, 6))
TABLE = np.log(LAWS).astype(np.float32)
STOP = 4


def step(tokens, state):
    which, before = state
    return jnp.asarray(TABLE)[which, before, tokens], (which, tokens)


def search(**options):
    which = jnp.arange(2)
    first = jnp.asarray(TABLE[:, 5, 5])
    start = (which, jnp.full(2, 5))
    return beam_search(step, start, first, **options)


def every(which, length, penalty):
    """All sequences that end by the stop token or have the full length, by score."""
    found = []
    for size in range(1, length + 1):
        for word in itertools.product(range(5), repeat=size):
            ended = word[-1] == STOP
            if STOP in word[:-1] or not (ended or size == length):
                continue
            before, last, total = 5, 5, 0.0
            for token in word:
                total += TABLE[which, before, last, token]
                before, last = last, token
            found.append((total / size**penalty, total, word))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_a_wide_search_finds_the_best_of_all_sequences_oracle(penalty):
    """4 tokens that go on, so 4^2 live beams are all there are before the last."""
    wide = jax.jit(
        lambda: search(num_beams=5, max_length=2, stop=(STOP,), length_penalty=penalty)
    )()
    for which in range(2):
        best = every(which, 2, penalty)[:5]
        np.testing.assert_allclose(wide.scores[which], [b[0] for b in best], rtol=1e-5)
        np.testing.assert_allclose(
            wide.log_probs[which], [b[1] for b in best], rtol=1e-5
        )
        for row, length, b in zip(
            wide.tokens[which], wide.lengths[which], best, strict=True
        ):
            assert tuple(np.asarray(row[:length])) == b[2]
            assert (row[length:] == -1).all()


def test_beams_are_sequences_of_the_model_in_descending_order():
    found = search(num_beams=3, max_length=6, stop=(STOP,), length_penalty=0.7)
    for which in range(2):
        scores = np.asarray(found.scores[which])
        assert (np.diff(scores) <= 0).all()
        known = {b[2]: b for b in every(which, 6, 0.7)}
        for place in range(3):
            length = int(found.lengths[which, place])
            word = tuple(int(t) for t in found.tokens[which, place, :length])
            np.testing.assert_allclose(scores[place], known[word][0], rtol=1e-5)
        # No worse than greedy.
        assert scores[0] >= greedy_score(which, 0.7) - 1e-6


def greedy_score(which, penalty):
    found = greedy()
    length = int(found.lengths[which])
    return float(found.log_probs[which].sum()) / length**penalty


def greedy():
    start = (jnp.arange(2), jnp.full(2, 5))
    first = jnp.asarray(TABLE[:, 5, 5])
    return generate(step, start, first, key=None, max_length=6, stop=(STOP,))


def test_one_beam_is_the_greedy_search():
    found, plain = search(num_beams=1, max_length=6, stop=(STOP,)), greedy()
    np.testing.assert_array_equal(found.tokens[:, 0], plain.tokens)
    np.testing.assert_array_equal(found.lengths[:, 0], plain.lengths)
    np.testing.assert_allclose(found.log_probs[:, 0], plain.log_probs.sum(1), rtol=1e-5)


def test_the_state_follows_its_sequence_on_any_axis():
    """The state is the sequence itself; it must be that of the beam."""
    table = jnp.asarray(TABLE[0, :, 5])

    def remember(tokens, state):
        history, count = state
        history = history.at[count, :, 0].set(tokens)
        newest = history[count, :, 0]
        return table[newest], (history, count + 1)

    start = jnp.full((4, 1, 1), -1), jnp.zeros((), jnp.int32)
    with pytest.raises(ValueError, match="axis"):
        # `count` has no axis of sequences.
        beam_search(remember, start, table[5:], num_beams=2, max_length=4)

    def remember_each(tokens, state):
        history, counts = state
        at = jnp.arange(4)[:, None] == counts[None]
        history = jnp.where(at[:, :, None], tokens[:, None], history)
        return table[tokens], (history, counts + 1)

    start = jnp.full((4, 1, 1), -1), jnp.zeros(1, jnp.int32)
    found = beam_search(
        remember_each, start, table[5:], num_beams=2, max_length=4, state_axes=(1, 0)
    )
    simple = beam_search(
        lambda tokens, state: (table[tokens], state), (), table[5:], num_beams=2,
        max_length=4,
    )  # fmt: skip
    np.testing.assert_array_equal(found.tokens, simple.tokens)


def test_a_head_gives_the_beams_of_its_logits():
    hidden = jax.random.normal(jax.random.key(0), (2, 8))
    table = jax.random.normal(jax.random.key(1), (40, 8))

    def run(form):
        def step(tokens, hidden):
            hidden = jnp.tanh(hidden + table[tokens])
            return form(softlib.LinearLogits(hidden, table)), hidden

        first = form(softlib.LinearLogits(hidden, table))
        return beam_search(step, hidden, first, num_beams=3, max_length=4, stop=(7,))

    ours, stored = run(lambda x: x), run(lambda x: x.materialize())
    np.testing.assert_array_equal(ours.tokens, stored.tokens)
    np.testing.assert_allclose(ours.scores, stored.scores, atol=1e-5)


def test_an_automaton_leaves_few_sequences():
    """Exactly two words are allowed: 0 4 and 1 4."""
    table = np.full((2, 5), -1)
    table[0, 0] = table[0, 1] = 1
    table[1, STOP] = 1
    found = search(
        num_beams=3, max_length=3, stop=(STOP,), processors=(TokenAutomaton(table),)
    )
    np.testing.assert_array_equal(found.lengths, [[2, 2, 0]] * 2)
    assert (found.tokens[:, :2, 1] == STOP).all()
    assert (np.sort(found.tokens[:, :2, 0]) == [0, 1]).all()
    assert (found.log_probs[:, 2] == -np.inf).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 6}, "`num_beams` must be at most the number of tokens, 5"),
        ({"num_beams": 0}, "`num_beams`"),
        ({"max_length": 0}, "`max_length`"),
        ({"stop": (9,)}, "`stop`"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        search(**{"num_beams": 2, "max_length": 2, **options})
