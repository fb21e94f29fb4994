"""Losses of margins: values, slopes that are normalized, and masks."""

import jax
import numpy as np
import pytest
from scipy.special import expit

from softlib import masked_mean
from softlib.losses import normalized_logistic_loss, perceptron_loss
from tests.host import jnp

MARGINS = np.array([[2.0, -1.0, 0.0, 0.5], [-3.0, -0.2, 4.0, 1.0]])


def slopes_of(loss, margins, where=None):
    """Of the mean over each row."""
    mean = lambda m: masked_mean(loss(m, where=where), where=where)
    slope = jax.jit(jax.grad(mean))
    return np.stack([slope(jnp.asarray(row)) for row in margins])


def normalized(margins, where=None):
    return perceptron_loss(margins, normalized=True, where=where)


LOSSES = [perceptron_loss, normalized, normalized_logistic_loss]


def test_values_are_the_losses():
    with jax.enable_x64():
        margins = jnp.asarray(MARGINS)
        for loss in (perceptron_loss, normalized):
            np.testing.assert_array_equal(loss(margins), np.maximum(-MARGINS, 0))
        found = normalized_logistic_loss(margins)
        np.testing.assert_allclose(found, np.logaddexp(0, -MARGINS), rtol=1e-14)


def test_slopes_are_those_of_the_perceptron_and_a_softmax():
    wrong = 1.0 * (MARGINS <= 0)
    with jax.enable_x64():
        found = slopes_of(perceptron_loss, MARGINS)
        np.testing.assert_allclose(found, -wrong / 4, rtol=1e-15)
        found = slopes_of(normalized, MARGINS)
        np.testing.assert_allclose(found, -wrong / wrong.sum(1, keepdims=True))
        weights = expit(-MARGINS)
        weights /= weights.sum(1, keepdims=True)
        found = slopes_of(normalized_logistic_loss, MARGINS)
        np.testing.assert_allclose(found, -weights, rtol=1e-14)


def test_each_row_of_a_batch_is_one_problem():
    with jax.enable_x64():
        for loss in (normalized, normalized_logistic_loss):
            total = lambda m, loss=loss: loss(m).mean(-1).sum()
            together = jax.grad(total)(jnp.asarray(MARGINS))
            np.testing.assert_allclose(together, slopes_of(loss, MARGINS))


@pytest.mark.parametrize("size", [200.0, 1e5])
def test_slope_does_not_fade_where_all_sigmoids_underflow(size):
    margins = size + np.array([[0.0, 1.0, 2.0]])
    found = slopes_of(normalized_logistic_loss, margins.astype(np.float32))
    wanted = np.exp([0.0, -1.0, -2.0])
    np.testing.assert_allclose(found, [-wanted / wanted.sum()], rtol=1e-2)
    assert not perceptron_loss(jnp.asarray(margins)).any()


def test_perceptron_without_a_mistake_has_no_slope():
    np.testing.assert_array_equal(slopes_of(normalized, np.ones((1, 3))), 0)


@pytest.mark.parametrize(
    "loss", [perceptron_loss, normalized, normalized_logistic_loss]
)
def test_examples_that_do_not_count_change_nothing(loss):
    where = np.array([1, 0, 1, 1], bool)
    poisoned = jnp.asarray(np.where(where, MARGINS[0], np.nan))
    own = MARGINS[:1, where]
    np.testing.assert_allclose(
        loss(poisoned, where=jnp.asarray(where))[where], loss(jnp.asarray(own))[0]
    )
    assert loss(poisoned, where=jnp.asarray(where))[1] == 0
    found = slopes_of(loss, [poisoned], jnp.asarray(where))
    np.testing.assert_allclose(found[:, where], slopes_of(loss, own), rtol=1e-6)
    assert found[0, 1] == 0
    nothing = slopes_of(loss, [poisoned], jnp.zeros(4, bool))
    np.testing.assert_array_equal(nothing, 0)


def test_second_derivative_is_that_of_the_weights():
    """Of -n w_i; the perceptron's is 0."""
    with jax.enable_x64():
        m, along = jnp.asarray(MARGINS[0]), jnp.asarray([0.3, -1.0, 0.5, 2.0])
        slope = jax.grad(lambda m: normalized_logistic_loss(m).sum())
        _, found = jax.jvp(slope, (m,), (along,))
        wanted = (slope(m + 1e-6 * along) - slope(m - 1e-6 * along)) / 2e-6
        np.testing.assert_allclose(found, wanted, rtol=1e-7)
        slope = jax.grad(lambda m: normalized(m).sum())
        np.testing.assert_array_equal(jax.jvp(slope, (m,), (along,))[1], 0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_margins_give_float32(dtype):
    margins = jnp.asarray(MARGINS, dtype)
    for loss in (perceptron_loss, normalized_logistic_loss):
        found = loss(margins)
        assert found.dtype == jnp.float32
        np.testing.assert_array_equal(found, loss(margins.astype(jnp.float32)))


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("loss", [perceptron_loss, normalized_logistic_loss])
def test_errors(loss):
    name = loss.__name__
    with pytest.raises(TypeError, match=f"{name}: `margins` must have a floating"):
        loss(jnp.ones(3, int))
    with pytest.raises(ValueError, match=f"{name}: `margins` must have at least 1"):
        loss(jnp.ones(()))
    with pytest.raises(ValueError, match=rf"{name}: `where` must have shape \(3,\)"):
        loss(jnp.ones(3), where=jnp.ones(2, bool))
