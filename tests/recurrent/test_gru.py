"""The gated recurrent unit: vectors, a loop in NumPy, parts, derivatives, errors."""

import functools
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from jax.test_util import check_grads

from softlib.recurrent import gru
from softlib.testing import assert_close
from tests.host import jnp

DATA = pathlib.Path(__file__).parent.parent / "data/gru_svm_case0.npz"
run = jax.jit(gru)


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def oracle(x, gate_kernel, candidate_kernel, gate_bias, candidate_bias, state):
    """Every state, in float64, step by step and gate by gate."""
    states, size = [], candidate_kernel.shape[1]
    for t in range(x.shape[-2]):
        now = x[..., t, :]
        gates = sigmoid(np.concatenate([now, state], -1) @ gate_kernel + gate_bias)
        reset, update = gates[..., :size], gates[..., size:]
        inputs = np.concatenate([now, reset * state], -1)
        candidate = np.tanh(inputs @ candidate_kernel + candidate_bias)
        state = update * state + (1 - update) * candidate
        states.append(state)
    return np.stack(states, -2)


def problem(batch=(2,), length=5, features=3, size=4) -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    return (
        rng.normal(size=(*batch, length, features)),
        rng.normal(size=(features + size, 2 * size)),
        rng.normal(size=(features + size, size)),
        rng.normal(size=2 * size),
        rng.normal(size=size),
        rng.normal(size=(*batch, size)),
    )


def options_of(given: Any) -> dict[str, Any]:
    names = ("gate_bias", "candidate_bias", "initial_state")
    return dict(zip(names, given, strict=True))


def test_matches_independent_vectors():
    names = ("x", "gate_kernel", "candidate_kernel", "gate_bias", "candidate_bias")
    with jax.enable_x64(), np.load(DATA) as data:
        x, gates, candidate, *biases = (jnp.asarray(data[f"in_{n}"]) for n in names)
        found = run(x, gates, candidate, gate_bias=biases[0], candidate_bias=biases[1])
        check = functools.partial(assert_close, dtype="float64", length=55)
        check(found.state, data["out_last_state"])
        check(found.output[:, -1], data["out_last_state"])
        scores = np.asarray(found.state) @ data["in_weight"] + data["in_bias"]
        check(scores, data["out_scores"])


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_matches_a_loop(dtype, batch):
    with jax.enable_x64(dtype == "float64"):
        given = tuple(jnp.asarray(part, dtype) for part in problem(batch))
        found = run(*given[:3], **options_of(given[3:]))
        wanted = oracle(*(np.asarray(part, np.float64) for part in given))
        assert found.output.dtype == dtype
        assert found.state.dtype == jnp.promote_types(dtype, jnp.float32)
        assert_close(found.output, wanted, dtype=dtype, length=35)
        accurate = found.state.dtype
        assert_close(found.state, wanted[..., -1, :], dtype=accurate, length=35)


def test_nothing_given_is_zero_and_a_sequence_may_come_in_parts():
    x, gates, candidate, *_ = (jnp.asarray(p, jnp.float32) for p in problem())
    whole = run(x, gates, candidate)
    kernels = np.asarray(gates), np.asarray(candidate)
    zeros = oracle(np.asarray(x), *kernels, 0, 0, np.zeros((2, 4)))
    np.testing.assert_allclose(whole.output, zeros, atol=1e-5)
    first = run(x[:, :2], gates, candidate)
    rest = run(x[:, 2:], gates, candidate, initial_state=first.state)
    np.testing.assert_allclose(rest.output, whole.output[:, 2:], atol=1e-6)
    none = run(x[:, :0], gates, candidate, initial_state=first.state)
    assert none.output.shape == (2, 0, 4)
    np.testing.assert_array_equal(none.state, first.state)


def test_it_is_not_the_unit_that_resets_after_the_product():
    """The same weights give another function in cells that follow cuDNN."""
    x, gates, candidate, *_ = problem(())
    found = run(*(jnp.asarray(p, jnp.float32) for p in (x, gates, candidate)))
    state = np.zeros(4)
    for now in x:
        both = sigmoid(np.concatenate([now, state]) @ gates)
        inside = now @ candidate[:3] + both[:4] * (state @ candidate[3:])
        state = both[4:] * state + (1 - both[4:]) * np.tanh(inside)
    assert np.abs(np.asarray(found.state) - state).max() > 0.01


def test_derivatives_are_those_of_differences():
    with jax.enable_x64():
        given = tuple(jnp.asarray(p) for p in problem((), length=3, features=2, size=2))

        def outputs(x: Any, gates: Any, candidate: Any, *rest: Any) -> Any:
            return gru(x, gates, candidate, **options_of(rest)).output

        check_grads(jax.jit(outputs), given, order=2, modes=["rev"])
        check_grads(jax.jit(outputs), given, order=1, modes=["fwd"])


@pytest.mark.usefixtures("untyped")
def test_errors_name_the_argument():
    x, gates, candidate = jnp.ones((2, 5, 3)), jnp.ones((7, 8)), jnp.ones((7, 4))
    call: Any = gru
    with pytest.raises(ValueError, match=r"^gru: `candidate_kernel` .* D = 3 inputs"):
        call(x, gates, jnp.ones((6, 4)))
    with pytest.raises(ValueError, match=r"`gate_kernel` must have shape \(7, 8\)"):
        call(x, jnp.ones((7, 4)), candidate)
    with pytest.raises(ValueError, match=r"`gate_bias` must have shape \(8,\)"):
        call(x, gates, candidate, gate_bias=jnp.ones(4))
    with pytest.raises(ValueError, match=r"`candidate_bias` must have shape \(4,\)"):
        call(x, gates, candidate, candidate_bias=jnp.ones(8))
    with pytest.raises(ValueError, match=r"`initial_state` must have shape \(2, 4\)"):
        call(x, gates, candidate, initial_state=jnp.ones(4))
    with pytest.raises(ValueError, match=r"`x` must have at least 2 axes"):
        call(jnp.ones(3), gates, candidate)
    with pytest.raises(TypeError, match=r"`x` must have a floating dtype"):
        call(jnp.ones((2, 5, 3), int), gates, candidate)
