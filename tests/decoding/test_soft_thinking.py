"""Mixtures of tokens: vectors, laws of the draws, filters, edges, errors."""

import pathlib
from typing import Any

import jax
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings, strategies as st

import softlib
from softlib.decoding import ColdStop
from softlib.testing import assert_close, check_transformations
from tests.compiled import decoding
from tests.host import jnp

DATA = pathlib.Path(__file__).parent.parent / "data/soft_thinking_case0.npz"
KEY = jax.random.key(0)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def filtered(z, temperature, top_k, top_p, min_p):
    """The kept probabilities of one row, a filter after the other, in float64."""
    p = softmax(np.asarray(z, np.float64) / temperature)
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))[:top_k]
    for keep in (
        lambda found, before, i: before < top_p,
        lambda found, before, i: found[i] >= min_p * max(found.values()),
    ):
        total = sum(p[i] for i in order)
        found, before, kept = {i: p[i] / total for i in order}, 0.0, []
        for i in order:
            if found[i] > 0 and keep(found, before, i):
                kept.append(i)
            before += found[i]
        order = kept or order[:1]
    weights = np.zeros(len(p))
    weights[order] = p[order] / p[order].sum()
    return weights


def dense(concept, vocabulary):
    """The mixtures as arrays over all tokens."""
    weights, tokens = map(np.asarray, concept)
    found = np.zeros((*tokens.shape[:-1], vocabulary), weights.dtype)
    for at in np.ndindex(tokens.shape):
        if tokens[at] >= 0:
            found[(*at[:-1], tokens[at])] += weights[at]
        else:
            assert weights[at] == 0
    return found


# ----------------------------------------------------------------------------- oracles
def test_matches_independent_vectors(monkeypatch, eager):
    with jax.enable_x64(), np.load(DATA) as data:
        given = {
            name[3:]: jnp.asarray(data[name]) for name in data if name.startswith("in_")
        }
        close = lambda found, name: assert_close(
            found, data[f"out_{name}"], dtype="float64", length=60
        )
        logits, table = given["logits"], given["embedding"]
        concept = decoding.concept_tokens(
            logits,
            temperature=float(given["temperature"]),
            top_k=int(given["top_k"]),
            top_p=float(given["top_p"]),
            min_p=float(given["min_p"]),
        )
        close(dense(concept, 30), "filtered")
        close(decoding.concept_embedding(*concept, table), "concept")
        entropy = softlib.logits.entropy(logits / given["temperature"])
        close(entropy, "entropy")
        close(entropy / np.log(30), "entropy_normalized")

        # The noise of the file in the place of what is drawn.
        of_tokens = lambda name: jnp.take_along_axis(
            given[name], jnp.maximum(concept.tokens, 0), -1
        )
        monkeypatch.setattr(jax.random, "gumbel", lambda *_: of_tokens("gumbel"))
        drawn = decoding.gumbel_concept_tokens(
            KEY, *concept, temperature=float(given["gumbel_tau"])
        )
        close(dense(drawn, 30), "gumbel_weights")
        close(decoding.concept_embedding(*drawn, table), "concept_gumbel")
        log_gamma = jnp.log(jnp.where(of_tokens("gamma") > 0, of_tokens("gamma"), 1))
        monkeypatch.setattr(jax.random, "loggamma", lambda *_, dtype: log_gamma)
        drawn = decoding.dirichlet_concept_tokens(KEY, *concept)
        close(dense(drawn, 30), "dirichlet_weights")


def test_the_stop_of_the_independent_vectors():
    with np.load(DATA) as data:
        entropies = jnp.asarray(data["in_entropies"], jnp.float32)
        options = {
            "threshold": float(data["in_entropy_threshold"]),
            "length": int(data["in_length_threshold"]),
        }
        wanted = int(data["out_cold_stop"])
    # Rows of a batch: as it is, never certain, and certain once it has stopped.
    batch = jnp.stack([entropies, entropies + 1, 0 * entropies])

    def step(state, entropy):
        state = decoding.cold_stop(entropy, *state, **options)
        return state, state.stopped

    start = ColdStop(jnp.zeros(3, jnp.int32), jnp.zeros(3, bool))
    end, stopped = jax.lax.scan(step, start, batch.T)
    first = np.argmax(np.asarray(stopped), 0)
    np.testing.assert_array_equal(first, [wanted, 0, options["length"] - 1])
    np.testing.assert_array_equal(end.stopped, [True, False, True])
    # It stays stopped, with the count that it had.
    np.testing.assert_array_equal(end.count, [options["length"], 0, options["length"]])


def test_a_step_of_another_entropy_begins_the_count_again():
    state = ColdStop(jnp.array([3, 3]), jnp.zeros(2, bool))
    entropy = jnp.array([0.5, 0.499])
    found = decoding.cold_stop(entropy, *state, threshold=0.5, length=5)
    np.testing.assert_array_equal(found.count, [0, 4])
    assert not found.stopped.any()


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["array", "head"])
def test_filters_oracle(kind, dtype):
    with jax.enable_x64(dtype == "float64"):
        random = np.random.default_rng(3)
        make = lambda *shape: jnp.asarray(random.normal(size=shape), dtype)
        if kind == "head":
            logits: Any = softlib.LinearLogits(make(5, 3), 2 * make(23, 3))
            z = logits.materialize()
        else:
            z = logits = make(5, 23).at[1, 4].set(-jnp.inf)
        shares = np.array([0.9, 0.5, 0.0, 1.0, 0.99])
        found = decoding.concept_tokens(
            logits,
            temperature=0.6,
            top_k=9,
            top_p=jnp.asarray(shares, jnp.float32),
            min_p=0.03,
        )
        assert found.weights.dtype == jnp.promote_types(dtype, jnp.float32)
        rows = zip(np.asarray(z, np.float64), shares, strict=True)
        wanted = [filtered(row, 0.6, 9, p, 0.03) for row, p in rows]
        np.testing.assert_allclose(dense(found, 23), wanted, atol=3e-6)
        assert (np.diff(np.asarray(found.weights, np.float64)) <= 1e-6).all()


def test_fewer_tokens_are_the_heaviest_renormalised():
    logits = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3]]))
    found = decoding.concept_tokens(logits, top_k=3, max_tokens=2)
    np.testing.assert_array_equal(found.tokens, [[1, 3]])
    np.testing.assert_allclose(found.weights, [[4 / 7, 3 / 7]], rtol=1e-6)
    everything = decoding.concept_tokens(logits, top_k=99)
    np.testing.assert_array_equal(everything.tokens, [[1, 3, 2, 0]])


def test_the_first_of_equal_logits_is_kept():
    found = decoding.concept_tokens(jnp.zeros((1, 6)), top_k=2)
    np.testing.assert_array_equal(found.tokens, [[0, 1]])


def test_gathered_embeddings_are_those_of_the_dense_product():
    random = np.random.default_rng(0)
    logits = jnp.asarray(random.normal(size=(3, 2, 11)), jnp.float32)
    table = jnp.asarray(random.normal(size=(11, 4)), "bfloat16")
    concept = decoding.concept_tokens(logits, top_k=6, top_p=0.7)
    found = decoding.concept_embedding(*concept, table)
    assert found.dtype == jnp.bfloat16
    wanted = dense(concept, 11) @ np.asarray(table, np.float64)
    assert_close(found, wanted, dtype="bfloat16", length=6)


# ------------------------------------------------------------------------ laws of draws
WEIGHTS = np.array([0.4, 0.3, 0.2, 0.1, 0.0], np.float32)
TOKENS = np.array([3, 8, 1, 0, 7])
TRIALS = 10_000


def many(draw, **options):
    weights, tokens = (np.broadcast_to(x, (TRIALS, 5)) for x in (WEIGHTS, TOKENS))
    found = draw(KEY, weights, tokens, **options)
    assert (np.diff(found.weights) <= 0).all()
    return found


@pytest.mark.parametrize("temperature", [0.1, 5.0])
def test_the_heaviest_token_of_gumbel_weights_is_a_draw(temperature):
    found = many(decoding.gumbel_concept_tokens, temperature=temperature)
    counts = [np.sum(found.tokens[:, 0] == token) for token in TOKENS]
    assert counts[-1] == 0
    expected = WEIGHTS[:4].astype(float)
    expected *= TRIALS / expected.sum()
    assert scipy.stats.chisquare(counts[:4], expected).pvalue > 1e-3
    mean = np.asarray(found.weights)[:, 0].mean()
    assert mean > 0.9 if temperature < 1 else mean < 0.4


def test_mean_and_variance_of_dirichlet_weights():
    found = many(decoding.dirichlet_concept_tokens, concentration=3.0)
    each = dense(found, 9)[:, TOKENS]
    np.testing.assert_allclose(each.mean(0), WEIGHTS, atol=0.015)
    np.testing.assert_allclose(each.var(0), WEIGHTS * (1 - WEIGHTS) / 4, atol=0.006)


def test_limits_of_the_draws():
    certain = many(decoding.dirichlet_concept_tokens, concentration=1e-4)
    assert np.isfinite(certain.weights).all()
    assert (np.asarray(certain.weights)[:, 0] > 0.999).mean() > 0.99
    counts = [np.sum(certain.tokens[:, 0] == token) for token in TOKENS]
    np.testing.assert_allclose(np.array(counts) / TRIALS, WEIGHTS, atol=0.025)
    same = many(decoding.dirichlet_concept_tokens, concentration=1e8, max_tokens=2)
    np.testing.assert_allclose(same.weights[:9], [[4 / 7, 3 / 7]] * 9, atol=1e-3)


def test_hard_weights_have_the_derivative_of_soft_ones():
    def weighed(p, hard):
        values = jnp.arange(5.0) ** 2
        found = decoding.gumbel_concept_tokens(KEY, p, jnp.arange(5), hard=hard)
        return (found.weights * values[found.tokens]).sum()

    p = jnp.full(5, 0.2)
    draw = decoding.gumbel_concept_tokens
    hard, soft = (draw(KEY, p, jnp.arange(5), hard=hard) for hard in (True, False))
    assert hard.tokens[0] == soft.tokens[0]
    np.testing.assert_array_equal(hard.weights, [1, 0, 0, 0, 0])
    one, other = (np.asarray(jax.grad(weighed)(p, hard)) for hard in (True, False))
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    assert np.abs(one).max() > 0.1


# -------------------------------------------------------------------------------- edges
def test_rows_without_tokens_and_with_bad_ones():
    inf, nan = jnp.inf, jnp.nan
    logits = jnp.array([[-inf, -inf, -inf], [-inf, 2.0, -inf], [nan, 0.0, 0.0]])
    concept = decoding.concept_tokens(logits, top_k=2, top_p=0.9, min_p=0.1)
    np.testing.assert_array_equal(concept.weights[:2], [[0, 0], [1, 0]])
    np.testing.assert_array_equal(concept.tokens[:2], [[-1, -1], [1, -1]])
    assert np.isnan(concept.weights[2]).all()
    table = jnp.arange(6.0).reshape(3, 2)
    for drawn in (
        concept,
        decoding.gumbel_concept_tokens(KEY, *concept),
        decoding.dirichlet_concept_tokens(KEY, *concept),
    ):
        found = decoding.concept_embedding(*drawn, table)
        np.testing.assert_array_equal(found[:2], [[0, 0], [2, 3]])
        assert np.isnan(found[2]).all()


def test_a_token_beyond_the_table_counts_as_nothing_only_without_weight():
    table = jnp.ones((3, 2)).at[0].set(jnp.nan)
    weights = jnp.array([[1.0, 0.0], [0.5, 0.5], [1.0, 0.0]])
    tokens = jnp.array([[1, -1], [1, 3], [2, 7]])
    found = decoding.concept_embedding(weights, tokens, table)
    np.testing.assert_array_equal(found, [[1, 1], [np.nan] * 2, [1, 1]])


def test_the_derivative_by_logits_is_that_of_the_kept_ones():
    z = jnp.array([1.0, -2.0, 0.5, 0.0, -jnp.inf])
    table = jnp.sin(jnp.arange(10.0)).reshape(5, 2)

    def ours(z):
        concept = decoding.concept_tokens(z, top_k=3)
        return decoding.concept_embedding(*concept, table).sum()

    def by_definition(z):
        kept = jnp.where(jnp.array([True, False, True, True, False]), z, -jnp.inf)
        return (jax.nn.softmax(kept) @ table).sum()

    found, wanted = jax.grad(ours)(z), jax.grad(by_definition)(z)
    assert np.any(wanted)
    assert_close(found, wanted, dtype="float32", length=5)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_draws_stay_among_the_kept_tokens_and_sum_to_one(seed):
    random = np.random.default_rng(seed)
    logits = jnp.asarray(3 * random.normal(size=(4, 12)), "bfloat16")
    concept = decoding.concept_tokens(logits, top_k=5, top_p=0.8)
    key = jax.random.key(seed)
    for drawn in (
        decoding.gumbel_concept_tokens(key, *concept),
        decoding.dirichlet_concept_tokens(key, *concept, concentration=0.1),
    ):
        np.testing.assert_allclose(drawn.weights.sum(-1), 1, atol=1e-6)
        assert not dense(drawn, 12)[dense(concept, 12) == 0].any()


@pytest.mark.slow
def test_every_transformation():
    random = np.random.default_rng(0)
    make = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)

    def function(logits, table, temperature):
        concept = decoding.concept_tokens(logits, top_k=4, temperature=temperature)
        return (concept.weights, decoding.concept_embedding(*concept, table))

    temperature = jnp.float32(0.7)
    check_transformations(function, make(8, 6), make(6, 3), temperature, rows=(0,))


@pytest.mark.usefixtures("untyped")
def test_errors_name_the_argument():
    w, ids, table = jnp.ones((2, 3)), jnp.ones((2, 3), int), jnp.ones((5, 4))
    cut: Any = decoding.concept_tokens
    gumbel: Any = decoding.gumbel_concept_tokens
    dirichlet: Any = decoding.dirichlet_concept_tokens
    embed: Any = decoding.concept_embedding
    stop: Any = decoding.cold_stop
    hot = softlib.logits.StoredLogits(w, temperature=2.0)
    n, no = jnp.zeros(2, int), jnp.zeros(2, bool)
    low = jnp.zeros(2)
    for call, error, message in (
        (lambda: cut(w, top_k=0), ValueError, "`top_k` must be at least 1"),
        (lambda: cut(w, top_k=2.0), TypeError, "`top_k` must be a Python int"),
        (lambda: cut(w, max_tokens=0), ValueError, "`max_tokens` must be at least 1"),
        (lambda: cut(w, temperature=0.0), ValueError, "`temperature` must be positive"),
        (lambda: cut(hot, temperature=1.0), ValueError, "`temperature` of the logits"),
        (lambda: cut(w, top_p=1.5), ValueError, r"`top_p` must be in \[0, 1\]"),
        (lambda: cut(w, top_p=w), ValueError, r"`top_p` must have shape \(\) or \(2,"),
        (lambda: cut(w, min_p=ids[0, 0]), TypeError, "`min_p` must have a floating"),
        (lambda: cut(ids), TypeError, "`logits` must"),
        (lambda: gumbel(KEY, ids, ids), TypeError, "`weights` must have a floating"),
        (lambda: gumbel(KEY, w, w), TypeError, "`tokens` must have an integer"),
        (lambda: gumbel(KEY, w, ids[0]), ValueError, r"`tokens` must have shape \(2, "),
        (lambda: gumbel(KEY, w, ids, temperature=0), ValueError, "`temperature` must"),
        (
            lambda: dirichlet(KEY, w, ids, concentration=0.0),
            ValueError,
            "`concentration` must be positive",
        ),
        (
            lambda: dirichlet(KEY, w, ids, max_tokens=True),
            TypeError,
            "`max_tokens` must be a Python int",
        ),
        (lambda: embed(w, ids, w[0]), ValueError, "`embedding` must have two axes"),
        (lambda: embed(w[0, 0], n[0], table), ValueError, "`weights` must have at"),
        (
            lambda: stop(low, n, no, threshold=-1, length=1),
            ValueError,
            "`threshold` must be >= 0",
        ),
        (
            lambda: stop(low, n, n, threshold=0.1, length=1),
            TypeError,
            "`stopped` must have dtype bool",
        ),
        (
            lambda: stop(low, n[:1], no, threshold=0.1, length=1),
            ValueError,
            r"`count` must have shape \(2,\)",
        ),
        (
            lambda: stop(low, n, no, threshold=0.1, length=0),
            ValueError,
            "`length` must be at least 1",
        ),
    ):
        name = r"(gumbel_|dirichlet_)?concept_tokens|concept_embedding|cold_stop"
        with pytest.raises(error, match=rf"^({name}): .*{message}"):
            call()
