"""Connectionist temporal classification, from logits and from a linear head."""

import jax
import numpy as np
import optax
import pytest

import softlib
from softlib import losses
from softlib.testing import assert_close, check_transformations
from tests.host import jnp
from tests.oracles import ctc as oracle

INF, NAN = jnp.inf, jnp.nan
B, T, S, D, V = 5, 5, 3, 4, 6
BLANK = 2


def problem(dtype="float32"):
    """A full sequence, equal neighbours, holes, no label, fewer frames than labels."""
    random = np.random.default_rng(0)
    hidden = jnp.asarray(random.normal(size=(B, T, D)), dtype)
    weight = jnp.asarray(random.normal(size=(V, D)), dtype)
    labels = np.array([[0, 1, 3], [4, 4, 0], [5, 5, 1], [1, 1, 1], [3, 4, 5]])
    where, label_where = np.ones((B, T), bool), np.ones((B, S), bool)
    where[2, [0, 3]], where[4, 1:4] = False, False
    label_where[2, 1], label_where[3] = False, False
    return hidden, weight, labels, where, label_where


def of(hidden, weight, labels, where, label_where, blank=BLANK):
    logits = softlib.LinearLogits(hidden, weight, vocab_chunk=4)
    masks = {"where": jnp.asarray(where), "label_where": jnp.asarray(label_where)}
    return losses.ctc_loss(logits, jnp.asarray(labels), blank_id=blank, **masks)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_matches_oracle(dtype):
    """What does not count is NaN, or a label out of range."""
    with jax.enable_x64(dtype == "float64"):
        hidden, weight, labels, where, label_where = problem(dtype)
        bad = jnp.where(where[..., None], hidden, NAN)
        given = np.where(label_where, labels, -100)
        found = jax.jit(of)(bad, weight, given, where, label_where)
        z = np.asarray(hidden, np.float64) @ np.asarray(weight, np.float64).T
        rows = range(B)
        wanted = [
            oracle.loss(z[b][where[b]], labels[b][label_where[b]], BLANK) for b in rows
        ]
        assert_close(found, wanted, dtype=found.dtype, length=T * D)
        assert np.isinf(wanted[-1])


def test_agrees_with_optax_where_labels_can_be_aligned():
    hidden, weight, labels, *_ = problem()
    where = np.arange(T) < np.array([5, 5, 4, 3, 3])[:, None]
    label_where = np.arange(S) < np.array([3, 2, 2, 0, 1])[:, None]

    def by_optax(hidden, weight):
        padding = 1.0 - jnp.asarray(where), 1.0 - jnp.asarray(label_where)
        logits = hidden @ weight.T
        return optax.ctc_loss(logits, padding[0], labels, padding[1], blank_id=BLANK)

    ours = lambda hidden, weight: of(hidden, weight, labels, where, label_where)
    both = [
        jax.jit(jax.value_and_grad(lambda *a, f=f: f(*a).sum(), (0, 1)))(hidden, weight)
        for f in (ours, by_optax)
    ]
    for found, wanted in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_impossible_and_wrong_sequences_have_no_gradient():
    hidden, weight, labels, where, label_where = problem()
    labels = labels.copy()
    labels[0, 1], labels[1, 0] = V, BLANK
    where[3] = False

    run = jax.jit(lambda hidden, weight: of(hidden, weight, labels, where, label_where))
    loss, back = jax.vjp(run, hidden, weight)
    np.testing.assert_array_equal(np.isnan(loss), np.arange(B) < 2)
    np.testing.assert_array_equal(loss[3:], [0, INF])  # nothing to align; too short
    by_hidden, by_weight = back(jnp.ones(B))
    assert np.isfinite(by_weight).all()
    np.testing.assert_array_equal(np.abs(by_hidden).sum((1, 2)) > 0, np.arange(B) == 2)


def test_probabilities_of_all_labellings_sum_to_one():
    """Over two classes and the blank, of three frames."""
    z = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3)), jnp.float32)
    known = [[int(c) for c in np.base_repr(n, 3)] for n in range(1, 27)]
    labels = [row for row in known if 0 not in row]
    padded = jnp.array([row + [1] * (3 - len(row)) for row in [*labels, []]])
    counts = np.arange(3) < np.array([len(row) for row in [*labels, []]])[:, None]
    loss = jax.jit(jax.vmap(lambda y, c: losses.ctc_loss(z, y, label_where=c)))
    np.testing.assert_allclose(jnp.exp(-loss(padded, counts)).sum(), 1, rtol=1e-6)


def test_long_sequences_do_not_underflow():
    logits = jnp.zeros((400, 50)).at[:, 1].set(-60.0)
    loss, slope = jax.value_and_grad(losses.ctc_loss)(logits, jnp.ones(100, int))
    assert loss > 5000
    assert np.isfinite(slope).all()


def test_sequences_without_frames_or_labels():
    none = jnp.zeros((2, 0, 3))
    loss = losses.ctc_loss(none, jnp.ones((2, 1), int))
    np.testing.assert_array_equal(loss, INF)
    np.testing.assert_array_equal(losses.ctc_loss(none, jnp.ones((2, 0), int)), 0)
    z = jnp.zeros((2, 4, 3))
    loss = losses.ctc_loss(z, jnp.ones((2, 0), int))
    np.testing.assert_allclose(loss, 4 * np.log(3), rtol=1e-6)


def test_the_blank_must_be_a_class(untyped):
    with pytest.raises(ValueError, match="`blank_id` must be below the number of clas"):
        losses.ctc_loss(jnp.zeros((2, 4, 3)), jnp.ones((2, 1), int), blank_id=3)
    with pytest.raises(ValueError, match="`blank_id` must be at least 0, got -1"):
        losses.ctc_loss(jnp.zeros((2, 4, 3)), jnp.ones((2, 1), int), blank_id=-1)
    with pytest.raises(ValueError, match=r"`labels` must have shape \(2, S\)"):
        losses.ctc_loss(jnp.zeros((2, 4, 3)), jnp.ones((3, 1), int))


def test_nothing_has_the_size_of_frames_times_classes():
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    many, labels = 50_000, jnp.ones((2, 9), int)

    def loss(hidden, weight):
        return losses.ctc_loss(softlib.LinearLogits(hidden, weight), labels).sum()

    arrays = shape(2, 500, 16), shape(many, 16)
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*arrays).compile()
    needed = compiled.memory_analysis()
    assert needed is not None
    assert needed.temp_size_in_bytes < 2 * 500 * many * 4 / 5


@pytest.mark.slow
def test_every_transformation():
    random = np.random.default_rng(0)
    hidden = jnp.asarray(random.normal(size=(8, T, D)), jnp.float32)
    weight = jnp.asarray(random.normal(size=(V, D)), jnp.float32)
    labels = jnp.asarray(random.integers(0, 2, (8, S)))

    def function(hidden, weight, labels):
        logits = softlib.LinearLogits(hidden, weight, implementation="reference")
        return losses.ctc_loss(logits, labels, blank_id=BLANK)

    check_transformations(function, hidden, weight, labels, rows=(0, 2))
