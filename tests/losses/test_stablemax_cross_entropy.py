"""The StableMax loss: the oracle, every edge, and no loss that rounds to 0."""

import functools
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

import softlib
from softlib import losses, metrics
from softlib.softmax import log_stablemax
from softlib.testing import assert_close, check_transformations
from tests.heads import of_stored
from tests.host import jnp
from tests.oracles import stablemax as oracle

DATA = pathlib.Path(__file__).parent.parent / "data"
loss_of = of_stored.stablemax_cross_entropy


def value_and_gradient(logits, labels, cotangent=None, **options):
    @jax.jit
    def run(logits):
        def total(logits):
            loss = loss_of(logits, labels, **options)
            finite = jnp.where(jnp.isfinite(loss), loss, 0)
            weights = 1 if cotangent is None else jnp.asarray(cotangent, loss.dtype)
            return (finite * weights).sum(), loss

        (_, loss), gradient = jax.value_and_grad(total, has_aux=True)(logits)
        return loss, gradient

    return run(logits)


# --------------------------------------------------------------------------- the oracle
def test_vectors():
    with np.load(DATA / "stablemax_perpgrad_case0.npz") as case:
        logits, labels = jnp.asarray(case["in_logits"]), jnp.asarray(case["in_labels"])
        loss, gradient = value_and_gradient(logits, labels, case["in_cotangent"])
        assert_close(loss, case["out_ce"], dtype="float32", length=16)
        assert_close(gradient, case["out_ce_grad"], dtype="float32", length=16)


@pytest.mark.parametrize("kind", ["ids", "distributions"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("classes", [1, 7])
def test_matches_oracle(classes, dtype, kind):
    random = np.random.default_rng(classes)
    logits = 5 * random.normal(size=(6, classes))
    logits[0], logits[1] = 0, 1
    class_where = random.uniform(size=(6, classes)) < 0.7
    if kind == "ids":
        labels = random.integers(0, classes, 6)
        class_where[np.arange(6), labels] = True
    else:
        class_where[:, 0] = True
        labels = random.uniform(size=(6, classes)) * class_where
        labels[:, -1] = 0
    with jax.enable_x64(dtype == "float64"):
        logits = jnp.asarray(logits, dtype)
        labels = jnp.asarray(labels)
        cotangent = random.normal(size=6)
        wanted, slope = oracle.cross_entropy(
            np.asarray(logits, np.float64), np.asarray(labels), class_where
        )
        # In two batch axes, which are rows like any other.
        loss, gradient = value_and_gradient(
            logits.reshape(2, 3, classes),
            labels.reshape(2, 3, *labels.shape[1:]),
            cotangent.reshape(2, 3),
            class_where=jnp.asarray(class_where).reshape(2, 3, classes),
        )
        computed = jnp.promote_types(dtype, jnp.float32)
        assert loss.dtype == computed
        assert gradient.dtype == logits.dtype
        assert_close(loss.reshape(6), wanted, dtype=computed, length=classes)
        slope = slope * cotangent[:, None]
        gradient = gradient.reshape(slope.shape)
        assert_close(gradient, slope, dtype=dtype, length=classes, c=8)


# ------------------------------------------------------------- losses that stay above 0
def test_neither_loss_nor_gradient_rounds_to_0():
    """As log(s / sum) the loss is 0 from logits of 1e8 on, p_y - 1 likewise."""
    far = 10.0 ** np.arange(4, 37, 4)
    logits = np.stack([far, np.zeros_like(far), -np.ones_like(far)], axis=1)
    labels = np.zeros(len(far), int)
    wanted, slope = oracle.cross_entropy(np.float32(logits), labels)
    loss, gradient = value_and_gradient(
        jnp.asarray(logits, "float32"), jnp.asarray(labels)
    )
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    # Of the label: until rest / sum / |z| is below what float32 holds.
    holds = np.abs(slope) > 1e-37
    np.testing.assert_allclose(gradient[holds], slope[holds], rtol=1e-5)
    assert (np.asarray(gradient)[:4, 0] < 0).all()
    plain = -log_stablemax(jnp.asarray(logits, "float32"))[:, 0]
    assert metrics.zero_loss_fraction(plain) > 0.5
    assert metrics.zero_loss_fraction(loss) == 0


def test_extreme_ratio_of_label_and_others():
    logits = jnp.array([[-1e30, 1e30, 0.0], [-1e4, 1e4, 0.0], [1e30, -1e30, -1e30]])
    loss, gradient = value_and_gradient(logits, jnp.zeros(3, int))
    wanted, _ = oracle.cross_entropy(np.asarray(logits), np.zeros(3, int))
    np.testing.assert_allclose(loss[:2], wanted[:2], rtol=1e-6)
    assert loss[2] < 1e-37
    assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize("position", [0, 1])
def test_slope_is_exact_at_0_and_1(position):
    logits = jnp.array([[0.0, 1.0, -1.0], [1.0, 0.0, 0.0]])
    labels = np.full(2, position)
    loss, gradient = value_and_gradient(logits, jnp.asarray(labels))
    wanted, slope = oracle.cross_entropy(np.asarray(logits), labels)
    assert_close(loss, wanted, dtype="float32", length=3)
    assert_close(gradient, slope, dtype="float32", length=3)


# -------------------------------------------------------------------------------- edges
def test_logits_of_minus_infinity():
    inf = jnp.inf
    logits = jnp.array([[-inf, 0.0, 1.0], [0.0, -inf, -inf], [-inf, -inf, -inf]])
    loss, _ = value_and_gradient(logits, jnp.zeros(3, int))
    np.testing.assert_array_equal(loss, [inf, 0, inf])
    gradient = jax.jit(jax.grad(lambda z: loss_of(z, jnp.zeros(3, int)).sum()))(logits)
    # The label cannot be helped; the others can be lowered.
    np.testing.assert_allclose(gradient, [[0, 1 / 3, 1 / 3], [0] * 3, [0] * 3])
    certain = jnp.array([[0.0, 0.5, 0.5]])
    loss, gradient = value_and_gradient(logits[:1], certain)
    np.testing.assert_allclose(loss, [-(np.log(1 / 3) + np.log(2 / 3)) / 2], rtol=1e-6)
    assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_bad_logit_makes_its_row_nan(bad, place):
    logits = jnp.zeros((2, 3)).at[0, 0].set(-jnp.inf).at[0, place].set(bad)
    for labels in (jnp.zeros(2, int), jnp.full((2, 3), 1 / 3)):
        loss = jax.jit(loss_of)(logits, labels)
        assert jnp.isnan(loss[0])
        np.testing.assert_allclose(loss[1], np.log(3), rtol=1e-6)


def test_label_out_of_range_is_nan_without_gradient():
    logits = jnp.arange(12.0).reshape(4, 3)
    labels = jnp.array([-1, 3, -100, 2])
    loss, gradient = value_and_gradient(logits, labels)
    assert jnp.isnan(loss[:3]).all()
    assert jnp.isfinite(loss[3])
    np.testing.assert_array_equal(gradient[:3], jnp.zeros((3, 3)))


def test_label_on_an_excluded_class_is_infinite_without_gradient():
    class_where = jnp.array([False, True, True])
    distributions = jnp.array([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]])
    for labels in (jnp.array([0, 1]), distributions):
        loss, gradient = value_and_gradient(
            jnp.array([[jnp.nan, 1.0, 2.0]] * 2), labels, class_where=class_where
        )
        assert loss[0] == jnp.inf
        assert jnp.isfinite(loss[1])
        np.testing.assert_array_equal(gradient[0], jnp.zeros(3))
        assert jnp.isfinite(gradient).all()


def test_row_without_classes_is_0():
    class_where = jnp.zeros((3, 4), bool)
    for labels in (jnp.array([0, 1, 3]), jnp.ones((3, 4))):
        loss, gradient = value_and_gradient(
            jnp.full((3, 4), jnp.nan), labels, class_where=class_where
        )
        np.testing.assert_array_equal(loss, jnp.zeros(3))
        np.testing.assert_array_equal(gradient, jnp.zeros((3, 4)))


def test_row_that_does_not_count_is_0_whatever_it_holds():
    logits = jnp.array([[jnp.nan, jnp.inf, 0.0], [1.0, 2.0, 3.0]])
    where = jnp.array([False, True])
    for labels in (jnp.array([-100, 1]), jnp.array([[jnp.nan] * 3, [0.0, 1.0, 0.0]])):
        loss, gradient = value_and_gradient(logits, labels, where=where)
        np.testing.assert_array_equal(loss[0], 0)
        np.testing.assert_array_equal(gradient[0], jnp.zeros(3))
        np.testing.assert_allclose(loss[1], np.log(9 / 3), rtol=1e-6)


@pytest.mark.parametrize("shape", [(0,), (), (2, 0)])
def test_no_rows_and_a_single_row(shape):
    loss = loss_of(jnp.zeros((*shape, 3)), jnp.zeros(shape, int))
    assert loss.shape == shape
    np.testing.assert_allclose(loss, np.full(shape, np.log(3)), rtol=1e-6)


def test_one_hot_distribution_is_its_class():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)), "float32")
    labels = jnp.array([0, 1, 2, 3, 0])
    one = value_and_gradient(logits, labels)
    other = value_and_gradient(logits, jax.nn.one_hot(labels, 4))
    for a, b in zip(one, other, strict=True):
        assert_close(a, np.asarray(b, np.float64), dtype="float32", length=4)


# ---------------------------------------------------------------------- transformations
@pytest.mark.slow  # the map alone is not
@pytest.mark.parametrize(
    "kind", ["ids", pytest.param("distributions", marks=pytest.mark.slow)]
)
def test_transformations(kind):
    random = np.random.default_rng(2)
    logits = jnp.asarray(random.normal(size=(8, 3)), "float32")
    class_where = jnp.asarray([True, True, False])
    where = jnp.asarray(random.uniform(size=8) < 0.7)
    labels = jnp.asarray(random.integers(0, 2, 8))
    if kind == "distributions":
        labels = jax.nn.one_hot(labels, 3) / 2

    def function(logits, labels, where):
        return loss_of(logits, labels, where=where, class_where=class_where)

    check_transformations(
        function, logits, labels, where, rows=(0, 1, 2), differentiable=(0,)
    )


def test_gradient_takes_one_array_beside_the_logits():
    """On a CPU XLA writes the terms of a sum over rows into memory, elsewhere not."""
    shape = jax.ShapeDtypeStruct((64, 4096), jnp.float32)
    labels = jax.ShapeDtypeStruct((64,), jnp.int32)
    gradient = jax.jit(jax.grad(lambda z, y: loss_of(z, y).sum()))
    memory = gradient.lower(shape, labels).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 1.5 * 4 * 64 * 4096


# ------------------------------------------------------------------------------- errors
@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (TypeError, "`logits` must have a floating", (jnp.ones((2, 3), int), 0), {}),
        (ValueError, "`logits` must have at least 1", (jnp.float32(0), 0), {}),
        (ValueError, "`labels` must have shape", (jnp.ones((2, 3)), jnp.zeros(3)), {}),
        (ValueError, "`labels` must have shape", (jnp.ones((2, 3)), 0), {}),
        (TypeError, "`labels` must have an int", (jnp.ones(3), jnp.bool_(True)), {}),
        (
            TypeError,
            "`where` must have dtype bool",
            (jnp.ones((2, 3)), jnp.zeros(2, int)),
            {"where": jnp.ones(2)},
        ),
    ],
)
def test_errors_name_the_argument(error, message, arguments, options):
    logits, labels = arguments
    with pytest.raises(error, match=f"stablemax_cross_entropy: {message}"):
        functools.partial(loss_of, **options)(logits, jnp.asarray(labels))


@pytest.mark.usefixtures("untyped")
def test_logits_as_values():
    """Modifiers count, and those of a head raise."""
    z, labels = jnp.array([[1.0, -2.0, 3.0]]), jnp.array([1])
    found = loss_of(z, labels, softcap=2.0, temperature=0.5)
    wanted = losses.stablemax_cross_entropy(2 * jnp.tanh(z / 2) / 0.5, labels)
    assert_close(found, wanted, dtype="float32", length=3)
    head: Any = softlib.LinearLogits(jnp.ones((1, 2)), jnp.ones((3, 2)))
    with pytest.raises(TypeError, match=r"`materialize\(\)` forms it"):
        losses.stablemax_cross_entropy(head, labels)
