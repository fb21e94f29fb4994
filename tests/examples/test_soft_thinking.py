"""The study of soft thinking: a whole small run, and what its mixtures are."""

import jax
import numpy as np
from flax import nnx
from smollm2 import checkpoints
from soft_thinking_study import mixtures
from soft_thinking_study.mixtures import VARIANTS, Settings
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
    # One position of each passage, and those of the answers.
    assert found["addresses"]["concept"]["nearest"]["count"] == 6
    assert (
        len(found["positions"]["weight"]) == found["all"]["concept"]["nearest"]["count"]
    )


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
