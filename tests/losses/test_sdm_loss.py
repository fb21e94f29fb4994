"""The SDM loss: vectors, promises about labels and masks, errors."""

import pathlib

import jax
import numpy as np
import pytest

import softlib
from softlib import losses as library
from softlib.losses import softmax_cross_entropy
from softlib.testing import assert_close, check_transformations
from tests.compiled import compiled
from tests.host import jnp
from tests.oracles import similarity as oracle

DATA = pathlib.Path(__file__).parent.parent / "data"
INF, NAN = jnp.inf, jnp.nan
sdm_loss = compiled(library.sdm_loss)


@jax.jit
def with_gradient(logits, labels, q, d, where=None, class_where=None):
    stored = lambda z: softlib.logits.StoredLogits(z, class_where=class_where)
    call = lambda z: sdm_loss(stored(z), labels, q, d, where=where)
    loss, pull = jax.vjp(call, logits)
    return loss, pull(jnp.ones_like(loss))[0]


def test_vectors():
    with np.load(DATA / "sdm_case0.npz") as data, jax.enable_x64(True):
        names = ("in_logits", "in_labels", "out_q", "out_d")
        loss, gradient = with_gradient(*(jnp.asarray(data[name]) for name in names))
        # The vectors subtract numbers of the size of the logits.
        np.testing.assert_allclose(loss, data["out_loss"], rtol=1e-13, atol=1e-15)
        expected = data["out_grad_logits_of_sum"]
        np.testing.assert_allclose(gradient, expected, atol=1e-14)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matches_oracle_in_narrow_dtypes(dtype):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(6, 5)) * 20, dtype)
    labels = jnp.asarray(rng.integers(0, 5, 6))
    q, d = jnp.arange(6) * 40, jnp.linspace(0, 1, 6)
    loss, gradient = with_gradient(logits, labels, q, d)
    expected = -oracle.log_sdm(logits, np.asarray(q), np.asarray(d, float))
    expected = expected[np.arange(6), labels] / np.log(2 + np.asarray(q))
    assert loss.dtype == jnp.float32
    assert gradient.dtype == dtype
    assert_close(loss, expected, dtype="float32", length=5)
    assert not gradient[0].any()  # out of distribution


def test_is_cross_entropy_at_distance_one_to_the_base_e():
    logits, labels = jnp.array([[1.0, 2, 0], [0.0, 9, 1]]), jnp.array([1, 0])
    loss = sdm_loss(logits, labels, jnp.float32(np.e - 2), 1.0)
    expected = softmax_cross_entropy(logits, labels)
    assert_close(loss, expected, dtype="float32", length=3)


def test_labels_outside_and_excluded_rows_and_classes():
    logits = jnp.array([[1.0, 2, 0]] * 4 + [[NAN] * 3, [-INF] * 3, [-INF, 1, 2]])
    labels = jnp.array([-1, 3, 0, 1, 9, 0, 0])
    where = jnp.array([True, True, True, True, False, True, True])
    q = jnp.array([1.0, 1, 1, 1, NAN, 1, 1])
    classes = jnp.array([False, True, True])
    loss, gradient = with_gradient(logits, labels, q, 0.5, where, classes)
    assert jnp.isnan(loss[:2]).all()
    assert loss[2] == loss[5] == loss[6] == INF
    assert loss[4] == 0
    assert not gradient[jnp.array([0, 1, 2, 4, 5, 6])].any()
    expected = -np.log(1 / (1 + np.exp(-2 * 0.5 * np.log(3)))) / np.log(3)
    assert_close(loss[3], expected, dtype="float32", length=3)
    assert gradient[3, 0] == 0 > gradient[3, 1]
    nothing = sdm_loss(jnp.zeros((0, 3)), jnp.zeros(0, int), 1, 0.5)
    assert nothing.shape == (0,)


@pytest.mark.slow
def test_transformations():
    rng = np.random.default_rng(1)
    logits = jnp.asarray(rng.normal(size=(4, 5)), "float32")
    labels, q = jnp.array([0, 3, 4, 1]), jnp.array([0, 1, 5, 2])
    d = jnp.array([0.0, 0.5, 1, 0.25])
    check_transformations(
        *(sdm_loss, logits, labels, q, d),
        rows=(0, 1, 2, 3),
        differentiable=(0,),
        skip={"forward_mode": "the stream has a custom_vjp"},
    )


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((jnp.zeros((2, 3)), jnp.zeros(2), 1, 1), TypeError, "`labels` must have an"),
        ((jnp.zeros((2, 3)), jnp.zeros(3, int), 1, 1), ValueError, "`labels` must"),
        (
            (jnp.zeros((2, 3)), jnp.zeros(2, int), jnp.zeros(3), 1),
            ValueError,
            "`similarity` must broadcast",
        ),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=f"sdm_loss: {message}"):
        sdm_loss(*arguments)
