"""Defects that published losses have had, each with the numbers that show it."""

import functools
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

import softlib
from softlib import losses
from tests.heads import of_head, of_stored
from tests.host import jnp
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
            of_head.row_statistics,
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
            softcap=cap, class_where=chosen, return_lse=True, vocab_chunk=chunk
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
    statistics: Any = of_head.row_statistics
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
    total = lambda scale, w: loss(hidden, w, labels, scale=scale).sum()
    gradient = jax.jit(jax.grad(total, 1))(0.0625, weight)
    expected = token_metrics(
        labels,
        hidden=hidden,
        weight=weight,
        scale=0.0625,
        cotangents={"loss": np.ones(6)},
    )
    np.testing.assert_allclose(gradient, expected.gradients["weight"], atol=1e-6)


@pytest.mark.parametrize("chunk", [None, 2048])
def test_the_logsumexp_of_bfloat16_is_not_kept_in_bfloat16(chunk):
    """A running logsumexp of 131,072 bfloat16 logits is 0.435 nats off."""
    classes = 131_072
    hidden = jnp.ones((1, 2), jnp.bfloat16)
    weight = jnp.zeros((classes, 2), jnp.bfloat16)
    bias = jnp.zeros(classes)

    def total(bias):
        loss, lse = streamed(return_lse=True, vocab_chunk=chunk)(
            hidden, weight, jnp.array([3]), bias=bias
        )
        return loss.sum(), lse

    gradient, lse = jax.jit(jax.grad(total, has_aux=True))(bias)
    assert lse.dtype == jnp.float32
    np.testing.assert_allclose(lse, np.log(classes), rtol=1e-6)
    # Probabilities made from a wrong logsumexp do not sum to 1.
    np.testing.assert_allclose(gradient.sum(), 0, atol=1e-5)
    np.testing.assert_allclose(gradient[:3], 1 / classes, rtol=1e-5)


@pytest.mark.parametrize("label", [-1, -100, 128])
def test_a_label_out_of_range_trains_no_class(label):
    """-1 as an index is the last class, and -100 class V - 100."""
    random = np.random.default_rng(0)
    hidden = jnp.asarray(random.normal(size=(1, 4)), jnp.float32)
    weight = jnp.asarray(random.normal(size=(128, 4)), jnp.float32)
    labels = jnp.array([label])
    forms: dict[str, Any] = {
        "hidden": lambda w: losses.linear_softmax_cross_entropy(hidden, w, labels),
        "logits": lambda w: of_stored.softmax_cross_entropy(hidden @ w.T, labels),
    }
    for name, loss in forms.items():
        summed = lambda w, loss=loss: loss(w).sum()
        value, gradient = jax.jit(jax.value_and_grad(summed))(weight)
        assert np.isnan(value), name
        np.testing.assert_array_equal(gradient, 0, err_msg=name)


def test_the_label_logit_does_not_exceed_the_logsumexp():
    """Summed in another order it can, and the loss of a certain row is negative."""
    random = np.random.default_rng(1)
    weight = jnp.asarray(random.normal(size=(64, 300)), jnp.bfloat16)
    hidden = 3 * weight  # the product with its own class is far above the others
    loss = streamed(vocab_chunk=24)(hidden, weight, jnp.arange(64))
    assert np.min(loss) >= 0


def test_a_gradient_filter_leaves_the_gradient_of_the_bias_alone():
    """Skipping a block of the backward pass as a whole drops its bias gradient too."""
    random = np.random.default_rng(0)
    hidden = jnp.asarray(random.normal(size=(128, 4)), jnp.float32)
    weight = jnp.asarray(random.normal(size=(384, 4)), jnp.float32)
    labels = jnp.asarray(random.integers(0, 128, 128))  # two blocks hold no label

    @functools.partial(jax.jit, static_argnums=2)
    def gradients(weight, bias, eps):
        return jax.grad(
            lambda w, b: losses.linear_softmax_cross_entropy(
                hidden, w, labels, bias=b, gradient_filter_eps=eps
            ).sum(),
            argnums=(0, 1),
        )(weight, bias)

    exact, exact_bias = gradients(weight, jnp.zeros(384), None)
    filtered, bias = gradients(weight, jnp.zeros(384), 0.9)
    assert np.all(np.asarray(filtered[128:]) == 0)  # blocks were dropped
    assert np.any(np.asarray(exact[128:]) != 0)
    np.testing.assert_allclose(bias, exact_bias, atol=1e-5)


def test_smoothing_over_a_divided_vocabulary_means_over_all_classes():
    """The mean of the log-probabilities over the classes of one device is another."""
    devices = jax.device_count()
    mesh = jax.make_mesh((devices,), ("classes",), axis_types=(AxisType.Auto,))
    random = np.random.default_rng(0)
    classes = 6 * devices
    hidden = random.normal(size=(5, 4)).astype(np.float32)
    weight = random.normal(size=(classes, 4)).astype(np.float32)
    weight += np.arange(classes, dtype=np.float32)[:, None] / 9  # devices differ
    labels = np.arange(5) * 7 % classes

    def divided(hidden, weight, labels):
        return losses.linear_softmax_cross_entropy(
            hidden, weight, labels, label_smoothing=0.3, axis_name="classes"
        )

    mapped = jax.shard_map(
        divided, mesh=mesh, in_specs=(P(), P("classes"), P()), out_specs=P()
    )

    @jax.jit
    def run(weight):
        total = lambda w: mapped(hidden, w, labels).sum()
        return mapped(hidden, weight, labels), jax.grad(total)(weight)

    loss, gradient = run(weight)
    expected = token_metrics(
        labels,
        hidden=hidden,
        weight=weight,
        label_smoothing=0.3,
        cotangents={"loss": np.ones(5)},
    )
    np.testing.assert_allclose(loss, expected.values["loss"], rtol=1e-5)
    np.testing.assert_allclose(gradient, expected.gradients["weight"], atol=1e-4)


def test_forward_derivatives_with_logits_of_minus_infinity_are_finite():
    """The tangent of 0 log 0 is NaN if it is not selected before the logarithm."""
    logits = jnp.array([[1.0, -jnp.inf, 0.5], [-jnp.inf, 2.0, -jnp.inf]])
    loss: Any = functools.partial(
        of_stored.softmax_cross_entropy, implementation="reference"
    )
    _, tangent = jax.jvp(
        lambda z: loss(z, jnp.array([0, 1])), (logits,), (jnp.ones_like(logits),)
    )
    np.testing.assert_allclose(tangent, 0, atol=1e-6)  # a shift of the whole row


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_the_focal_loss_has_a_gradient_where_the_label_is_certain(gamma):
    """(1 - p) ** 0.5 has an infinite slope at p = 1, and 0 times that is NaN."""
    margins = jnp.array([0.0, 30.0, 1e4])
    logits = jnp.stack([margins, 0 * margins], axis=1)
    labels = jnp.zeros(3, int)
    loss = lambda z: of_stored.softmax_focal_loss(z, labels, gamma=gamma).sum()
    value, gradient = jax.jit(jax.value_and_grad(loss))(logits)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    assert gradient[0, 0] < 0 < gradient[0, 1]


def test_generalized_cross_entropy_of_a_small_q_is_cross_entropy():
    """(1 - p ** q) / q has few digits left: 29.981 instead of 30 for p = e^-30."""
    nll = np.log1p(np.exp(np.float64(30)))
    got = of_stored.generalized_cross_entropy_loss(
        jnp.array([[0.0, 30.0]]), jnp.array([0]), q=1e-6
    )
    np.testing.assert_allclose(got, -np.expm1(-1e-6 * nll) / 1e-6, rtol=1e-6)
