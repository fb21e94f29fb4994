"""The diagonal systems: linear recurrence, selective scan, quasi-LSTM."""

import functools
import pathlib
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from softlib.recurrent import (
    gated_linear_attention,
    linear_recurrence,
    quasi_lstm,
    quasi_lstm_matrix,
    selective_scan,
    selective_scan_matrix,
)
from softlib.recurrent._linear_recurrence import METHODS
from softlib.testing import assert_close
from tests import pairwise
from tests.host import jnp
from tests.oracles import recurrent

DATA = pathlib.Path(__file__).parent.parent / "data"


def draw(seed, *shape, dtype: Any = jnp.float32) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


RECURRENCES = pairwise.pairwise(
    {
        "method": METHODS,
        "axis": (0, 1, -1),
        "reverse": (False, True),
        "started": (False, True),
        "broadcast": (False, True),
        "length": (1, 2, 9),
        "chunk_size": (None, 1, 4),
    },
    lambda case: (
        not (case.get("chunk_size") and case.get("method", "chunked") != "chunked")
    ),
)


@pytest.mark.parametrize("case", RECURRENCES, ids=pairwise.name)
def test_recurrence_matches_oracle(case):
    axis, length = case["axis"], case["length"]
    shape = [2, 3, 2]
    shape[axis] = length
    decay_shape = [1, 1, 1] if case["broadcast"] else list(shape)
    if length > 2:
        decay_shape[axis] = length
    decay, inputs = draw(0, *decay_shape), draw(1, *shape)  # of either sign
    del shape[axis]
    start = draw(2, *shape) if case["started"] else None
    options = {"axis": axis, "reverse": case["reverse"]}
    call = functools.partial(
        linear_recurrence,
        method=case["method"],
        chunk_size=case["chunk_size"],
        return_state=True,
        **options,
    )
    found = jax.jit(lambda a, b, h: call(a, b, initial_state=h))(decay, inputs, start)
    expected = recurrent.linear_recurrence(
        decay, inputs, initial_state=start, **options
    )
    assert_close(found.output, expected, dtype=jnp.float32, length=9, c=8)
    last = np.take(expected, 0 if case["reverse"] else -1, axis=axis)
    assert_close(found.state, last, dtype=jnp.float32, length=9, c=8)


def system(batch=(2,), length=9, channels=3, states=2, dtype=jnp.float32):
    u = draw(0, *batch, length, channels, dtype=dtype)
    delta = np.log1p(np.exp(draw(1, *batch, length, channels, dtype=dtype)))
    A = np.exp(draw(2, channels, states, dtype=dtype))
    B, C = draw(3, 2, *batch, length, states, dtype=dtype)
    return u, delta, A, B, C, draw(4, channels, dtype=dtype)


@pytest.mark.parametrize(
    ("chunk_size", "skips"),
    [(1, True), (4, False), (4, True), (9, False), (None, True)],
)
def test_selective_scan_matches_oracle(chunk_size, skips):
    u, delta, A, B, C, D = system(batch=(2,) if skips else ())
    arguments = (u, delta, A, B, C, D if skips else None)
    call = functools.partial(selective_scan, chunk_size=chunk_size)
    expected = recurrent.selective_scan(*arguments)
    got = jax.jit(call)(*arguments)
    assert_close(got, expected, dtype=jnp.float32, length=18, c=8)


def test_selective_scan_matrix_matches_oracle():
    arguments = system()[1:]
    got = selective_scan_matrix(*arguments)
    expected = recurrent.selective_scan_matrix(*arguments)
    assert_close(got, expected, dtype=jnp.float32, length=9)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_selective_scan_dtypes(dtype):
    with jax.enable_x64(dtype == "float64"):
        arguments = system(dtype=jnp.dtype(dtype))
        found = jax.jit(functools.partial(selective_scan, return_state=True))(
            *arguments
        )
        assert found.output.dtype == jnp.dtype(dtype)
        assert found.state.dtype == jnp.promote_types(dtype, jnp.float32)
        rounded = [np.asarray(a, np.float64) for a in arguments]
        expected = recurrent.selective_scan(*rounded)
        assert_close(found.output, expected, dtype=dtype, length=18)


def test_selective_scan_in_parts_and_step_by_step():
    u, delta, A, B, C, D = system(length=6)
    call = functools.partial(selective_scan, return_state=True, chunk_size=3)
    whole = jax.jit(call)(u, delta, A, B, C, D)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def part(a, b, state):
        cut = lambda x: x[:, a:b]
        return selective_scan(
            cut(u),
            cut(delta),
            A,
            cut(B),
            cut(C),
            D,
            initial_state=state,
            return_state=True,
        )

    first = part(0, 4, None)
    outputs, state = [first.output], first.state
    for i in range(4, 6):
        output, state = part(i, i + 1, state)
        outputs.append(output)
    got = jnp.concatenate(outputs, axis=1)
    assert_close(got, whole.output, dtype=jnp.float32, length=18)
    assert_close(state, whole.state, dtype=jnp.float32, length=7)


def test_without_decay_the_selective_scan_is_a_cumulative_sum():
    u, delta, A, B, C, _ = system()
    got = selective_scan(u, delta, jnp.zeros_like(A), B, C, chunk_size=4)
    added = (delta * u)[..., None] * B[:, :, None]
    expected = (jnp.cumsum(added, axis=1) * C[:, :, None]).sum(-1)
    assert_close(got, expected, dtype=jnp.float32, length=18)


def test_one_rate_for_all_states_is_gated_linear_attention():
    """The scalar state-space model: C is the query, B the key, delta u the value."""
    u, delta, _, B, C, _ = system(channels=1, states=4)
    rate = 0.7
    scan = jax.jit(selective_scan)(u, delta, jnp.full((1, 4), rate), B, C)
    heads = lambda x: x[:, :, None]
    call = jax.jit(functools.partial(gated_linear_attention, chunk_size=4))
    gated = call(heads(C), heads(B), heads(delta * u), -rate * delta)
    assert_close(gated[:, :, 0], scan, dtype=jnp.float32, length=40)


def gates(*shape):
    return draw(7, 4, *shape)


@pytest.mark.parametrize("method", METHODS)
def test_quasi_lstm_of_independent_vectors(method):
    data = np.load(DATA / "dynamical_systems_case0.npz")
    with jax.enable_x64():
        arguments = [jnp.asarray(data[f"in_lstm_{name}"]) for name in "fioz"]
        got = jax.jit(functools.partial(quasi_lstm, method=method))(*arguments)
    assert_close(got, data["out_qlstm"], dtype=jnp.float64, length=10)


@pytest.mark.parametrize("alpha", [None, 0, 0.5, 2.0, "channel"])
def test_quasi_lstm_matches_oracle(alpha):
    f, i, o, z = gates(2, 6, 3)
    alpha = jnp.array([0.3, 1.0, 2.0]) if alpha == "channel" else alpha
    expected = recurrent.quasi_lstm(f, i, o, z, alpha=alpha)
    got = jax.jit(functools.partial(quasi_lstm, alpha=alpha))(f, i, o, z)
    assert_close(got, expected, dtype=jnp.float32, length=6)
    kernel = jax.jit(functools.partial(quasi_lstm_matrix, alpha=alpha))(f, i, o)
    again = jnp.einsum("bdts,bsd->btd", kernel, z)
    assert_close(again, expected, dtype=jnp.float32, length=6)


def test_reversed_gate_far_from_zero_is_the_exact_power():
    f = jnp.array([100.0, -100.0, 0.0])[:, None]
    one = jnp.full_like(f, 50.0)  # gates of 1
    kernel = quasi_lstm_matrix(f, one, one, alpha=0.01)[0]
    # sigmoid(-100)^0.01 = e^-1, although sigmoid(-100) is 0 in float32.
    decays = np.exp(-0.01 * np.logaddexp(0, np.array([100.0, -100.0, 0.0])))
    expected = [decays[0] / decays[0], decays[1], decays[1] * decays[2]]
    np.testing.assert_allclose(kernel[:, 0], expected, rtol=1e-6)
    started = quasi_lstm(
        f[:1], one[:1], one[:1], 0 * f[:1], alpha=0.01, initial_state=jnp.ones(1)
    )
    np.testing.assert_allclose(started[0, 0], np.exp(-1.0), rtol=1e-6)


def test_quasi_lstm_in_parts():
    f, i, o, z = gates(2, 7, 3)
    call = jax.jit(functools.partial(quasi_lstm, return_state=True))
    whole = call(f, i, o, z)
    cut = lambda a, b: [x[:, a:b] for x in (f, i, o, z)]
    first = call(*cut(0, 3))
    last = call(*cut(3, 7), initial_state=first.state)
    got = jnp.concatenate([first.output, last.output], axis=1)
    assert_close(got, whole.output, dtype=jnp.float32, length=7)
    assert_close(last.state, whole.state, dtype=jnp.float32, length=7)


RECURRENCE = jax.jit(functools.partial(linear_recurrence, return_state=True))


@hypothesis.given(seed=st.integers(0, 2**31), cut=st.sampled_from([1, 3, 5]))
@hypothesis.settings(max_examples=10)
def test_recurrences_compose(seed, cut):
    """Two segments are one: the law that makes the tree possible."""
    decay, inputs = draw(seed, 2, 6, 2)
    first = RECURRENCE(decay[:cut], inputs[:cut])
    last = RECURRENCE(decay[cut:], inputs[cut:], initial_state=first.state)
    whole = RECURRENCE(decay, inputs).output
    got = jnp.concatenate([first.output, last.output])
    assert_close(got, whole, dtype=jnp.float32, length=6, c=8)
