"""Viterbi's algorithm against enumeration."""

import functools
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from softlib import decoding
from tests.host import jnp
from tests.oracles import crf as oracle

DATA = pathlib.Path(__file__).parent.parent / "data/valb_case0.npz"
NAMES = ("emissions", "transitions", "start", "end")
METHODS = ("sequential", "associative")
every_method = pytest.mark.parametrize("method", METHODS)


def problem(seed=0, steps=5, labels=3, rows=8):
    """Scores that are whole numbers, so that there are ties, and sums are exact."""
    random = np.random.default_rng(seed)
    draw = lambda *shape: random.integers(-1, 2, shape).astype(np.float32)
    arrays = {
        "emissions": draw(rows, steps, labels),
        "transitions": draw(labels, labels),
        "start": draw(labels),
        "end": draw(labels),
    }
    where = np.arange(steps) < random.integers(0, steps + 1, (rows, 1))
    where[0], where[1] = True, False
    where[2] = random.uniform(size=steps) < 0.6
    return arrays, where


@functools.partial(jax.jit, static_argnames="method")
def viterbi(arrays, where, method: Any = "sequential"):
    return decoding.crf_viterbi(**arrays, where=where, method=method)


@every_method
@pytest.mark.parametrize(("steps", "labels"), [(5, 3), (1, 4), (7, 2)])
def test_matches_oracle_with_ties(steps, labels, method):
    for seed in range(5):
        arrays, where = problem(seed, steps, labels)
        targets = np.zeros(where.shape, int)
        wanted = oracle.field(**arrays, labels=targets, where=where)
        found = viterbi(arrays, where, method)
        np.testing.assert_array_equal(found.tags, wanted.best)
        np.testing.assert_array_equal(found.score, wanted.score)


@every_method
def test_matches_independent_vectors(method):
    with jax.enable_x64():
        data = dict(np.load(DATA).items())
        arrays = {name: jnp.asarray(data[f"in_{name}"]) for name in NAMES}
        where = jnp.asarray(np.arange(5) < data["in_lengths"][:, None])
        found = viterbi(arrays, where, method)
        np.testing.assert_array_equal(found.tags, data["out_viterbi"])
        assert found.score.dtype == jnp.float64


@every_method
def test_forbidden_transitions_are_not_taken(method):
    arrays, where = problem(3)
    where[0] = True
    arrays["transitions"][[0, 2], [1, 2]] = -np.inf
    arrays["emissions"][3], where[3] = -np.inf, True  # all labels are forbidden
    targets = np.zeros(where.shape, int)
    wanted = oracle.field(**arrays, labels=targets, where=where)
    found = viterbi(arrays, where, method)
    np.testing.assert_array_equal(found.score, wanted.score)
    assert np.isneginf(found.score[3])
    possible = np.isfinite(wanted.score)
    np.testing.assert_array_equal(found.tags[possible], wanted.best[possible])


def test_the_score_has_the_derivative_of_the_score_of_its_tags():
    arrays, where = problem(4)
    gradient = jax.jit(jax.grad(lambda arrays: viterbi(arrays, where).score.sum()))
    found = gradient(arrays)["emissions"]
    tags = viterbi(arrays, where).tags
    taken = (np.asarray(tags)[..., None] == np.arange(3)) & where[..., None]
    np.testing.assert_array_equal(found, taken)


def test_no_step_and_no_row():
    for shape in ((2, 0, 3), (0, 4, 3)):
        for method in METHODS:
            found = decoding.crf_viterbi(
                jnp.zeros(shape), jnp.zeros((3, 3)), method=method
            )
            assert found.tags.shape == shape[:-1]
            np.testing.assert_array_equal(found.score, np.zeros(shape[:1]))


@pytest.mark.usefixtures("untyped")
def test_errors():
    emissions = jnp.zeros((2, 3))
    unknown: dict[str, Any] = {"method": "tree"}
    with pytest.raises(ValueError, match=r"^crf_viterbi: `method` must be one of"):
        decoding.crf_viterbi(emissions, jnp.zeros((3, 3)), **unknown)
    with pytest.raises(ValueError, match=r"^crf_viterbi: `transitions` must have"):
        decoding.crf_viterbi(emissions, jnp.zeros((2, 2)))
