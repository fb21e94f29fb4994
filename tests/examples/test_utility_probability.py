"""The study of pronunciations: a whole small run, its model and its distances."""

import functools
import pathlib

import numpy as np
import pytest
from language_model.failures import Failure
from study.command_line import EXAMPLES
from utility_probability_study import choices, dictionary, gru
from utility_probability_study.dictionary import BEGIN, END, PHONEMES

from tests.examples.smoke import complete_run

SCRIPT = EXAMPLES / "utility_probability.py"
TINY = gru.load(pathlib.Path("tiny"))
WORDS = dictionary.load(EXAMPLES / "data" / "cmudict.dict.xz", 5, 8, 0)


def test_run_chooses_and_draws(tmp_path):
    out, metrics, printed = complete_run(SCRIPT, tmp_path / "smoke")
    assert "Bayes risk" in printed
    assert (out / "report.png").is_file()
    methods = metrics["findings"]["methods"]
    assert methods["greedy"]["over_greedy"]["value"] == 0
    assert methods["beam"]["over_beam"]["value"] == 0
    assert len(methods) == 7
    for numbers in methods.values():
        assert numbers["accuracy"]["count"] == 12
        assert 0 <= numbers["similarity"]["value"] <= 1


def predicted(word, longest):
    """The greedy sounds of one word and their log-probabilities, by NumPy."""
    p = {name: np.asarray(array, np.float64) for name, array in TINY.items()}
    sigmoid = lambda x: 1 / (1 + np.exp(-x))

    def cell(part, x, h):
        ours = x @ p[f"{part}_w_ih"].T + p[f"{part}_b_ih"]
        theirs = h @ p[f"{part}_w_hh"].T + p[f"{part}_b_hh"]
        (r, z, n), (hr, hz, hn) = np.split(ours, 3), np.split(theirs, 3)
        r, z = sigmoid(r + hr), sigmoid(z + hz)
        return (1 - z) * np.tanh(n + r * hn) + z * h

    h = np.zeros(8)
    for letter in word:
        h = cell("enc", p["enc_emb"][letter], h)
    token, tokens, total, utility = BEGIN, [], 0.0, 0.0
    while token != END and len(tokens) < longest:
        h = cell("dec", p["dec_emb"][token], h)
        u = p["fc_w"] @ h + p["fc_b"]
        token = int(u.argmax())
        tokens.append(token)
        utility += u[token]
        total += u[token] - np.log(np.exp(u).sum())
    return tokens, total, utility


def test_the_greedy_search_and_its_scores_oracle():
    found = choices.search(TINY, WORDS.letters, WORDS.lengths, 1, 8)
    scored = choices.candidates(TINY, WORDS, *map(np.asarray, found[:2]))
    for row, length in enumerate(WORDS.lengths):
        tokens, total, utility = predicted(WORDS.letters[row, :length], 8)
        np.testing.assert_array_equal(found.tokens[row, 0, : len(tokens)], tokens)
        np.testing.assert_allclose(scored.log_probs[row, 0], total, rtol=1e-4)
        np.testing.assert_allclose(scored.utilities[row, 0], utility, rtol=1e-4)
    np.testing.assert_allclose(scored.log_probs, found.log_probs, rtol=1e-4)


def test_words_are_those_of_the_dictionary():
    assert len(PHONEMES) == 74
    assert (WORDS.letters[np.arange(5), WORDS.lengths - 1] == 2).all()
    assert ((WORDS.phonemes >= 4) | (WORDS.phonemes == -1)).all()
    assert (WORDS.phonemes[:, 0] >= 4).all()


@functools.cache
def distance(a, b):
    """By its definition."""
    if not a or not b:
        return len(a) + len(b)
    change = distance(a[:-1], b[:-1]) + (a[-1] != b[-1])
    return min(distance(a[:-1], b) + 1, distance(a, b[:-1]) + 1, change)


def test_similarities_oracle():
    random = np.random.default_rng(0)
    lengths = random.integers(0, 6, (3, 4))
    tokens = np.where(np.arange(6) < lengths[..., None], 1, -1)
    tokens = np.where(tokens > 0, random.integers(0, 3, tokens.shape), -1)
    found = choices.similarity(tokens, tokens[:, :3])
    for at in np.ndindex(found.shape):
        a, b = (tuple(t[t >= 0]) for t in (tokens[at[0], at[1]], tokens[at[0], at[2]]))
        wanted = 1 - distance(a, b) / max(len(a), len(b), 1)
        assert found[at] == pytest.approx(wanted)


def test_duplicates_of_samples_count_once_as_candidates():
    tokens = np.array([[[5, 6, END, -1], [5, 6, END, -1], [7, END, -1, -1]]] * 5)
    found = choices.candidates(TINY, WORDS, tokens, (tokens >= 0).sum(-1))
    np.testing.assert_array_equal(found.where, [[True, False, True]] * 5)
    np.testing.assert_array_equal(found.tokens[0, 0], [5, 6, -1, -1])


def test_other_weights_are_refused_in_one_line():
    with pytest.raises(Failure, match="--weights must be g2p or tiny"):
        gru.load(pathlib.Path("gpt"))
