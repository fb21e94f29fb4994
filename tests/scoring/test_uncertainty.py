"""Scores of uncertain text: vectors, oracles, accuracy near certainty, memory."""

import functools
import itertools
import pathlib

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import softlib
from softlib.logits import StoredLogits
from softlib.testing import assert_close, check_transformations
from tests.compiled import scoring
from tests.host import jnp

DATA = pathlib.Path(__file__).parent.parent / "data/g_nll_case0.npz"


def log_softmax(z):
    top = z.max(-1, keepdims=True)
    return z - top - np.log(np.exp(z - top).sum(-1, keepdims=True))


# ----------------------------------------------------------------------------- vectors
def test_greedy_nll_matches_independent_vectors():
    with jax.enable_x64(), np.load(DATA) as data:
        where = jnp.asarray(data["in_where"])
        check = functools.partial(assert_close, dtype="float64", length=60)

        def run(z):
            nll = scoring.greedy_nll(z, where=where)
            return nll.sum(), nll

        z = jnp.asarray(data["in_logits"])
        gradient, nll = jax.grad(run, has_aux=True)(z)
        check(nll, data["out_gnll"])
        # The vectors' gradient is of finite differences.
        np.testing.assert_allclose(gradient, data["out_grad_logits_of_sum"], atol=1e-8)
        by_token = scoring.sequence_nll(z, z.argmax(-1), where=where)
        check(by_token, nll)


def test_greedy_is_not_the_mode_of_a_markov_chain_in_the_vectors():
    with jax.enable_x64(), np.load(DATA) as data:
        first, then = data["in_markov_logits0"], data["in_markov_logits"]
        steps, tokens = [], []
        for _ in range(data["in_markov_length"]):
            steps.append(then[tokens[-1]] if tokens else first)
            tokens.append(int(np.argmax(steps[-1])))
        np.testing.assert_array_equal(tokens, data["out_markov_greedy_tokens"])
        greedy = scoring.greedy_nll(jnp.asarray(np.stack(steps)))
        check = functools.partial(assert_close, dtype="float64", length=36)
        check(greedy, data["out_markov_greedy_nll"])
        # All sequences, of which the likeliest is likelier.
        every = np.array([*itertools.product(range(9), repeat=4)])
        rows = np.stack([np.broadcast_to(first, (9**4, 9)), *then[every[:, :3].T]], 1)
        exact = scoring.sequence_nll(jnp.asarray(rows), jnp.asarray(every))
        check(exact.min(), data["out_markov_min_nll"])
        assert exact.min() < greedy - 1e-3
        assert_close(np.exp(-exact).sum(), 1.0, dtype="float64", length=9**4)


# ---------------------------------------------------------------------------- certainty
@pytest.mark.parametrize("kind", ["array", "stored", "head"])
def test_hundreds_of_certain_tokens_add_up(kind):
    """Each is 2e-9: a float32 logsumexp rounds them all to 0."""
    tokens = 400
    hidden = jnp.full((1, tokens, 1), 20.0)
    table = jnp.array([[1.0], [0.0], [-1.0]])
    logits = {
        "array": hidden * table.T[None],
        "stored": StoredLogits(hidden * table.T[None] / 2, scale=2.0),
        "head": softlib.LinearLogits(hidden, table),
    }[kind]
    wanted = tokens * np.log1p(np.exp(-20.0) + np.exp(-40.0))
    found = scoring.greedy_nll(logits)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    labels = jnp.zeros((1, tokens), int)
    np.testing.assert_allclose(scoring.sequence_nll(logits, labels), wanted, rtol=1e-5)

    def of_hidden(hidden):
        return scoring.greedy_nll(softlib.LinearLogits(hidden, table)).sum()

    slope = -np.exp(-20.0) - 2 * np.exp(-40.0)
    gradient = jax.grad(of_hidden)(hidden)
    np.testing.assert_allclose(gradient, slope, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_means_masks_and_dtypes(dtype):
    random = np.random.default_rng(0)
    with jax.enable_x64(dtype == "float64"):
        z = jnp.asarray(random.normal(size=(4, 5, 7)), dtype)
        tokens = jnp.asarray(random.integers(0, 7, (4, 5)))
        where = jnp.asarray(random.uniform(size=(4, 5)) < 0.6).at[0].set(False)
        log_p = log_softmax(np.asarray(z, np.float64))
        entropies = -(np.exp(log_p) * log_p).sum(-1)
        each = -np.take_along_axis(log_p, np.asarray(tokens)[..., None], -1)[..., 0]
        dirty = jnp.where(where[..., None], z, jnp.nan)
        count = np.maximum(np.asarray(where).sum(-1), 1)
        for function, wanted in (
            (lambda **o: scoring.sequence_nll(dirty, tokens, **o), each),
            (lambda **o: scoring.greedy_nll(dirty, **o), -log_p.max(-1)),
            (lambda **o: scoring.sequence_entropy(dirty, **o), entropies),
        ):
            total = np.where(where, wanted, 0).sum(-1)
            for normalize, divisor in (("sum", 1), ("mean", count)):
                found = function(where=where, normalize=normalize)
                assert found.dtype == jnp.promote_types(dtype, jnp.float32)
                assert_close(found, total / divisor, dtype=found.dtype, length=35)
                assert found[0] == 0


def test_broken_tokens_stay_in_their_sequence():
    z = jnp.zeros((3, 2, 4)).at[1, 0, 2].set(-jnp.inf)
    tokens = jnp.array([[0, 4], [2, 0], [1, 1]])

    def run(z):
        nll = scoring.sequence_nll(z, tokens)
        return jnp.where(jnp.isfinite(nll), nll, 0).sum(), nll

    gradient, nll = jax.grad(run, has_aux=True)(z)
    np.testing.assert_allclose(nll, [np.nan, np.inf, 2 * np.log(4)], rtol=1e-6)
    assert not np.asarray(gradient[:2]).any()
    assert np.isfinite(gradient).all()


# ------------------------------------------------------------------------------ samples
def semantic(nll, groups, where, weights):
    """By a dictionary of groups."""
    total: dict[int, float] = {}
    for n, g, w in zip(nll, groups, where, strict=True):
        if w:
            weight = np.exp(-n) if weights == "probability" else 1.0
            total[g] = total.get(g, 0.0) + weight
    p = np.array([*total.values()]) / max(sum(total.values()), 1e-300)
    p = p[p > 0]
    return -(p * np.log(p)).sum()


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), weights=st.sampled_from(["probability", "count"]))
def test_semantic_entropy_matches_its_oracle(seed, weights):
    random = np.random.default_rng(seed)
    nll = (60 + 3 * random.normal(size=(2, 6))).astype(np.float32)
    groups = random.choice([-5, 0, 7, 10**6], (2, 6))
    where = random.uniform(size=(2, 6)) < 0.8
    nll = np.where(where, nll, np.nan)
    nll[0, 0], where[0, 0] = np.inf, True
    if weights == "count":
        nll = np.where(nll == np.inf, 60, nll)
    found = scoring.semantic_entropy(
        jnp.asarray(nll), jnp.asarray(groups), weights=weights, where=where
    )
    of_row = lambda i: semantic(nll[i] - 60, groups[i], where[i], weights)
    assert_close(found, [of_row(0), of_row(1)], dtype="float32", length=6, c=16)
    assert (np.asarray(found) >= 0).all()
    renamed = scoring.semantic_entropy(
        jnp.asarray(nll), jnp.asarray(3 - groups), weights=weights, where=where
    )
    np.testing.assert_array_equal(renamed, found)


def test_semantic_entropy_of_extremes():
    """One meaning, all different, none possible; finite gradients."""
    nll, different = jnp.full((1, 4), 5000.0), jnp.arange(4)[None]
    of = scoring.semantic_entropy
    assert of(nll, jnp.zeros_like(different)) == 0
    np.testing.assert_allclose(of(nll, different), np.log(4), rtol=1e-6)
    impossible = jnp.full((1, 4), jnp.inf)
    assert of(impossible, different) == 0
    for start in (nll, impossible, nll.at[0, 1].set(jnp.inf)):
        gradient = jax.grad(lambda n: of(n, different // 2).sum())(start)
        assert np.isfinite(gradient).all()


def test_predictive_entropy_is_the_mean_that_counts():
    nll = jnp.array([[2.0, 4.0, jnp.nan], [jnp.nan] * 3])
    where = jnp.array([[True, True, False], [False] * 3])
    np.testing.assert_array_equal(scoring.predictive_entropy(nll, where=where), [3, 0])


def test_groups_of_similar_samples():
    """In their order, each with the first that it resembles."""
    similarity = np.eye(5)
    for i, j in ((2, 0), (3, 2), (4, 1), (4, 0)):
        similarity[i, j] = similarity[j, i] = 0.9
    find = functools.partial(scoring.similar_groups, jnp.asarray(similarity))
    # Sample 3 resembles 2, which is no group's first.
    np.testing.assert_array_equal(find(threshold=0.8), [0, 1, 0, 3, 0])
    where = jnp.array([False, True, True, True, True])
    np.testing.assert_array_equal(find(threshold=0.8, where=where), [0, 1, 2, 2, 1])
    np.testing.assert_array_equal(find(threshold=0.95), range(5))


# ------------------------------------------------------------------------------- memory
ROWS, CLASSES, WIDTH = 8192, 256_000, 64
SCORES = {
    "sequence_nll": lambda z, tokens: softlib.scoring.sequence_nll(z, tokens),
    "greedy_nll": lambda z, tokens: softlib.scoring.greedy_nll(z),
    "sequence_entropy": lambda z, tokens: softlib.scoring.sequence_entropy(z),
    "entropy_test": lambda z, tokens: softlib.scoring.entropy_test(z, tokens),
    "two_model_test": lambda z, tokens: softlib.scoring.two_model_test(z, z, tokens),
}


@pytest.mark.parametrize("name", SCORES)
def test_a_large_head_is_scored_without_its_logits(name):
    shape = lambda *axes: jax.ShapeDtypeStruct(axes, jnp.float32)

    def score(hidden, weight, tokens):
        return SCORES[name](softlib.LinearLogits(hidden, weight), tokens)

    arrays = shape(8, ROWS // 8, WIDTH), shape(CLASSES, WIDTH)
    tokens = jax.ShapeDtypeStruct((8, ROWS // 8), jnp.int32)
    memory = jax.jit(score).lower(*arrays, tokens).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 0.02 * ROWS * CLASSES * 4


@pytest.mark.parametrize("name", SCORES)
def test_scores_of_a_head_equal_those_of_its_logits(name):
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
    hidden, weight = draw(3, 5, 8), draw(300, 8) / 2
    tokens = jnp.asarray(random.integers(0, 300, (3, 5)))
    head = softlib.LinearLogits(hidden, weight, vocab_chunk=64)
    found, wanted = (
        jax.tree.leaves(SCORES[name](logits, tokens))
        for logits in (head, head.materialize())
    )
    for one, two in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6, atol=1e-6)


# --------------------------------------------------------------------------- transforms
@pytest.mark.slow
def test_every_transformation():
    random = np.random.default_rng(0)
    z = jnp.asarray(random.normal(size=(8, 3, 5)), jnp.float32)
    tokens = jnp.asarray(random.integers(0, 5, (8, 3)))

    def function(z, tokens):
        nll = softlib.scoring.sequence_nll(z, tokens, normalize="mean")
        samples = jnp.stack([nll, softlib.scoring.greedy_nll(z)], -1)
        groups = jnp.stack([tokens[:, 0], tokens[:, 1]], -1)
        return (
            softlib.scoring.semantic_entropy(samples, groups),
            softlib.scoring.predictive_entropy(samples),
            softlib.scoring.sequence_entropy(z),
        )

    skip = {"forward_mode": "the streamed statistics have a custom_vjp"}
    check_transformations(function, z, tokens, rows=(0, 1), skip=skip)


# ------------------------------------------------------------------------------- errors
@pytest.mark.usefixtures("untyped")
def test_errors_name_the_argument():
    z, labels = jnp.ones((2, 3, 4)), jnp.ones((2, 3), int)
    nll, groups = jnp.ones(3), jnp.arange(3)
    greedy, semantic = scoring.greedy_nll, scoring.semantic_entropy
    score = scoring.sequence_nll
    for call, error, message in (
        (lambda: score(z, labels[:, 1:]), ValueError, "`labels` must have shape"),
        (lambda: score(z, z[..., 0]), TypeError, "`labels` must have an integer"),
        (lambda: score(z[0, 0], labels[0, 0]), ValueError, "at least 2 axes"),
        (lambda: score(z, labels, normalize="max"), ValueError, "`normalize` must be"),
        (lambda: greedy(z > 0), TypeError, "`logits` must have a floating"),
        (lambda: greedy(z, where=z), TypeError, "`where` must have dtype bool"),
        (lambda: greedy(z[0, 0]), ValueError, "at least 2 axes"),
        (lambda: semantic(nll, groups[:2]), ValueError, "`groups` must have shape"),
        (lambda: semantic(nll, nll), TypeError, "`groups` must have an integer"),
        (lambda: semantic(nll, groups, weights="a"), ValueError, "`weights` must be"),
        (lambda: scoring.similar_groups(z[0], threshold=1.0), ValueError, r"\(S, S\)"),
        (
            lambda: scoring.predictive_entropy(jnp.ones(())),
            ValueError,
            "at least 1 axis",
        ),
    ):
        name = (
            "sequence_nll|greedy_nll|semantic_entropy|similar_groups|predictive_entropy"
        )
        with pytest.raises(error, match=rf"^({name}): .*{message}"):
            call()
