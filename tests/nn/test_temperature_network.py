"""Networks that predict temperatures: their formulas, their range, what they learn."""

import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from softlib.nn._temperature_network import PrototypeTempNet, TempNet
from tests.host import jnp

CASE = pathlib.Path(__file__).parent.parent / "data" / "tempnet_case0.npz"
RANGE: dict[str, Any] = {"temperature_min": 0.2, "temperature_max": 3.0}


def networks(**options):
    return (
        TempNet(6, 5, **RANGE, rngs=nnx.Rngs(0), **options),
        PrototypeTempNet(6, 4, 5, **RANGE, rngs=nnx.Rngs(0), **options),
    )


def test_matches_independent_vectors():
    with jax.enable_x64():
        data = np.load(CASE)
        x = jnp.asarray(data["in_features"])
        network = TempNet(
            9,
            5,
            temperature_min=float(data["in_net_tau_min"]),
            temperature_max=float(data["in_net_tau_max"]),
            param_dtype=jnp.float64,
            rngs=nnx.Rngs(0),
        )
        for parameter, name in (
            (network.inner.kernel, "W1"),
            (network.inner.bias, "b1"),
            (network.outer.kernel, "W2"),
            (network.outer.bias, "b2"),
            (network.log_sharpness, "phi"),
            (network.pooling, "wl"),
            (network.offset, "bl"),
        ):
            assert parameter is not None
            parameter[...] = jnp.asarray(data[f"in_net_{name}"])
        found = nnx.jit(lambda network, x: network(x))(network, x)
        np.testing.assert_allclose(found, data["out_net_temperature"], rtol=1e-12)


def test_prototypes_match_the_formula():
    network = networks()[1]
    x = np.asarray(jax.random.normal(jax.random.key(1), (3, 6)), np.float64)
    sigmoid = lambda v: 1 / (1 + np.exp(-v))
    value = lambda p: np.asarray(p[...], np.float64)
    assert network.inner.bias is not None
    u = sigmoid(x @ value(network.inner.kernel) + value(network.inner.bias))
    p = value(network.prototypes)
    q = u @ (p / np.linalg.norm(p, axis=1, keepdims=True)).T
    e = np.exp((q - q.max(1, keepdims=True)) / 0.01)
    w = e / e.sum(1, keepdims=True)
    v = ((w - 1 / 5) * sigmoid(q)).sum(1)
    found = network(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(found, 0.2 + 2.8 * sigmoid(v), rtol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_temperatures_are_float32_inside_the_range(dtype):
    x = 1e3 * jax.random.normal(jax.random.key(0), (2, 3, 6)).astype(dtype)
    for network in networks():
        found = network(x)
        assert found.shape == (2, 3)
        assert found.dtype == jnp.float32
        assert ((found > 0.2) & (found < 3.0)).all()


def test_only_the_direction_of_a_row_matters_and_zeros_have_no_gradient():
    network = networks()[0]
    x = jax.random.normal(jax.random.key(0), (3, 6)).at[1].set(0)

    @nnx.jit
    def run(network, x):
        of = lambda network, x: network(x).sum()
        return network(x), network(1e4 * x), nnx.grad(of, argnums=(0, 1))(network, x)

    found, scaled, (of_network, of_x) = run(network, x)
    np.testing.assert_allclose(found, scaled, rtol=1e-5)
    np.testing.assert_array_equal(of_x[1], 0)
    for path, leaf in nnx.to_flat_state(of_network):
        assert float(jnp.abs(leaf[...]).max()) > 0, path
        assert bool(jnp.isfinite(leaf[...]).all()), path


def test_dropout_acts_while_training_only():
    x = jax.random.normal(jax.random.key(0), (40, 6))
    for network, plain in zip(networks(dropout_rate=0.5), networks(), strict=True):
        noisy = network(x)
        network.eval()
        assert float(jnp.abs(noisy - network(x)).max()) > 1e-4
        np.testing.assert_allclose(network(x), plain(x), rtol=1e-6)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("low", "high", "error", "message"),
    [
        (0.0, 1.0, ValueError, "`temperature_min` must be positive and finite, got 0"),
        (1.0, 1.0, ValueError, r"`temperature_max` must be above `temperature_min`"),
        (jnp.float32(1), 2.0, TypeError, "`temperature_min` must be a Python number"),
    ],
)
def test_errors(low, high, error, message):
    ends = {"temperature_min": low, "temperature_max": high, "rngs": nnx.Rngs(0)}
    with pytest.raises(error, match=f"^TempNet: {message}"):
        TempNet(4, 3, **ends)
    with pytest.raises(error, match=f"^PrototypeTempNet: {message}"):
        PrototypeTempNet(4, 3, 2, **ends)
