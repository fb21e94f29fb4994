"""Codes of log-probabilities, decoders and the rank: vectors, exactness, errors."""

import functools
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from jax.test_util import check_grads

import softlib
from softlib.testing import assert_close, check_transformations
from tests.compiled import scoring
from tests.host import jnp

DATA = pathlib.Path(__file__).parent.parent / "data/pils_case0.npz"
CLASSES, FEATURES, ROWS = 300, 12, 40


def log_softmax(z):
    top = z.max(-1, keepdims=True)
    return z - top - np.log(np.exp(z - top).sum(-1, keepdims=True))


def problem(extra=20, seed=0, bias=False):
    """A head, hidden vectors, log-probabilities and ids of classes, in float64."""
    random = np.random.default_rng(seed)
    weight = random.normal(size=(CLASSES, FEATURES))
    hidden = random.normal(size=(ROWS, FEATURES))
    b = random.normal(size=CLASSES) if bias else np.zeros(CLASSES)
    ids = random.permutation(CLASSES)[: FEATURES + 1 + extra]
    return weight, hidden, b, log_softmax(hidden @ weight.T + b), ids


def test_matches_independent_vectors():
    with jax.enable_x64(), np.load(DATA) as data:
        log_probs, ids = (
            jnp.asarray(data["out_logp"]),
            jnp.asarray(data["in_token_ids"]),
        )
        head, hidden = jnp.asarray(data["in_head"]), jnp.asarray(data["in_hidden"])
        check = functools.partial(assert_close, dtype="float64", length=64)
        codes = scoring.log_ratio_codes(log_probs, ids)
        check(codes, data["out_code"])
        logits = softlib.LinearLogits(hidden, head)
        check(scoring.log_ratio_codes(logits, ids), data["out_code"], c=64)
        decoder = scoring.log_ratio_decoder(head, ids)
        # The smallest singular value of exactly D + 1 classes magnifies rounding.
        found = scoring.decode_log_ratios(codes, decoder)
        np.testing.assert_allclose(found, data["out_reconstructed"], atol=1e-12)
        assert scoring.output_rank(log_probs).rank == data["out_rank"]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("known", [True, False])
def test_all_log_probabilities_follow_from_codes(known, bias):
    """In float32, from a known head and from observed rows; the codes are of others."""
    weight, _, b, observed, ids = problem(bias=bias)
    random = np.random.default_rng(1)
    hidden = random.normal(size=(5, FEATURES))
    log_probs = log_softmax(hidden @ weight.T + b)
    codes = scoring.log_ratio_codes(jnp.asarray(log_probs, jnp.float32), ids)
    if known:
        wide: dict[str, Any] = {"bias": jnp.asarray(b, jnp.float32)} if bias else {}
        turned = jnp.asarray(weight.T, jnp.float32)
        decoder = scoring.log_ratio_decoder(turned, ids, vocab_axis=1, **wide)
    else:
        rows = jnp.asarray(observed, jnp.float32)
        decoder = scoring.fit_log_ratio_decoder(rows, ids, rank=FEATURES, has_bias=bias)
    found = scoring.decode_log_ratios(codes, decoder)
    np.testing.assert_allclose(found, log_probs, atol=3e-5)
    # The decoder is a head: numbers per row come without the log-probabilities.
    logits = softlib.LinearLogits(codes, decoder.weight, bias=decoder.bias)
    lse = softlib.logits.logsumexp(logits)
    np.testing.assert_allclose(found, logits.materialize() - lse[:, None], atol=3e-6)


def test_more_classes_than_necessary_lower_the_error():
    weight, hidden, _, log_probs, _ = problem()
    errors = []
    for extra in (0, 60):
        ids = problem(extra)[-1]
        logits = softlib.LinearLogits(
            jnp.asarray(hidden, jnp.float32), jnp.asarray(weight, jnp.float32)
        )
        codes = scoring.log_ratio_codes(logits, ids)
        decoder = scoring.log_ratio_decoder(jnp.asarray(weight, jnp.float32), ids)
        found = scoring.decode_log_ratios(codes, decoder)
        errors.append(np.abs(found - log_probs).max())
    assert errors[1] < errors[0] / 2
    assert errors[1] < 3e-5


def test_the_rank_is_the_width():
    """One more with a bias, at most that of the rows, and more with a softcap."""
    *_, log_probs, _ = problem()
    of = lambda x: scoring.output_rank(jnp.asarray(x, jnp.float32)).rank
    assert of(log_probs) == FEATURES
    assert of(log_probs.reshape(4, 10, CLASSES)) == FEATURES
    assert of(problem(bias=True)[3]) == FEATURES + 1
    assert of(log_probs[:7]) == 7
    assert of(log_softmax(3 * np.tanh(log_probs / 3))) > 2 * FEATURES
    assert of(np.zeros((3, 5))) == 0
    bad = scoring.output_rank(jnp.asarray(log_probs).at[0, 0].set(-jnp.inf))
    assert bad.rank == -1
    assert np.isnan(bad.singular_values).all()


def test_a_temperature_keeps_the_space_and_the_decoder():
    weight, hidden, _, _, ids = problem()
    with jax.enable_x64():
        log_probs = log_softmax(hidden @ weight.T / 0.7)
        codes = scoring.log_ratio_codes(jnp.asarray(log_probs), ids)
        decoder = scoring.log_ratio_decoder(jnp.asarray(weight), ids)
        found = scoring.decode_log_ratios(codes, decoder)
        np.testing.assert_allclose(found, log_probs, atol=1e-10)


def test_ids_outside_the_classes_are_nan():
    weight, _, _, log_probs, ids = problem()
    for bad in (-1, CLASSES):
        ids[3] = bad
        codes = scoring.log_ratio_codes(jnp.asarray(log_probs, jnp.float32), ids)
        assert np.isnan(codes[:, 2]).all()
        assert np.isfinite(codes[:, 3:]).all()
        known = scoring.log_ratio_decoder(jnp.asarray(weight, jnp.float32), ids)
        fitted = scoring.fit_log_ratio_decoder(jnp.asarray(log_probs), ids)
        for decoder in (known, fitted):
            assert np.isnan(decoder.weight).all()


def test_codes_of_a_large_head_form_no_logits():
    rows, features, classes, count = 512, 32, 256_000, 133
    shape = lambda *axes: jax.ShapeDtypeStruct(axes, jnp.float32)
    ids = jax.ShapeDtypeStruct((count,), jnp.int32)

    def codes(hidden, weight, ids):
        logits = softlib.LinearLogits(hidden, weight)
        return softlib.scoring.log_ratio_codes(logits, ids)

    arrays = shape(rows, features), shape(classes, features)
    program = jax.jit(codes).lower(*arrays, ids).compile()
    memory = program.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 0.01 * rows * classes * 4


def test_gradients_are_those_of_differences():
    weight, _, _, log_probs, ids = problem(extra=3)
    with jax.enable_x64():

        def run(weight, log_probs):
            codes = scoring.log_ratio_codes(log_probs, ids)
            decoder = scoring.log_ratio_decoder(weight, ids)
            return scoring.decode_log_ratios(codes, decoder)[:, :5]

        arrays = jnp.asarray(weight), jnp.asarray(log_probs[:2])
        check_grads(run, arrays, order=1, modes=["rev"], rtol=1e-4)


@pytest.mark.slow
def test_every_transformation():
    weight, hidden, _, _, ids = problem(extra=3)
    arrays = [jnp.asarray(a[:8], jnp.float32) for a in (hidden,)]
    head, bias = (jnp.asarray(a, jnp.float32) for a in (weight[:40], weight[:40, 0]))
    ids = np.arange(20)

    def function(hidden):
        logits = softlib.LinearLogits(hidden, head, bias=bias)
        codes = scoring.log_ratio_codes(logits, ids)
        decoder = scoring.log_ratio_decoder(head, ids, bias=bias)
        return scoring.decode_log_ratios(codes, decoder)

    check_transformations(function, *arrays, c=64)


@pytest.mark.usefixtures("untyped")
def test_errors_name_the_argument():
    z, ids, weight = jnp.ones((6, 5)), jnp.arange(4), jnp.ones((5, 3))
    codes, make = scoring.log_ratio_codes, scoring.log_ratio_decoder
    fit, decode = scoring.fit_log_ratio_decoder, scoring.decode_log_ratios
    for call, error, message in (
        (lambda: codes(z, z), TypeError, "`class_ids` must have an integer"),
        (lambda: codes(z, ids[:1]), ValueError, "`class_ids` must have one axis"),
        (lambda: codes(z > 0, ids), TypeError, "`logits` must have a floating"),
        (lambda: make(weight, ids[:3]), ValueError, "`class_ids` must hold at least 4"),
        (lambda: make(weight[0], ids), ValueError, "`weight` must have two axes"),
        (lambda: make(weight, ids, vocab_axis=2), ValueError, "`vocab_axis` must be"),
        (lambda: make(weight, ids, bias=z[0, :2]), ValueError, "`bias` must have sh"),
        (lambda: fit(z[0], ids), ValueError, "`log_probs` must have at least 2 axes"),
        (lambda: fit(z, ids, rank=4), ValueError, "`rank` must be at most 3"),
        (lambda: decode(z, make(weight, ids)), ValueError, "`codes` must have 3 codes"),
        (lambda: scoring.output_rank(z[0]), ValueError, "at least 2 axes"),
        (lambda: scoring.output_rank(z, epsilon=-1.0), ValueError, "`epsilon` must be"),
    ):
        name = "log_ratio_codes|(fit_)?log_ratio_decoder|decode_log_ratios|output_rank"
        with pytest.raises(error, match=rf"^({name}): .*{message}"):
            call()
