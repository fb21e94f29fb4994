"""The study of soft thinking: a whole small run, and what its mixtures are."""

import jax
import numpy as np
from flax import nnx
from smollm2 import checkpoints
from soft_thinking_study import mixtures, summaries
from soft_thinking_study.mixtures import VARIANTS, Followed, Settings
from study.command_line import EXAMPLES

from softlib.decoding import ConceptTokens
from tests.examples.smoke import complete_run
from tests.host import jnp

SCRIPT = EXAMPLES / "soft_thinking.py"
SETTINGS = Settings(4, 0.6, 30, 0.95, 0.5)


def test_run_compares_and_draws(tmp_path):
    out, metrics, printed = complete_run(SCRIPT, tmp_path / "smoke")
    assert "concept" in printed
    assert (out / "report.png").is_file()
    found = metrics["findings"]
    assert found["all"].keys() == {*VARIANTS}
    for source in ("addresses", "answers", "all"):
        for numbers in (found[source][variant] for variant in VARIANTS):
            assert numbers["heaviest"]["value"] >= 0
            assert 0 <= numbers["nearest"]["low"] <= numbers["nearest"]["high"] <= 1
    # One position of each passage; those of an answer are one draw of the interval.
    assert found["addresses"]["positions"] == 6
    assert found["addresses"]["concept"]["nearest"]["count"] == 6
    assert found["answers"]["concept"]["nearest"]["count"] == 2
    assert found["positions"] == 6 + found["answers"]["positions"]
    assert found["all"]["concept"]["nearest"]["count"] == 8
    for law in ("heaviest", "blend", "second"):
        assert found["distances"][law] == sorted(found["distances"][law])


def test_positions_of_one_text_are_drawn_together():
    random = np.random.default_rng(0)
    of_text = random.random(40)
    texts = np.repeat(np.arange(40), 25)
    together = summaries.mean(of_text[texts], texts)
    apart = summaries.mean(of_text[texts], np.arange(1000))
    np.testing.assert_allclose(together.value, of_text.mean())
    np.testing.assert_allclose(apart.value, of_text.mean())
    # A text of 25 equal positions says no more than one of them.
    assert together.high - together.low > 4 * (apart.high - apart.low)


def test_shares_are_of_the_positions_of_a_weight():
    weight = np.repeat([0.35, 0.75], 20)[:, None] * np.ones(len(VARIANTS))
    nearest = np.repeat([False, True], 20)[:, None] & np.ones(len(VARIANTS), bool)
    empty = np.zeros_like(weight)
    followed = Followed(nearest, nearest, empty, empty, empty, weight, 1 + empty)
    found = summaries.by_weight(followed, np.arange(40))["gumbel"]
    assert [point["share"].value for point in found] == [0, 1]
    np.testing.assert_allclose([point["weight"] for point in found], [0.35, 0.75])


def test_variants_of_a_mixture():
    concept = ConceptTokens(jnp.array([0.5, 0.3, 0.2, 0.0]), jnp.array([9, 4, 7, -1]))
    found = mixtures.drawn(jax.random.key(0), concept, SETTINGS, 257)
    own, gumbel, shuffled, random = (
        ConceptTokens(*(np.asarray(x)[at] for x in found)) for at in range(4)
    )
    np.testing.assert_array_equal(own.tokens, concept.tokens)
    assert {*gumbel.tokens} == {9, 4, 7, -1}
    np.testing.assert_array_equal(shuffled.tokens, [7, 9, 4, -1])
    for variant in (shuffled, random):
        np.testing.assert_array_equal(variant.weights, concept.weights)
    assert random.tokens[-1] == -1
    assert (random.tokens[:3] >= 0).all()


def test_a_mixture_of_one_token_has_the_law_of_the_token():
    graph, state = nnx.split(checkpoints.tiny().model)
    tokens = jnp.arange(5, 21, dtype=jnp.int32)
    cache, concepts = mixtures.read(graph, state, SETTINGS, tokens)
    assert concepts.tokens.shape == (16, 4)
    one = ConceptTokens(jnp.array([1.0, 0, 0, 0]), concepts.tokens[7])
    found = mixtures.follow(
        graph, state, SETTINGS, cache, one, jnp.int32(7), jax.random.key(1)
    )
    np.testing.assert_allclose(found.heaviest[0], 0, atol=1e-6)
    np.testing.assert_allclose(found.blend[0], 0, atol=1e-6)
    assert found.nearest[0]
    assert found.same_best[0]
    assert (np.asarray(found.second) > 0).all()
