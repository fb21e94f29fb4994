"""Layers of linear systems: what they compute, states, dtypes, gradients."""

from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from softlib.nn._recurrent import (
    GatedLinearAttention,
    LinearAttention,
    NormalizedAttention,
    QuasiLSTM,
    SelectiveScan,
)
from softlib.testing import assert_close
from tests.host import jnp
from tests.oracles import recurrent

FEATURES, LENGTH = 8, 7
LAYERS: dict[str, Any] = {
    "linear": lambda **o: LinearAttention(FEATURES, 4, num_key_heads=2, **o),
    "normalized": lambda **o: NormalizedAttention(FEATURES, 4, num_key_heads=2, **o),
    "gated": lambda **o: GatedLinearAttention(
        FEATURES, 4, num_key_heads=2, head_features=3, value_features=5, **o
    ),
    "scan": lambda **o: SelectiveScan(FEATURES, num_states=3, **o),
    "lstm": lambda **o: QuasiLSTM(FEATURES, hidden_features=5, reversed_gate=True, **o),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def inputs(seed=0, batch=2):
    return jax.random.normal(jax.random.key(seed), (batch, LENGTH, FEATURES))


@every_layer
def test_parts_with_a_state_are_the_whole_and_all_parameters_learn(name):
    layer, x = LAYERS[name](rngs=nnx.Rngs(0)), inputs()

    def loss(layer, x):
        first = layer(x[:, :4], return_state=True)
        last = layer(x[:, 4:], initial_state=first.state)
        parts = jnp.concatenate([first.output, last], axis=1)
        return (parts**2).sum(), (parts, layer(x))

    gradient, (parts, whole) = nnx.jit(nnx.grad(loss, has_aux=True))(layer, x)
    assert whole.shape == x.shape
    assert_close(parts, whole, dtype=jnp.float32, length=40)
    for path, leaf in nnx.to_flat_state(gradient):
        assert float(jnp.abs(leaf[...]).max()) > 0, path


@every_layer
def test_dtype_is_that_of_the_projections(name):
    layer = LAYERS[name](dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    call = lambda x: layer(x, return_state=True)
    found = jax.eval_shape(call, inputs().astype(jnp.bfloat16))
    assert found.output.dtype == jnp.bfloat16
    state = {leaf.dtype for leaf in jax.tree.leaves(found.state)}
    assert state == {jnp.dtype("float32")}


def test_linear_attention_is_the_oracle_of_its_projections():
    layer, x = LAYERS["linear"](rngs=nnx.Rngs(0)), inputs()
    mask = jnp.arange(LENGTH) != 2
    mask = jnp.stack([mask, mask])
    projected = layer.heads(x)
    output = recurrent.linear_attention(*projected, score=recurrent.elu1, mask=mask)
    kernel = np.asarray(layer.heads.out.kernel[...], np.float64)
    expected = np.einsum("btnd,ndf->btf", output, kernel)
    assert_close(layer(x, mask=mask), expected, dtype=jnp.float32, length=60)


def test_selective_scan_is_the_oracle_of_its_projections():
    layer, x = LAYERS["scan"](rngs=nnx.Rngs(0)), inputs()
    low, B, C = np.split(np.asarray(layer.maps(x), np.float64), [1, 4], axis=-1)
    weight, bias = (
        np.asarray(p[...], np.float64) for p in (layer.step.kernel, layer.step.bias)
    )
    delta = np.logaddexp(0, low @ weight + bias)
    rates = np.tile(np.arange(1.0, 4.0), (FEATURES, 1))
    expected = recurrent.selective_scan(x, delta, rates, B, C, np.ones(FEATURES))
    assert_close(layer(x), expected, dtype=jnp.float32, length=60)


def test_gated_attention_forgets_between_its_tokens_at_the_start():
    """Rates in [1, 16] and steps in [0.001, 0.1]: decays between e^-1.6 and 1."""
    layer = LAYERS["gated"](rngs=nnx.Rngs(0))
    assert layer.step.bias is not None
    steps = jax.nn.softplus(layer.step.bias[...])
    assert bool(((steps > 0.999e-3) & (steps < 0.1001)).all())
    rates = jnp.exp(layer.log_rate[...])
    assert bool(((rates >= 1) & (rates <= 16)).all())


def test_bidirectional_layers_see_the_future():
    layer, x = LAYERS["linear"](rngs=nnx.Rngs(0)), inputs()
    moved = x.at[:, -1].add(1.0)
    x = jnp.stack([x, moved])
    causal = layer(x)[:, :, 0]
    np.testing.assert_array_equal(causal[0], causal[1])
    both = layer(x, is_causal=False)[:, :, 0]
    assert not np.allclose(both[0], both[1])


@pytest.mark.usefixtures("untyped")
def test_errors():
    with pytest.raises(ValueError, match=r"`num_key_heads` must divide .*\(4\), got 3"):
        LinearAttention(FEATURES, 4, num_key_heads=3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"GatedLinearAttention: `num_heads`.*got 3"):
        GatedLinearAttention(FEATURES, 3, rngs=nnx.Rngs(0))
