"""How kernels turn scores into weights: small arrays, without a kernel around them."""

import jax
import numpy as np
import pytest

from pallas_kernels.tpu.attention_weights import LOG2_E, Weights
from tests.host import jnp

# Both sides of every case distinction, and far out.
Z = np.array([-200.0, -36.5, -35.5, -3.0, -0.5, 0.0, 0.25, 1.0, 4.0, 30.0])


def softplus(z):
    return np.logaddexp(z, 0)


def sigmoid(z):
    return np.exp(-np.logaddexp(-z, 0))


# f, and its derivative.
FUNCTIONS = {
    "softmax": (np.exp, np.exp),
    "log_softplus": (softplus, sigmoid),
    "softplus": (softplus, sigmoid),
    "stablemax": (
        lambda z: np.where(z >= 0, 1 + z, 1 / (1 + abs(z))),
        lambda z: np.where(z >= 0, 1, 1 / (1 + abs(z)) ** 2),
    ),
}


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_weights_and_slopes_of_products(name, softcap):
    """From products of queries and keys to normalised weights, and back by scores."""
    kind, (f, derivative) = Weights(name), FUNCTIONS[name]
    scale, unit = 0.7, LOG2_E if name == "softmax" else 1.0
    products = Z / scale
    z = Z if softcap is None else softcap * np.tanh(Z / softcap)
    values = f(z)
    total = values.sum()
    with jax.enable_x64():
        scores, slope = kind.scores(jnp.asarray(products), scale, softcap)
        entries = kind.entries(scores)
        inverse = np.log2(total) if kind.is_log else 1 / total
        weights = kind.of_entries(entries, inverse)
        slopes = kind.slopes(scores, weights, inverse)
    np.testing.assert_allclose(scores, unit * z, rtol=1e-12, atol=1e-12)
    if softcap is None:
        assert slope is None
    else:
        np.testing.assert_allclose(slope, 1 - np.tanh(Z / softcap) ** 2, atol=1e-12)
    found = np.exp2(entries) if kind.is_log else entries
    np.testing.assert_allclose(found, values, rtol=1e-12)
    np.testing.assert_allclose(weights, values / total, rtol=1e-12)
    np.testing.assert_allclose(slopes, derivative(z) / total, rtol=1e-9)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_pair_that_does_not_attend_and_an_empty_row_weigh_nothing(name):
    kind = Weights(name)
    full = 0.5
    empty = np.inf if kind.is_log else 0.0
    assert kind.of_entries(jnp.float32(kind.absent), full) == 0
    assert kind.of_entries(jnp.float32(1.0), empty) == 0


def test_a_factor_of_one_costs_nothing():
    products = jnp.ones(3)
    assert Weights("stablemax").scores(products, 1.0, None)[0] is products
    assert Weights("softmax").scores(products, 1.0, None)[0] is not products
    assert [kind.is_light for kind in map(Weights, FUNCTIONS)] == [True, *[False] * 3]
