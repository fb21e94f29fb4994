"""Sparsemax loss, entmax loss and bi-tempered logistic loss."""

import contextlib
import pathlib

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import softlib
from softlib.logits import StoredLogits
from softlib.losses import softmax_cross_entropy
from softlib.losses._fenchel_young import (
    bi_tempered_logistic_loss,
    entmax_loss,
    sparsemax_loss,
)
from softlib.softmax import entmax
from softlib.testing import assert_close, check_transformations
from tests.host import jnp
from tests.oracles import sparse_maps as oracle

CASE = pathlib.Path(__file__).parent.parent / "data" / "sparse_softmax_case0.npz"
ALPHAS = np.array([0.5, 0.9, 1.0, 1.001, 1.25, 1.5, 1.9, 2.0])
ROWS, CLASSES = len(ALPHAS), 7


def logits(seed=0, std=1.5):
    return std * np.random.default_rng(seed).normal(size=(ROWS, CLASSES))


def ids(seed=0):
    return np.random.default_rng([1, seed]).integers(0, CLASSES, ROWS)


def masses(seed=0):
    """Distributions, with zeros, that sum to 1 exactly in every dtype."""
    random = np.random.default_rng([2, seed])
    return random.multinomial(64, random.dirichlet(np.full(CLASSES, 0.5)), ROWS) / 64


def losses(z, labels, alpha, where=None, class_where=None):
    masks = {"where": where}
    if class_where is not None:
        z = StoredLogits(z, class_where=class_where)
    return {
        "sparsemax": sparsemax_loss(z, labels, **masks),
        "entmax": entmax_loss(z, labels, alpha=alpha, **masks),
        "bi_tempered": bi_tempered_logistic_loss(z, labels, t1=0.6, t2=1.25, **masks),
    }


@jax.jit
def compiled(z, labels, alpha, where, class_where):
    """The losses, and the gradients of their sums in the logits and in alpha."""

    def run(z, alpha):
        return losses(z, labels, alpha, where, class_where)

    values, pullback = jax.vjp(run, z, alpha)
    zeros = jax.tree.map(jnp.zeros_like, values)
    ones = {n: pullback({**zeros, n: jnp.ones_like(values[n])}) for n in values}
    return values, ones


def run(z, labels, alpha=ALPHAS, where=True, class_where=True):
    z = jnp.asarray(z, jnp.float32)
    labels = np.asarray(labels)
    dtype = jnp.float32 if labels.ndim == z.ndim else jnp.int32
    where = jnp.broadcast_to(jnp.asarray(where), z.shape[:-1])
    class_where = jnp.broadcast_to(jnp.asarray(class_where), z.shape)
    alpha = jnp.broadcast_to(jnp.asarray(alpha, jnp.float32), z.shape[:-1])
    found = compiled(z, jnp.asarray(labels, dtype), alpha, where, class_where)
    return jax.tree.map(np.asarray, found)


def oracles(z, labels, alpha=ALPHAS):
    return {
        "sparsemax": oracle.entmax_loss(z, labels, 2),
        "entmax": oracle.entmax_loss(z, labels, alpha),
        "bi_tempered": oracle.bi_tempered_loss(z, labels, 0.6, 1.25),
    }


def test_vectors():
    with jax.enable_x64():
        case = {n: jnp.asarray(a) for n, a in np.load(CASE).items()}
        alphas = {"1p25": 1.25, "1p5": 1.5, "2p0": 2.0}
        compute = lambda z, labels: [
            entmax_loss(z, labels, alpha=alpha) for alpha in alphas.values()
        ]
        found = jax.jit(compute)(case["in_scores"], case["in_labels"])
        for name, value in zip(alphas, found, strict=True):
            wanted = case[f"out_entmax_loss_{name}"]
            np.testing.assert_allclose(value, wanted, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (ids, "float64"),
        (masses, "float64"),
        (ids, "bfloat16"),
        *(
            pytest.param(kind, dtype, marks=pytest.mark.slow)
            for kind, dtype in ((masses, "bfloat16"), (ids, "float16"))
        ),
    ],
)
def test_matches_oracle(kind, dtype):
    with jax.enable_x64() if dtype == "float64" else contextlib.nullcontext():
        z, labels = jnp.asarray(logits(), dtype), kind()
        computed = jnp.promote_types(dtype, jnp.float32)
        if kind is masses:
            labels = np.asarray(labels, computed)
        alpha = jnp.asarray(ALPHAS, computed)
        values = jax.jit(losses)(z, jnp.asarray(labels), alpha)
        wanted = oracles(np.float64(z), labels, np.float64(alpha))
        for name, value in values.items():
            assert value.dtype == computed
            assert_close(value, wanted[name], dtype=computed, length=CLASSES)


def test_gradient_is_the_prediction_minus_the_label():
    """Exactly, and in alpha the slope of the entropies."""
    z = np.float32(logits())
    onehot = np.eye(CLASSES)[ids()]
    p = np.asarray(jax.jit(lambda z, a: entmax(z, alpha=a))(z, np.float32(ALPHAS)))
    for labels, q in ((ids(), onehot), (masses(), np.float32(masses()))):
        _, gradients = run(z, labels)
        np.testing.assert_allclose(gradients["entmax"][0], p - q, rtol=0, atol=2e-7)
        step = 1e-6
        up, down = (oracle.entmax_loss(z, q, ALPHAS + h) for h in (step, -step))
        slope = (up - down) / (2 * step)
        np.testing.assert_allclose(
            gradients["entmax"][1], slope.astype(float), rtol=1e-4, atol=1e-5
        )


def test_gradients_of_the_bi_tempered_loss():
    """In the logits, both temperatures and the labels, against differences."""
    with jax.enable_x64():
        random = np.random.default_rng(0)
        z, q = jnp.asarray(logits()), jnp.asarray(masses())
        t1, t2 = jnp.asarray(0.6), jnp.asarray(1.25)
        moves = (
            random.normal(size=z.shape),
            random.normal(size=q.shape) * (q > 0),
            np.float64(0.7),
            np.float64(-0.4),
        )

        def call(z, q, t1, t2):
            return bi_tempered_logistic_loss(z, q, t1=t1, t2=t2)

        arguments = (z, q, t1, t2)
        slope = jax.jit(lambda a, m: jax.jvp(call, a, m)[1])(arguments, moves)
        wanted = oracle.directional(oracle.bi_tempered_loss, arguments, moves)
        np.testing.assert_allclose(slope, wanted.astype(float), rtol=1e-8, atol=1e-8)


def test_gradients_in_the_labels():
    """Along the simplex, the loss changes by the formula as it is printed."""
    with jax.enable_x64():
        z, q, alpha = (jnp.asarray(a) for a in (logits(), masses(), ALPHAS))
        move = np.random.default_rng(0).normal(size=q.shape) * (q > 0)
        move = move - q * move.sum(-1, keepdims=True)
        call = lambda q: entmax_loss(z, q, alpha=alpha)
        slope = jax.jit(lambda q, move: jax.jvp(call, (q,), (move,))[1])(q, move)
        of_labels = lambda q: oracle.entmax_loss(z, q, ALPHAS)
        wanted = oracle.directional(of_labels, (q,), (move,))
        np.testing.assert_allclose(slope, wanted.astype(float), rtol=1e-7, atol=1e-7)


# ----------------------------------------------------------------------------- promises
@settings(max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from([0.1, 1.0, 5.0]))
def test_losses_are_never_negative(seed, std):
    z = logits(seed, std)
    for labels in (ids(seed), masses(seed), np.float32(np.eye(CLASSES)[ids(seed)])):
        values, gradients = run(z, labels)
        for name, value in values.items():
            assert (value >= 0).all(), name
            assert np.isfinite(gradients[name][0]).all()


def test_the_loss_of_its_own_prediction_is_zero():
    z = np.float32(logits())
    p = jax.jit(lambda z, a: entmax(z, alpha=a))(z, np.float32(ALPHAS))
    values, gradients = run(z, p)
    np.testing.assert_allclose(values["entmax"], 0, atol=1e-12)
    np.testing.assert_allclose(gradients["entmax"][0], 0, atol=2e-7)


def test_exactly_zero_beyond_the_margin_and_not_before():
    """A margin of 1 for alpha = 2, of 2 for 1.5, 1 / (alpha - 1) in general."""
    alpha = np.array([2, 2, 1.5, 1.5, 1.25, 1.25, 1.5, 1.5])
    margin = 1 / (alpha - 1) + np.array([0, -0.125] * 3 + [100.0, -0.5])
    z = np.tile(-np.arange(float(CLASSES)), (ROWS, 1))
    z[:, 1] = 0
    z[:, 0] = margin
    values, gradients = run(z, np.zeros(ROWS, int), alpha)
    zero = np.arange(ROWS) % 2 == 0
    np.testing.assert_array_equal(values["entmax"] == 0, zero)
    np.testing.assert_array_equal((gradients["entmax"][0] == 0).all(-1), zero)
    wanted = np.float64(oracle.entmax_loss(z, np.zeros(ROWS, int), alpha))
    np.testing.assert_allclose(values["entmax"], wanted, rtol=1e-4, atol=1e-12)


def test_alpha_one_is_cross_entropy():
    z, labels = jnp.asarray(logits(), jnp.float32), jnp.asarray(ids())
    losses = jax.jit(
        lambda z, labels: (
            entmax_loss(z, labels, alpha=1),
            bi_tempered_logistic_loss(z, labels, t1=1, t2=1),
            softmax_cross_entropy(z, labels),
        )
    )
    one, two, wanted = losses(z, labels)
    np.testing.assert_allclose(one, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(two, wanted, rtol=1e-5, atol=1e-6)
    # Far from the label the loss is the distance to it.
    far = losses(z.at[:, 0].set(300.0), jnp.ones_like(labels))
    np.testing.assert_allclose(far[0], far[2], rtol=1e-6)


def test_a_distant_label_costs_its_distance():
    """Also off the support, where its probability is 0."""
    z = np.zeros((ROWS, CLASSES))
    z[:, 0] = 1e4
    labels = np.full(ROWS, 3)
    values, gradients = run(z, labels)
    wanted = np.float64(oracle.entmax_loss(z, labels, ALPHAS))
    np.testing.assert_allclose(values["entmax"], wanted, rtol=1e-6)
    assert np.isfinite(gradients["entmax"][0]).all()
    onehot, _ = run(z, np.eye(CLASSES)[labels])
    np.testing.assert_allclose(onehot["entmax"], wanted, rtol=1e-6)


# --------------------------------------------------------------------------- exceptions
@pytest.mark.parametrize("kind", [ids, masses])
def test_exceptional_rows(kind):
    """Labels outside, excluded and masked; rows without classes; bad logits."""
    z, labels = logits(), kind()
    where, classes = np.ones(ROWS, bool), np.ones((ROWS, CLASSES), bool)
    where[0] = False
    z[0], labels[0] = np.nan, np.nan if kind is masses else -100
    classes[1] = False
    classes[2, 4] = False
    if kind is ids:
        labels[2], labels[3], labels[4], labels[5:] = 4, CLASSES, -1, 2
    else:
        labels[2:] = np.eye(CLASSES)[4]
        classes[1] = True
        z[1] = 0.0
    z[5, 0] = np.nan
    z[6, 0] = np.inf
    values, gradients = run(z, labels, where=where, class_where=classes)
    for name, value in values.items():
        gradient = gradients[name][0]
        assert value[0] == 0, name
        assert not gradient[:1].any(), name
        assert value[2] == np.inf, name
        assert not gradient[2].any(), name
        assert np.isnan(value[5:7]).all(), name
        assert np.isfinite(value[7]), name
        assert np.isfinite(gradient[7]).all(), name
        if kind is ids:
            assert value[1] == 0, name
            assert np.isnan(value[3:5]).all(), name
            assert not gradient[1].any(), name
            assert not gradient[3:5].any(), name


def test_excluded_classes_are_as_if_absent():
    z, labels = logits(), ids() % 4
    some = np.arange(CLASSES) < 4
    masked, gradients = run(z, labels, class_where=some)
    wanted = oracles(z[:, :4].astype(np.float32), labels)
    for name, value in masked.items():
        np.testing.assert_allclose(
            value, np.float64(wanted[name]), rtol=1e-5, atol=1e-6
        )
        assert not gradients[name][0][:, 4:].any()


def test_one_class_no_rows_and_batches():
    run = jax.jit(
        lambda z, labels: (
            sparsemax_loss(z, labels),
            entmax_loss(z, labels, alpha=jnp.full(labels.shape, 1.2)),
        )
    )
    for shape in ((0, 3), (2, 3, 1)):
        labels = jnp.zeros(shape[:-1], jnp.int32)
        for value in run(jnp.ones(shape), labels):
            np.testing.assert_array_equal(value, np.zeros(shape[:-1]))


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda z, y: sparsemax_loss(z, y > 0), TypeError, "`labels` must have an int"),
        (lambda z, y: sparsemax_loss(z, z[:, 1:]), ValueError, "`labels` must have sh"),
        (lambda z, y: sparsemax_loss(z, y[1:]), ValueError, "`labels` must have shape"),
        (lambda z, y: sparsemax_loss(z, y, where=z), TypeError, "`where` must have dt"),
        (lambda z, y: entmax_loss(y, y), TypeError, "`logits` must have a floating dt"),
        (lambda z, y: entmax_loss(z, y, alpha=0), ValueError, "`alpha` must be positi"),
        (lambda z, y: entmax_loss(z, y, alpha=z), ValueError, "`alpha` must have shap"),
        (
            lambda z, y: bi_tempered_logistic_loss(z, y, t1=2.0, t2=1.0),
            ValueError,
            "`t1` must be finite and below 2, got 2",
        ),
        (
            lambda z, y: bi_tempered_logistic_loss(z, y, t1=0.5, t2=y),
            TypeError,
            "`t2` must have a floating dtype",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(jnp.zeros((3, 4)), jnp.zeros(3, jnp.int32))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ids", "masses", "bi_tempered"])
def test_transformations(kind):
    # Small logits: differences are exact to the third derivative only.
    z, labels = jnp.asarray(logits(std=0.6), jnp.float32), jnp.asarray(ids())
    alpha = jnp.linspace(0.6, 1.9, ROWS)
    if kind == "ids":
        call = lambda z, labels, alpha: entmax_loss(z, labels, alpha=alpha)
        check_transformations(call, z, labels, alpha, rows=(0, 1, 2))
    elif kind == "masses":
        # Derivatives by masses hold along the simplex.
        of_scores = lambda z, u, alpha: entmax_loss(z, jax.nn.softmax(u), alpha=alpha)
        check_transformations(of_scores, z, z[::-1], alpha, rows=(0, 1, 2))
    else:

        def tempered(z, labels, t2, t1):
            return bi_tempered_logistic_loss(z, labels, t1=t1, t2=t2)

        arrays = (z, jax.nn.softmax(z[::-1]), alpha, jnp.float32(0.4))
        check_transformations(tempered, *arrays, rows=(0, 1, 2))


@pytest.mark.usefixtures("untyped")
def test_logits_as_values():
    """Modifiers count; what needs a stream or an implementation raises."""
    z, labels = jnp.asarray(logits(), jnp.float32), jnp.asarray(ids())
    capped = StoredLogits(z, softcap=2.0, temperature=0.7)
    wanted = losses(2.0 * jnp.tanh(z / 2.0) / 0.7, labels, 1.5)
    for name, value in losses(capped, labels, 1.5).items():
        assert_close(value, wanted[name], dtype="float32", length=CLASSES)
    head = softlib.LinearLogits(jnp.ones((ROWS, 3)), jnp.ones((CLASSES, 3)))
    with pytest.raises(TypeError, match=r"sparsemax_loss.*`materialize\(\)` forms it"):
        sparsemax_loss(head, labels)
    pinned = StoredLogits(z, implementation="xla")
    with pytest.raises(ValueError, match="entmax_loss: `implementation` of the logits"):
        entmax_loss(pinned, labels)
