"""How kernels turn scores into weights: small arrays, without a kernel around them."""

import functools
from typing import Any

import jax
import numpy as np
import pytest

from pallas_kernels.gpu_mosaic.attention_scores import Form, across
from pallas_kernels.tpu.attention_weights import LOG2_E, Weights
from tests.host import jnp

# Both sides of every case distinction, and far out.
Z = np.array([-200.0, -36.5, -35.5, -3.0, -0.5, 0.0, 0.25, 1.0, 4.0, 30.0])


def softplus(z):
    return np.logaddexp(z, 0)


def sigmoid(z):
    return np.exp(-np.logaddexp(-z, 0))


# f, and its derivative.
FUNCTIONS: dict[Any, Any] = {
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


# ------------------------------------------------------------------- of the GPU kernels
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_weights_and_slopes_of_a_tile_in_registers(name, softcap):
    """Two rows, one without a positive score; the last pair of each does not attend."""
    form, (f, derivative) = Form(None, None, 0.7, softcap, name), FUNCTIONS[name]
    products = np.stack([Z, -np.abs(Z) - 0.1]) / 0.7
    attends = np.arange(len(Z)) < len(Z) - 1

    @jax.jit
    def run(products, before, norm):
        tile = lambda row: across(row, products.shape)
        bits = jnp.where(attends, form.bits(products), -jnp.inf)
        found: dict[str, Any] = {
            "bits": bits,
            "normalised": form.normalised(bits, tile(norm)),
        }
        empty = jnp.inf if form.is_relative else 0.0
        found["empty"] = form.normalised(jnp.full((1, 3), -jnp.inf), empty)
        if form.is_relative:
            found["tops"] = tops = [form.top(bits, b) for b in before]
            found["relative"] = [form.relative(bits, tile(top)) for top in tops]
        else:
            found["absolute"] = form.absolute(bits)
        return found

    z = 0.7 * products
    z = z if softcap is None else softcap * np.tanh(z / softcap)
    bits = np.where(attends, z * (1 if name == "stablemax" else LOG2_E), -np.inf)
    values, slopes = (np.where(attends, g(z), 0) for g in (f, derivative))
    total = values.sum(1)
    steep = 1.0 if softcap is None else 1 - (z / softcap) ** 2
    # What a row had before: nothing, and more than it has here.
    before = np.array([[-1e30, -1e30], [0.0 if name == "log_softplus" else 5.0, -0.05]])
    with jax.enable_x64():
        norm = np.log2(total) if form.is_relative else 1 / total
        found = jax.device_get(run(products, before, norm))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-15)
    close(found["bits"], bits)
    close(found["normalised"][0], values / total[:, None])
    close(found["normalised"][1], steep * slopes / total[:, None])
    for array in found["empty"]:
        np.testing.assert_array_equal(array, 0)
    if form.is_relative:
        highest = bits.max(1)
        highest = np.minimum(highest, 0) if name == "log_softplus" else highest
        tops = np.maximum(before, highest)
        close(found["tops"], tops)
        for array, top in zip(found["relative"], tops, strict=True):
            close(array, values * np.exp2(-top)[:, None])
    else:
        close(found["absolute"][0], values)
        close(found["absolute"][1], slopes)


def test_forms_tell_what_is_quick_and_which_tile_is_not_full():
    forms = [Form(weights=name, softcap=c) for name in FUNCTIONS for c in (None, 1)]
    where = lambda name: [i for i, form in enumerate(forms) if getattr(form, name)]
    assert where("is_relative") == [0, 1, 2, 3]
    assert where("is_plain") == [0]
    assert where("is_heavy") == [3]
    assert [Form().last(128, 64), Form().last(130, 64)] == [None, 130]
    assert [Form(keys=n).last(192, 64) for n in (128, 127, 1)] == [None, 127, 1]
    np.testing.assert_array_equal(across(jnp.arange(2), (2, 3))[:, 2], [0, 1])
    np.testing.assert_array_equal(across(jnp.arange(3), (2, 3), 1)[1], [0, 1, 2])
