"""Every public function runs eagerly where JAX refuses implicit transfers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softlib import recurrent, softmax
from softlib._one_program import transfers_are_refused
from tests import example_calls, public_names
from tests.heads import of_stored

NOT_CALLED = {
    "softlib.explain": "traces what it is called with, and computes nothing",
    "softlib.attention.sequence_parallel_attention": "runs inside jax.shard_map",
    "softlib.implementations": "computes nothing",
    "softlib.scoring.perplexity_sparsity": "its loss is called with numbers",
}
CALLED = [name for name in example_calls.FUNCTIONS if name.address not in NOT_CALLED]


def on_device(leaf: Any) -> Any:
    return jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf


@pytest.mark.parametrize("name", CALLED, ids=lambda name: name.address)
def test_a_call_moves_nothing_to_the_device(name: public_names.PublicName):
    call = example_calls.of(name.address)
    call = call.replaced(**jax.tree.map(on_device, call.arguments))
    with jax.transfer_guard("disallow"):
        found = jax.block_until_ready(call())
    floating = lambda leaf: jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating)
    for one, other in zip(*map(jax.tree.leaves, (found, call())), strict=True):
        if example_calls.is_array(other) and floating(other):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
        else:
            assert np.shape(one) == np.shape(other)


def test_gradients_move_nothing_to_the_device():
    logits, labels = jnp.ones((2, 3)), jnp.array([0, 2])
    loss = lambda z: of_stored.softmax_cross_entropy(
        z, labels, label_smoothing=0.1
    ).sum()
    wanted = jax.grad(loss)(logits)
    ones = jnp.ones(())
    with jax.transfer_guard("disallow"):
        _, pull = jax.vjp(loss, logits)
        (found,) = pull(ones)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_guards_are_seen_wherever_they_are_set():
    assert not transfers_are_refused()
    for guard in (jax.transfer_guard, jax.transfer_guard_host_to_device):
        with guard("disallow"):
            assert transfers_are_refused()
        with guard("allow"):
            assert not transfers_are_refused()
    with jax.transfer_guard_device_to_host("disallow"):
        assert not transfers_are_refused()


def test_equal_calls_share_a_program_and_unequal_ones_do_not():
    x = jnp.array([1.0, 2.0])
    with jax.transfer_guard("disallow"):
        for power in (1, 1.0, True):
            found = softmax.tempered_softmax(x, t=power)
            assert found.shape == x.shape
        large, small = (softmax.top_k_logits(x, k=k) for k in (2, 1))
    assert jnp.isfinite(large).all()
    assert not jnp.isfinite(small).all()


def test_a_function_of_the_caller_is_called_in_each_call():
    factor = jnp.array(1.0)
    x = jnp.ones((1, 3, 1, 2))
    features = lambda x: factor * x
    read = lambda: recurrent.linear_attention(
        x, x, x, feature_map=features, normalizer="none"
    )
    with jax.transfer_guard("disallow"):
        before, factor = read(), jnp.exp(factor)
        after = read()
    assert (after != before).all()


def test_errors_are_those_of_other_calls(untyped):
    logits, labels = jnp.ones((2, 3)), jnp.zeros(3, int)
    with jax.transfer_guard("disallow"):
        known = r"^softmax_cross_entropy: `labels` must have shape \(2,\)"
        with pytest.raises(ValueError, match=known):
            of_stored.softmax_cross_entropy(logits, labels)
        with pytest.raises(ValueError, match=r"^softmax: `axis` must"):
            softmax.softmax(logits, axis=5)
