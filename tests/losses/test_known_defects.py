"""Defects that published losses have had, each with the numbers that show it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import softlib
from softlib import losses
from tests.losses.problems import as_jax
from tests.oracles.cross_entropy import token_metrics


def streamed(**options):
    operation = losses.linear_softmax_cross_entropy
    return jax.jit(functools.partial(operation, **as_jax(options)))


@pytest.mark.parametrize("vocab_axis", [0, 1])
@pytest.mark.parametrize("classes", [255, 1000, 50257])
def test_no_class_is_added_by_padding(classes, vocab_axis):
    """Zero columns up to a multiple of the chunk give 7.615 for log(1000) = 6.908."""
    hidden, weight = jnp.ones((1, 2)), jnp.zeros((classes, 2))
    for chunk in (None, 128, 2048):
        function: Any = functools.partial(
            losses.linear_row_statistics,
            statistics=("lse", "sum_logits"),
            vocab_axis=vocab_axis,
            vocab_chunk=chunk,
        )

        def total(bias, weight, function=function):
            return function(hidden, weight, bias=bias).lse.sum()

        given = weight.T if vocab_axis else weight
        lse, p = jax.jit(jax.value_and_grad(total))(jnp.zeros(classes), given)
        np.testing.assert_allclose(lse, np.log(classes), rtol=1e-6)
        # The probabilities of the real classes are the whole.
        np.testing.assert_allclose(p, 1 / classes, rtol=1e-5)
        np.testing.assert_allclose(p.sum(), 1, rtol=1e-5)


def test_excluded_classes_do_not_come_back_through_the_softcap():
    """-inf before tanh is minus the cap: +0.23 nats for logits near it."""
    classes, cap = 128, 5.0
    chosen = np.arange(classes) < 100
    hidden, weight = jnp.array([[1.0]]), jnp.full((classes, 1), -11.0)
    for chunk in (32, 128):
        _, lse = streamed(
            logit_softcap=cap, class_where=chosen, return_lse=True, vocab_chunk=chunk
        )(hidden, weight, jnp.array([0]))
        np.testing.assert_allclose(
            lse, np.log(100) + cap * np.tanh(-11 / cap), atol=1e-5
        )


def test_ignored_label_neither_trains_the_row_nor_another_class():
    """-100 as an index is class V - 100; as an empty one-hot it pushes all logits."""
    classes = 128
    random = np.random.default_rng(0)
    hidden = random.normal(size=(3, 4)).astype(np.float32)
    weight = random.normal(size=(classes, 4)).astype(np.float32)
    labels = np.array([5, -100, classes - 100])

    def total(weight, keep):
        where = labels >= 0 if keep is None else keep
        loss = streamed(where=where, vocab_chunk=48)(hidden, weight, labels)
        return loss.sum(), loss

    gradient, loss = jax.grad(total, has_aux=True)(weight, None)
    assert loss[1] == 0
    fewer = jax.grad(
        lambda w: streamed(vocab_chunk=48)(hidden[[0, 2]], w, labels[[0, 2]]).sum()
    )(weight)
    np.testing.assert_allclose(gradient, fewer, atol=1e-6)
    # Kept by mistake, it is visible at once and still trains nothing.
    gradient, loss = jax.grad(total, has_aux=True)(weight, np.ones(3, bool))
    assert np.isnan(loss[1])
    np.testing.assert_allclose(gradient, fewer, atol=1e-6)


@pytest.mark.parametrize("label", [-1, -100, 128])
def test_value_and_gradient_agree_on_a_label_out_of_range(label):
    """A value read from some row of the weight has a slope that no gradient shows."""
    random = np.random.default_rng(0)
    hidden = jnp.asarray(random.normal(size=(1, 4)), jnp.float32)
    weight = jnp.asarray(random.normal(size=(128, 4)), jnp.float32)
    statistics: Any = losses.linear_row_statistics
    function = lambda w: statistics(
        hidden, w, jnp.array([label]), statistics=("label_logits",), vocab_chunk=48
    ).label_logits.sum()
    run = jax.jit(jax.value_and_grad(function))
    value, gradient = run(weight)
    moved, _ = run(weight + 1)
    assert value == moved == 0
    np.testing.assert_array_equal(gradient, 0)


def test_mean_over_no_rows_is_zero():
    """0 / 0 poisons the batch in which every token is padding."""
    hidden, weight = jnp.ones((4, 2)), jnp.ones((7, 2))
    where = jnp.zeros(4, bool)

    def mean(weight):
        loss = streamed(where=where)(hidden, weight, jnp.full(4, -100))
        return softlib.masked_mean(loss, where)

    value, gradient = jax.jit(jax.value_and_grad(mean))(weight)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


def test_the_weight_gradient_weighs_every_row_by_its_own_cotangent():
    """A gradient made in the forward pass can only be scaled as a whole."""
    random = np.random.default_rng(0)
    hidden = random.normal(size=(6, 4)).astype(np.float32)
    weight = random.normal(size=(11, 4)).astype(np.float32)
    labels, weights = np.arange(6), np.array([1, 0, 2, 0, 0, 5], np.float32)
    loss = streamed(vocab_chunk=4)
    gradient = jax.jit(
        jax.grad(lambda w: (weights * loss(hidden, w, labels)).sum()),
    )(weight)
    expected = token_metrics(
        labels, hidden=hidden, weight=weight, cotangents={"loss": weights}
    )
    np.testing.assert_allclose(gradient, expected.gradients["weight"], atol=1e-5)


def test_a_loss_scaled_by_its_own_detached_probability():
    random = np.random.default_rng(0)
    hidden = random.normal(size=(6, 4)).astype(np.float32)
    weight = random.normal(size=(11, 4)).astype(np.float32)
    labels = np.arange(6)

    def total(hidden):
        loss = streamed(vocab_chunk=4)(hidden, weight, labels)
        return (jax.lax.stop_gradient(jnp.exp(-loss)) * loss).sum()

    p = np.exp(-token_metrics(labels, hidden=hidden, weight=weight).values["loss"])
    expected = token_metrics(
        labels, hidden=hidden, weight=weight, cotangents={"loss": p}
    )
    gradient = jax.jit(jax.grad(total))(hidden)
    np.testing.assert_allclose(gradient, expected.gradients["hidden"], atol=1e-5)


def test_the_error_of_the_weight_gradient_does_not_grow_with_the_chunks():
    """Summed in bfloat16 over 1024 chunks it is seven times larger."""
    random = np.random.default_rng(0)
    hidden = jnp.asarray(random.normal(size=(256, 8)), jnp.bfloat16)
    weight = jnp.asarray(random.normal(size=(1024, 8)), jnp.bfloat16)
    labels = jnp.asarray(random.integers(0, 1024, 256))
    expected = token_metrics(
        labels, hidden=hidden, weight=weight, cotangents={"loss": np.ones(256)}
    )
    error = {}
    for chunk in (8, 1000, 1024):
        loss = streamed(vocab_chunk=chunk)
        total = lambda h, w, loss=loss: loss(h, w, labels).sum()
        gradients = jax.jit(jax.grad(total, (0, 1)))(hidden, weight)
        for name, gradient in zip(("hidden", "weight"), gradients, strict=True):
            wanted = expected.gradients[name]
            off = np.linalg.norm(np.asarray(gradient, np.float64) - wanted)
            error[name, chunk] = off / np.linalg.norm(wanted)
    for (name, _), value in error.items():
        assert value < 2 * error[name, 1024], error
        assert value < 4e-3, error  # bfloat16 keeps 8 bits


@pytest.mark.parametrize(
    "options",
    [
        {"class_where": np.array([True, True, False, True])},
        {"bias": np.array([0, 0, -np.inf, 0], np.float32)},
    ],
    ids=["class_where", "bias"],
)
def test_gradients_with_excluded_classes_are_finite(options):
    """The log of 0 times a zero cotangent is NaN if the class is selected too late."""
    hidden = jnp.array([[1.0, -2.0], [0.5, 3.0]])
    weight = jnp.array([[1.0, 0.0], [0.0, 1.0], [5.0, 0.0], [1.0, 1.0]])
    labels = jnp.array([0, 3])

    def total(hidden, weight):
        loss = streamed(vocab_chunk=3, logsumexp_penalty=0.1, **options)
        return loss(hidden, weight, labels).sum()

    value, gradients = jax.value_and_grad(total, (0, 1))(hidden, weight)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in gradients)
    np.testing.assert_array_equal(gradients[1][2], 0)


def test_a_head_that_scales_its_logits_has_the_gradient_of_the_scaled_logits():
    """Leaving the scale out was 16 times off in the embedding's gradient."""
    random = np.random.default_rng(0)
    hidden = random.normal(size=(6, 4)).astype(np.float32)
    weight = random.normal(size=(11, 4)).astype(np.float32)
    labels = np.arange(6)
    loss = streamed(vocab_chunk=4)
    total = lambda scale, w: loss(hidden, w, labels, logit_scale=scale).sum()
    gradient = jax.jit(jax.grad(total, 1))(0.0625, weight)
    expected = token_metrics(
        labels,
        hidden=hidden,
        weight=weight,
        logit_scale=0.0625,
        cotangents={"loss": np.ones(6)},
    )
    np.testing.assert_allclose(gradient, expected.gradients["weight"], atol=1e-6)
