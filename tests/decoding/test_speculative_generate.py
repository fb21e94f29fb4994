"""Sequences drawn through a draft are those of plain decoding."""

import functools
from typing import Any

import jax
import numpy as np
import pytest

import softlib
from softlib import decoding
from softlib.decoding import (
    Draft,
    Drafted,
    ModelDraft,
    NGramDraft,
    PromptLookup,
    RepetitionPenalty,
    TokenAutomaton,
    generate,
    speculative_generate,
)
from tests.host import jnp

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
VOCABULARY, ROOM = 5, 40
# The law of the next token is given by the last two.
LAWS = RNG.dirichlet(np.ones(VOCABULARY), (VOCABULARY, VOCABULARY)).astype(np.float32)
TABLE = np.log(LAWS)
TEXT = RNG.integers(0, VOCABULARY, 60)
OTHER = np.log(RNG.dirichlet(np.ones(VOCABULARY), (VOCABULARY, VOCABULARY)))


def cache(batch):
    """A model's state: tokens that were read, and how many."""
    return jnp.zeros((batch, ROOM), jnp.int32), jnp.zeros(batch, jnp.int32)


def read(tokens, state, *, table=TABLE):
    """Logits behind each of tokens (B, T), from what the cache holds."""
    held, length = state
    rows = jnp.arange(tokens.shape[0])[:, None]
    places = length[:, None] + jnp.arange(tokens.shape[1])[None]
    held = held.at[rows, places].set(tokens, mode="drop")
    before = jnp.where(places > 0, held[rows, places - 1], 0)
    logits = jnp.asarray(table, jnp.float32)[before, held[rows, places]]
    return logits, (held, length + tokens.shape[1])


def one(tokens, state, *, table=TABLE):
    logits, state = read(tokens[:, None], state, table=table)
    return logits[:, 0], state


def forget(state, counts):
    held, length = state
    return held, length - counts


class Random(Draft):
    """Draws three tokens from one law, whatever was said, and says how many count."""

    law = jnp.asarray(np.log([0.4, 0.3, 0.1, 0.1, 0.1]), jnp.float32)

    def propose(self, key, tokens, lengths, state):
        batch = tokens.shape[0]
        law = jnp.broadcast_to(self.law, (batch, 3, VOCABULARY))
        key, key_count = jax.random.split(KEY if key is None else key)
        found = jax.random.categorical(key, law).astype(jnp.int32)
        counts = jax.random.randint(key_count, (batch,), 0, 4)
        return Drafted(found, law, counts, state)


def model_draft(batch):
    small = functools.partial(one, table=OTHER)
    return ModelDraft(small, cache(batch), forget, draft_length=2)


DRAFTS = {
    "lookup": lambda batch: PromptLookup(draft_length=4, shortest=1),
    "counts": lambda batch: NGramDraft.fit(TEXT, order=3, draft_length=3),
    "model": model_draft,
    "random": lambda batch: Random(),
}


def first(batch):
    return jnp.broadcast_to(jnp.asarray(TABLE[0, 0]), (batch, VOCABULARY))


def plain(batch, key, **options):
    return generate(one, cache(batch), first(batch), key=key, **options)


def speculative(batch, key, draft, **options):
    return speculative_generate(
        read, cache(batch), first(batch), key=key, forget=forget,
        draft=DRAFTS[draft](batch), **options,
    )  # fmt: skip


@pytest.mark.parametrize("draft", DRAFTS)
def test_greedy_sequences_are_those_of_plain_decoding(draft):
    """Their probabilities, too; processors that remember make them less of a circle."""
    processors = (RepetitionPenalty(3.0), lambda logits: logits / 2)
    options = {"max_length": 13, "processors": processors, "stop": (3,)}
    ours = jax.jit(lambda: speculative(3, None, draft, **options))()
    wanted = plain(3, None, **options)
    found = ours.generated
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    np.testing.assert_array_equal(found.lengths, wanted.lengths)
    np.testing.assert_allclose(found.log_probs, wanted.log_probs, atol=1e-5)
    # The cache has read all but the last token.
    np.testing.assert_array_equal(found.state[1], found.lengths - 1)
    np.testing.assert_array_equal(ours.num_accepted <= ours.num_drafted, True)


@pytest.mark.parametrize("draft", DRAFTS)
def test_drawn_sequences_have_the_law_of_the_model(draft):
    """Triples of 40,000 sequences, by chi-square at 99.9 %."""
    count = 40_000
    ours = jax.jit(lambda: speculative(count, KEY, draft, max_length=3))()
    tokens = np.asarray(ours.generated.tokens)
    triples = np.zeros((VOCABULARY,) * 3)
    np.add.at(triples, tuple(tokens.T), 1)
    law = LAWS[0, 0][:, None, None] * LAWS[0][:, :, None] * LAWS
    some = law * count > 1
    statistic = ((triples - count * law)[some] ** 2 / (count * law)[some]).sum()
    assert statistic < 180  # of at most 124 degrees of freedom: 178.5
    wanted = np.log(law[tuple(tokens.T)])
    np.testing.assert_allclose(ours.generated.log_probs.sum(1), wanted, atol=1e-4)


def test_a_good_draft_saves_calls_and_a_bad_one_costs_none():
    """A cycle of three tokens; prompt lookup knows it after one round."""
    turning = lambda tokens, state: (
        9.0 * jax.nn.one_hot((tokens + 1) % 3, VOCABULARY),
        state,
    )
    options: dict[str, Any] = {"key": None, "forget": lambda state, counts: state}
    start = 9.0 * jax.nn.one_hot(jnp.array([0]), VOCABULARY)
    draft = PromptLookup(draft_length=8, shortest=2)
    found = speculative_generate(
        turning, (), start, draft=draft, max_length=14, **options
    )
    np.testing.assert_array_equal(found.generated.tokens[0], np.arange(14) % 3)
    # Five single tokens, then nine at once.
    assert found.num_steps == 5
    np.testing.assert_array_equal(found.num_accepted, 8)
    prompt = jnp.array([[1, 2, 0, 1, 2, 4]])
    known = speculative_generate(
        turning, (), start, draft=draft, max_length=14, prompt=prompt,
        prompt_lengths=jnp.array([5]), **options,
    )  # fmt: skip
    np.testing.assert_array_equal(known.generated.tokens, found.generated.tokens)
    assert known.num_steps == 2


def test_a_sequence_without_an_allowed_token_ends():
    table = np.array([[1, 1, 1, 1, 1], [2, 2, 2, 2, 2], [-1] * 5])
    options: dict[str, Any] = {
        "max_length": 6,
        "processors": (TokenAutomaton(table),),
    }
    for key in (None, KEY):
        found = speculative(2, key, "random", **options).generated
        np.testing.assert_array_equal(found.lengths, 2)
        assert found.dead.all()
        assert np.isfinite(found.log_probs).all()
        assert (np.asarray(found.tokens)[:, 2:] == -1).all()


def test_a_head_gives_the_sequences_of_its_logits():
    hidden = jax.random.normal(KEY, (2, 8))
    table = jax.random.normal(jax.random.key(1), (20, 8))

    def run(form, key):
        step = lambda tokens, state: (
            form(softlib.LinearLogits(table[(tokens + 1) % 20], table)),
            state,
        )
        return speculative_generate(
            step, (), form(softlib.LinearLogits(hidden, table)), key=key,
            draft=PromptLookup(2, shortest=1), forget=lambda state, counts: state,
            max_length=6,
        )  # fmt: skip

    for key in (None, KEY):
        ours, stored = run(lambda x: x, key), run(lambda x: x.materialize(), key)
        np.testing.assert_array_equal(ours.generated.tokens, stored.generated.tokens)


def test_certain_tokens_are_those_of_a_law_without_others():
    """A draft without logits; as logits of 0 and -inf."""
    target = jnp.asarray(RNG.normal(size=(50, 4, 6)), jnp.float32)
    tokens = jnp.asarray(RNG.integers(0, 6, (50, 3)))
    draft = jnp.log(jax.nn.one_hot(tokens, 6))
    uniforms = RNG.uniform(size=(50, 3)), RNG.uniform(size=50)
    verify = functools.partial(
        decoding.speculative_verify, None, target, uniforms=uniforms, temperature=0.7
    )
    ours, wanted = verify(None, tokens), verify(draft, tokens)
    np.testing.assert_array_equal(ours.num_accepted, wanted.num_accepted)
    np.testing.assert_array_equal(ours.next_token, wanted.next_token)
    assert set(np.asarray(ours.num_accepted)) >= {0, 1}


def looked_up(row, draft_length, longest, shortest):
    """By trying all earlier places, the latest first."""
    best, length = None, shortest - 1
    for end in range(len(row) - 2, -1, -1):
        same = 0
        while same < longest and end - same >= 0 and row[end - same] == row[-1 - same]:
            same += 1
        if same > length:
            best, length = end, same
    if best is None:
        return None
    row = list(row)
    for _ in range(draft_length):
        best += 1
        row.append(row[best])
    return row[-draft_length:]


def test_prompt_lookup_copies_what_followed_the_longest_match():
    draft = PromptLookup(draft_length=5, longest=3, shortest=2)
    rows = RNG.integers(0, 3, (60, 12))
    lengths = RNG.integers(1, 13, 60)
    tokens = jnp.where(jnp.arange(12)[None] < lengths[:, None], rows, -1)
    found = jax.jit(draft.propose)(None, tokens, jnp.asarray(lengths), ())
    some = 0
    for row, length, tokens, count in zip(
        rows, lengths, np.asarray(found.tokens), np.asarray(found.counts), strict=True
    ):
        wanted = looked_up(row[:length], 5, 3, 2)
        assert count == (0 if wanted is None else 5)
        if wanted is not None:
            some += 1
            assert tokens.tolist() == wanted
    assert 10 < some < 60


def backed_off(text, context, order):
    """The most frequent continuation of the longest known end of a context."""
    for size in range(min(order - 1, len(context)), -1, -1):
        end = list(context[len(context) - size :])
        following = [
            text[i + size]
            for i in range(len(text) - size)
            if list(text[i : i + size]) == end and (text[i : i + size + 1] >= 0).all()
        ]
        if following:
            return np.bincount(following).argmax(), size
    raise AssertionError


@pytest.mark.parametrize("order", [1, 2, 4])
def test_counted_drafts_oracle(order):
    text = RNG.integers(0, 4, 80)
    text[40] = -1  # two texts
    draft = NGramDraft.fit(text, order=order, draft_length=3, shortest=order - 1)
    rows, lengths = RNG.integers(0, 5, (30, 4)), RNG.integers(0, 5, 30)
    tokens = jnp.where(jnp.arange(4)[None] < lengths[:, None], rows, -1)
    found = jax.jit(
        lambda draft: draft.propose(None, tokens, jnp.asarray(lengths), ())
    )(draft)
    for row, length, tokens, count in zip(
        rows, lengths, np.asarray(found.tokens), np.asarray(found.counts), strict=True
    ):
        context, sizes = list(row[:length]), []
        for token in tokens:
            wanted, size = backed_off(text, context, order)
            assert token == wanted
            sizes.append(size)
            context.append(wanted)
        known = [size >= order - 1 for size in sizes]
        assert count == (known.index(False) if False in known else 3)


def test_the_program_of_a_counted_draft_does_not_grow_with_its_tree():
    """Searches that are unrolled compile for minutes with a tree of 100,000 nodes."""

    def size(count):
        draft = NGramDraft.fit(RNG.integers(0, 500, count), draft_length=2)
        propose = lambda draft: draft.propose(
            None, jnp.ones((1, 4), int), jnp.ones(1, int), ()
        )
        return len(str(jax.make_jaxpr(propose)(draft)).splitlines())

    assert size(20_000) == size(50)


@pytest.mark.parametrize(
    ("make", "given", "options", "error", "message"),
    [
        (PromptLookup, (0,), {}, ValueError, "PromptLookup: `draft_length`"),
        (PromptLookup, (2, 1), {}, ValueError, "`shortest` must be at most `longest`"),
        (NGramDraft.fit, ([0.5],), {}, TypeError, "NGramDraft.fit: `tokens` must"),
        (NGramDraft.fit, ([-1],), {}, ValueError, r"`tokens` must be \(N,\)"),
        (NGramDraft.fit, ([1],), {"order": 0}, ValueError, "NGramDraft.fit: `order`"),
        (NGramDraft.fit, ([1],), {"shortest": 4}, ValueError, r"in \[0, 3\], below"),
        (NGramDraft.fit, ([1],), {"shortest": 1.0}, TypeError, "`shortest` must be"),
        (ModelDraft, (one, (), 3), {}, TypeError, "`forget` must be a function"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_drafts_that_cannot_be_are_refused(make, given, options, error, message):
    with pytest.raises(error, match=message):
        make(*given, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_length": 0}, ValueError, "speculative_generate: `max_length`"),
        ({"draft": 3}, TypeError, "`draft` must be a `Draft`, got int"),
        ({"forget": 3}, TypeError, "`forget` must be a function, got int"),
        ({"prompt": jnp.zeros((1, 2), int)}, ValueError, "`prompt` must have"),
        ({"prompt_lengths": jnp.zeros(2, int)}, ValueError, "`prompt_lengths` must be"),
        ({"stop": (5,)}, ValueError, "`stop` must hold tokens"),
        (
            {"step": lambda tokens, state: (jnp.zeros((2, 1, 5)), state)},
            ValueError,
            r"`step` must return logits \(2, 9, 5\)",
        ),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_what_cannot_be_is_refused(options, error, message):
    given: dict[str, Any] = {
        "step": read,
        "draft": PromptLookup(),
        "forget": forget,
        "max_length": 2,
    } | options
    with pytest.raises(error, match=message):
        speculative_generate(given.pop("step"), cache(2), first(2), key=None, **given)
