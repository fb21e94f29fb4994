"""What the losses promise in words, at every edge, from both sources of logits."""

import functools
from typing import Any

import jax
import numpy as np
import pytest

import softlib
from softlib import losses
from softlib.testing import assert_close
from tests.heads import of, of_head, of_stored
from tests.host import jnp
from tests.losses.problems import as_jax
from tests.oracles.cross_entropy import token_metrics

ROWS, FEATURES, CLASSES = 4, 3, 7
METRICS = softlib.logits.TokenMetrics._fields


def arrays(rows=ROWS, seed=0):
    random = np.random.default_rng(seed)
    hidden = random.normal(size=(rows, FEATURES)).astype(np.float32)
    weight = random.normal(size=(CLASSES, FEATURES)).astype(np.float32)
    return hidden, weight


class Source:
    """The same operation on hidden states and a weight, or on logits."""

    def __init__(self, kind):
        self.kind = kind
        self.options = {"vocab_chunk": 3} if kind == "linear" else {}

    def __call__(self, name, **options):
        name = "softmax_cross_entropy" if name == "cross_entropy" else name
        operation = getattr(of(self.kind), name)
        return jax.jit(functools.partial(operation, **self.options, **as_jax(options)))

    def metrics(self, **options):
        return self("token_metrics", metrics=METRICS, **options)

    def inputs(self, hidden, weight):
        """What stands for hidden and weight: rows first."""
        return (hidden, weight) if self.kind == "linear" else (hidden @ weight.T,)

    def given(self, *inputs):
        names = ("hidden", "weight") if self.kind == "linear" else ("logits",)
        return dict(zip(names, inputs, strict=True))


@pytest.fixture(params=["linear", "logits"])
def source(request):
    return Source(request.param)


def differentiated(function, *inputs, **others):
    """All outputs, and the gradients of the sum of the floating ones."""

    @jax.jit
    def run(inputs, others):
        def total(*inputs):
            outputs = jax.tree.leaves(function(*inputs, **others))
            floating = [o for o in outputs if jnp.issubdtype(o.dtype, jnp.floating)]
            return sum(o.sum() for o in floating), function(*inputs, **others)

        return jax.grad(total, range(len(inputs)), has_aux=True)(*inputs)

    gradients, outputs = run(inputs, others)
    return outputs, gradients


def finite(tree):
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


# -------------------------------------------------------------------------------- rows
@pytest.mark.parametrize("garbage", [np.nan, -np.inf, 3e38])
def test_masked_row_is_zero_whatever_hidden_and_labels_hold(source, garbage):
    hidden, weight = arrays()
    where, labels = np.array([True, False, True, False]), np.array([0, -100, 6, 99])
    inputs = source.inputs(hidden, weight)
    broken = (np.where(where[:, None], inputs[0], np.float32(garbage)), *inputs[1:])
    metrics = source.metrics(where=where, label_smoothing=0.1, logsumexp_penalty=0.1)
    values, gradients = differentiated(metrics, *broken, labels=labels)
    for name, value in values._asdict().items():
        np.testing.assert_array_equal(value[~where], 0, err_msg=name)
    np.testing.assert_array_equal(gradients[0][~where], 0)
    assert finite(gradients)
    # The other rows are what they are without the masked ones.
    alone, expected = differentiated(
        source.metrics(label_smoothing=0.1, logsumexp_penalty=0.1),
        inputs[0][where],
        *inputs[1:],
        labels=labels[where],
    )
    for one, two in zip(values, alone, strict=True):
        assert_close(one[where], two, dtype=jnp.float32, length=7)
    assert_close(gradients[0][where], expected[0], dtype=jnp.float32, length=7)
    for one, two in zip(gradients[1:], expected[1:], strict=True):
        assert_close(one, two, dtype=jnp.float32, length=7)


def test_all_rows_masked(source):
    hidden, weight = arrays()
    inputs = source.inputs(np.full_like(hidden, np.nan), weight)
    metrics = source.metrics(where=np.zeros(ROWS, bool), logsumexp_penalty=0.1)
    values, gradients = differentiated(metrics, *inputs, labels=np.full(ROWS, -100))
    for leaf in jax.tree.leaves((values, gradients)):
        np.testing.assert_array_equal(leaf, 0)


@pytest.mark.parametrize("shape", [(2, 3), (1, 3), (2, 1), (1, 1)])
def test_where_is_broadcast_to_the_batch(source, shape):
    hidden, weight = arrays(rows=6)
    inputs = source.inputs(hidden.reshape(2, 3, -1), weight)
    labels = np.arange(6).reshape(2, 3)
    where = np.arange(np.prod(shape)).reshape(shape) % 2 == 0
    loss = source("cross_entropy")(*inputs, labels)
    got = source("cross_entropy", where=where)(*inputs, labels)
    np.testing.assert_array_equal(got, np.where(where, loss, 0))


@pytest.mark.parametrize("batch", [(), (1,), (0,), (2, 0), (2, 1, 3)])
def test_any_number_of_batch_axes(source, batch):
    hidden, weight = arrays(rows=int(np.prod(batch)))
    inputs = source.inputs(hidden.reshape(*batch, FEATURES), weight)
    labels = np.arange(int(np.prod(batch))).reshape(batch)
    values, gradients = differentiated(source.metrics(), *inputs, labels=labels)
    cotangents = {n: np.ones(batch) for n in METRICS if n != "correct"}
    expected = token_metrics(labels, cotangents=cotangents, **source.given(*inputs))
    for name, value in values._asdict().items():
        assert value.shape == batch
        assert_close(value, expected.values[name], dtype=jnp.float32, length=7)
    for gradient, name in zip(gradients, source.given(*inputs), strict=True):
        wanted = expected.gradients[name]
        assert_close(gradient, wanted, dtype=jnp.float32, length=7)


# ------------------------------------------------------------------------------ labels
@pytest.mark.parametrize("bad", [-1, -100, 7, 2**31 - 1])
def test_label_outside_the_classes_is_nan_in_its_row_and_has_no_gradient(source, bad):
    hidden, weight = arrays()
    inputs = source.inputs(hidden, weight)
    labels = np.array([0, bad, 6, 3])
    others = np.array([0, 2, 3])
    function = source.metrics(label_smoothing=0.1, logsumexp_penalty=0.1)

    def label_dependent(*inputs, labels):
        got = function(*inputs, labels=labels)
        return got.loss, got.log_prob, got.correct

    values, gradients = differentiated(label_dependent, *inputs, labels=labels)
    for value in values[:2]:
        np.testing.assert_array_equal(np.isnan(value), [False, True, False, False])
    assert not values[2][1]
    np.testing.assert_array_equal(gradients[0][1], 0)
    alone = differentiated(
        label_dependent, inputs[0][others], *inputs[1:], labels=labels[others]
    )
    assert_close(gradients[0][others], alone[1][0], dtype=jnp.float32, length=7)
    for one, two in zip(gradients[1:], alone[1][1:], strict=True):
        assert_close(one, two, dtype=jnp.float32, length=7)


def test_label_on_an_excluded_class_is_infinite_and_has_no_gradient(source):
    """Also where the excluded logit is the largest, so that lse - z is negative."""
    hidden = np.ones((3, 1), np.float32)
    weight = np.array([[0], [1], [50], [2], [0], [1], [0]], np.float32)
    chosen = np.arange(7) != 2
    inputs = source.inputs(hidden, weight)
    labels = np.array([2, 1, 2])
    function = source.metrics(class_where=chosen, label_smoothing=0.1)

    def label_dependent(*inputs, labels):
        got = function(*inputs, labels=labels)
        return got.loss, got.log_prob, got.correct

    values, gradients = differentiated(label_dependent, *inputs, labels=labels)
    loss, log_prob, correct = values
    np.testing.assert_array_equal(np.isposinf(loss), [True, False, True])
    np.testing.assert_array_equal(np.isneginf(log_prob), [True, False, True])
    assert not correct.any()
    np.testing.assert_array_equal(gradients[0][np.array([0, 2])], 0)
    assert finite(gradients)
    assert (gradients[0][1] != 0).any()


def test_label_with_a_logit_of_minus_infinity_is_infinite(source):
    hidden, weight = arrays()
    bias = np.array([0, 0, -np.inf, 0, 0, 0, 0], np.float32)
    inputs = source.inputs(hidden, weight)
    loss, gradients = differentiated(
        source("cross_entropy", bias=bias), *inputs, labels=np.array([2, 0, 1, 2])
    )
    np.testing.assert_array_equal(np.isposinf(loss), [True, False, False, True])
    assert not any(np.isnan(g).any() for g in gradients)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint32"])
def test_label_dtype_does_not_limit_the_classes(source, dtype):
    logits = np.random.default_rng(0).normal(size=(2, 300)).astype(np.float32)
    inputs = (logits, np.eye(300, dtype=np.float32))[: 2 if source.options else 1]
    labels = np.array([100, 17], dtype)
    wanted = token_metrics(labels.astype(int), logits=logits).values
    got = jax.jit(source.metrics())(*inputs, labels)
    assert_close(got.loss, wanted["loss"], dtype=jnp.float32, length=300)
    np.testing.assert_array_equal(got.correct, wanted["correct"])


# ----------------------------------------------------------------------------- classes
def test_no_class_selected_gives_zero_loss_and_gradient(source):
    hidden, weight = arrays()
    inputs = source.inputs(hidden, weight)
    metrics = source.metrics(
        class_where=np.zeros(7, bool), label_smoothing=0.1, logsumexp_penalty=0.1
    )

    def but_lse(*inputs, labels):
        return metrics(*inputs, labels=labels)._replace(lse=None)

    values, gradients = differentiated(but_lse, *inputs, labels=np.arange(4))
    for leaf in jax.tree.leaves((values, gradients)):
        np.testing.assert_array_equal(leaf, 0)
    np.testing.assert_array_equal(metrics(*inputs, np.arange(4)).lse, -np.inf)


def test_all_logits_of_minus_infinity_cost_infinity_without_gradient(source):
    hidden, weight = arrays()
    inputs = source.inputs(hidden, weight)
    metrics = source.metrics(
        bias=np.full(7, -np.inf, np.float32), logsumexp_penalty=0.1
    )

    def but_lse(*inputs, labels):
        return metrics(*inputs, labels=labels)._replace(lse=None)

    values, gradients = differentiated(but_lse, *inputs, labels=np.arange(4))
    np.testing.assert_array_equal(values.loss, np.inf)
    np.testing.assert_array_equal(values.log_prob, -np.inf)
    for leaf in jax.tree.leaves((values.entropy, values.correct, gradients)):
        np.testing.assert_array_equal(leaf, 0)
    np.testing.assert_array_equal(metrics(*inputs, np.arange(4)).lse, -np.inf)


def test_one_class_has_no_loss(source):
    hidden = np.random.default_rng(0).normal(size=(5, FEATURES)).astype(np.float32)
    inputs = source.inputs(100 * hidden, np.ones((1, FEATURES), np.float32))
    metrics = source.metrics(label_smoothing=0.1)

    def but_lse(*inputs, labels):
        return metrics(*inputs, labels=labels)._replace(lse=None)

    values, gradients = differentiated(but_lse, *inputs, labels=np.zeros(5, int))
    np.testing.assert_array_equal(values.loss, 0)
    np.testing.assert_array_equal(values.log_prob, 0)
    np.testing.assert_allclose(values.entropy, 0, atol=1e-4)  # lse - E[z], z of 100
    assert values.correct.all()
    np.testing.assert_allclose(gradients[0], 0, atol=1e-4)


def test_excluding_classes_is_removing_them(source):
    hidden, weight = arrays()
    chosen = np.array([True, False, True, True, False, True, True])
    labels, kept = np.array([0, 2, 5, 6]), np.array([0, 1, 3, 4])
    options = {"label_smoothing": 0.2, "logsumexp_penalty": 0.1}
    inputs = source.inputs(hidden, weight)
    got = source.metrics(class_where=chosen, **options)(*inputs, labels)
    fewer = source.inputs(hidden, weight[chosen])
    wanted = source.metrics(**options)(*fewer, kept)
    for one, two in zip(got, wanted, strict=True):
        assert_close(one, two, dtype=jnp.float32, length=7)


# ----------------------------------------------------------------------- distributions
def test_a_one_hot_distribution_is_its_label():
    hidden, weight = arrays()
    logits, labels = hidden @ weight.T, np.array([0, 6, 3, 3])
    one_hot = jnp.asarray(np.eye(7)[labels], jnp.float32)
    for options in ({}, {"label_smoothing": 0.2, "logsumexp_penalty": 0.1}):
        loss: Any = functools.partial(of_stored.softmax_cross_entropy, **options)
        total = lambda z, labels, loss=loss: loss(z, labels).sum()
        run = jax.jit(jax.value_and_grad(total))
        for one, two in zip(run(logits, labels), run(logits, one_hot), strict=True):
            assert_close(one, two, dtype=jnp.float32, length=7)


def test_a_class_of_mass_zero_may_be_excluded_or_have_a_logit_of_minus_infinity():
    logits = np.array([[0.0, 1.0, -np.inf, 2.0]], np.float32)
    q = jnp.array([[0.25, 0.75, 0.0, 0.0]])
    chosen = jnp.array([True, True, True, False])
    cross_entropy: Any = of_stored.softmax_cross_entropy
    loss = lambda z, c: cross_entropy(z, q, class_where=c).sum()
    for c in (None, chosen):
        value, gradient = jax.jit(jax.value_and_grad(loss))(logits, c)
        wanted = token_metrics(
            q, logits=logits, class_where=c, cotangents={"loss": np.ones(1)}
        )
        assert_close(value, wanted.values["loss"][0], dtype=jnp.float32, length=4)
        assert_close(gradient, wanted.gradients["logits"], dtype=jnp.float32, length=4)


def test_mass_on_an_excluded_class_is_infinite_and_has_no_gradient():
    logits = np.array([[0.0, 1.0, 9.0]] * 2, np.float32)
    q = jnp.array([[0.5, 0.25, 0.25], [0.5, 0.5, 0.0]])
    chosen = jnp.array([True, True, False])
    loss: Any = functools.partial(
        of_stored.softmax_cross_entropy, labels=q, class_where=chosen
    )
    np.testing.assert_array_equal(np.isposinf(jax.jit(loss)(logits)), [True, False])
    gradient = jax.jit(jax.grad(lambda z: loss(z).sum()))(logits)
    np.testing.assert_array_equal(gradient[0], 0)
    assert finite(gradient)


# ----------------------------------------------------------------------- what it equals
def test_metrics_are_what_the_single_functions_give(source):
    hidden, weight = arrays()
    inputs, labels = source.inputs(hidden, weight), np.array([0, 6, -1, 3])
    where = np.array([True, True, True, False])
    options = {"where": where, "softcap": 3.0}
    more = {"label_smoothing": 0.1, "logsumexp_penalty": 0.2}
    got = source.metrics(**options, **more)(*inputs, labels)
    loss, lse = source("cross_entropy", return_lse=True, **options, **more)(
        *inputs, labels
    )
    wanted = softlib.logits.TokenMetrics(
        loss,
        source("token_log_probs", **options)(*inputs, labels),
        source("entropy", **options)(*inputs),
        source("top1_correct", **options)(*inputs, labels),
        lse,
    )
    for name, one, two in zip(METRICS, got, wanted, strict=True):
        assert one is not None
        assert two is not None
        assert one.dtype == two.dtype, name
        assert_close(one, two, dtype=jnp.float32, length=7)


def test_only_the_metrics_asked_for_are_returned(source):
    hidden, weight = arrays()
    inputs, labels = source.inputs(hidden, weight), np.arange(4)
    default = source("token_metrics")(*inputs, labels)
    assert [a is None for a in default] == [False, True, True, False, True]
    for name in METRICS:
        got = source("token_metrics", metrics=(name,))(*inputs, labels)
        assert [n for n, a in got._asdict().items() if a is not None] == [name]


def test_top1_is_the_lowest_of_equal_classes(source):
    weight = np.array([[0.0], [2.0], [1.0], [2.0], [2.0], [-1.0], [2.0]], np.float32)
    inputs = source.inputs(np.ones((7, 1), np.float32), weight)
    got = source("top1_correct")(*inputs, np.arange(7))
    assert got.dtype == bool
    np.testing.assert_array_equal(got, np.arange(7) == 1)


def test_entropy_of_equal_and_of_certain_logits(source):
    weight = np.zeros((CLASSES, 1), np.float32)
    inputs = source.inputs(np.ones((2, 1), np.float32), weight)
    np.testing.assert_allclose(source("entropy")(*inputs), np.log(7), rtol=1e-6)
    inputs = source.inputs(np.ones((2, 1), np.float32), 500 * np.eye(7, 1, dtype="f4"))
    np.testing.assert_allclose(source("entropy")(*inputs), 0, atol=1e-4)


def test_smoothing_of_one_is_the_mean_over_the_classes(source):
    hidden, weight = arrays()
    inputs = source.inputs(hidden, weight)
    got = source("cross_entropy", label_smoothing=1.0)(*inputs, np.arange(4))
    wanted = -jax.nn.log_softmax(hidden @ weight.T).mean(1)
    assert_close(got, wanted, dtype=jnp.float32, length=7)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_results_are_float32_and_float64_for_float64(source, dtype):
    with jax.enable_x64(dtype == "float64"):
        inputs = [jnp.asarray(a, dtype) for a in source.inputs(*arrays())]
        got = source.metrics()(*inputs, np.arange(4))
        wanted = jnp.promote_types(dtype, jnp.float32)
        for name in ("loss", "log_prob", "entropy", "lse"):
            assert getattr(got, name).dtype == wanted, name
        assert got.correct.dtype == bool


@pytest.mark.parametrize("sign", [1, -1])
def test_logits_of_ten_thousand_give_the_right_loss_and_gradient(source, sign):
    weight = sign * np.linspace(-1, 1, 7, dtype=np.float32)[:, None]
    inputs = source.inputs(np.array([[1e4], [-1e4]], np.float32), weight)
    labels = np.array([0, 0])
    wanted = token_metrics(
        labels, cotangents={"loss": np.ones(2)}, **source.given(*inputs)
    )
    loss, gradients = differentiated(source("cross_entropy"), *inputs, labels=labels)
    np.testing.assert_allclose(loss, wanted.values["loss"], rtol=1e-6)
    for gradient, argument in zip(gradients, source.given(*inputs), strict=True):
        expected = wanted.gradients[argument]
        bound = 1e-5 * np.max(np.abs(expected))
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=bound)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_loss_is_never_negative(softcap):
    """The label logit comes from the tile that lse saw, so it cannot exceed lse."""
    random = np.random.default_rng(0)
    for dtype in (jnp.float32, jnp.bfloat16):
        hidden = jnp.asarray(random.normal(size=(256, 64)) * 10, dtype)
        weight = jnp.asarray(random.normal(size=(50, 64)), dtype)
        best = of_head.row_statistics(
            hidden, weight, statistics=("argmax",), vocab_chunk=16
        ).argmax
        loss = functools.partial(losses.linear_softmax_cross_entropy, softcap=softcap)
        for chunk in (16, 50):
            got = jax.jit(functools.partial(loss, vocab_chunk=chunk))(
                hidden, weight, best
            )
            assert got.min() >= 0
