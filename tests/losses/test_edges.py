"""The loss of scores of edges."""

import jax
import numpy as np
import pytest

from softlib import losses
from softlib.testing import assert_close, check_transformations
from tests.host import jnp

loss_of = jax.jit(losses.edge_reconstruction_loss)
LOGITS = np.array([-40.0, -3.0, 0.0, 0.5, 7.0, 40.0, 80.0])


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("label", [0.0, 1.0, 0.25])
def test_matches_definition(dtype, label):
    with jax.enable_x64(dtype == "float64"):
        logits = jnp.asarray(LOGITS, dtype)
        labels = jnp.full(logits.shape, label, dtype)
        wanted = label * np.logaddexp(0, -LOGITS) + (1 - label) * np.logaddexp(
            0, LOGITS
        )
        found = loss_of(logits, labels)
        assert found.dtype == dtype
        assert_close(found / wanted, np.ones(7), dtype=dtype, length=1)


def test_labels_are_numbers_or_facts():
    logits, labels = jnp.asarray(LOGITS, jnp.float32), LOGITS > 1
    wanted = loss_of(logits, labels.astype(np.float32))
    np.testing.assert_array_equal(loss_of(logits, jnp.asarray(labels)), wanted)
    np.testing.assert_array_equal(loss_of(logits, labels.astype(np.int32)), wanted)


def test_edges_that_do_not_count_cost_nothing():
    logits = jnp.array([1.0, jnp.nan, -jnp.inf, jnp.inf])
    where = jnp.array([True, False, True, True])
    labels = jnp.array([1.0, jnp.nan, 0.0, 1.0])
    total = lambda logits: losses.edge_reconstruction_loss(logits, labels, where=where)
    found, gradient = jax.jit(jax.value_and_grad(lambda x: total(x).sum()))(logits)
    np.testing.assert_allclose(found, np.log1p(np.exp(-1)), rtol=1e-6)
    np.testing.assert_array_equal(gradient[1:], 0)


def test_transformations():
    random = np.random.default_rng(0)
    logits = jnp.asarray(random.normal(size=(4, 3)), jnp.float32)
    labels = jnp.asarray(random.uniform(0.1, 0.9, size=(4, 3)), jnp.float32)
    check_transformations(losses.edge_reconstruction_loss, logits, labels, rows=(0, 1))


@pytest.mark.usefixtures("untyped")
def test_errors():
    message = r"^edge_reconstruction_loss: `labels` must have shape \(3,\)"
    with pytest.raises(ValueError, match=message):
        losses.edge_reconstruction_loss(jnp.zeros(3), jnp.zeros(4))
