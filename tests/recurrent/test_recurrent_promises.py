"""What the docstrings of the recurrent forms of attention promise, in their words."""

import functools
from typing import Any

import jax
import numpy as np
import pytest

from softlib.recurrent import (
    attention_matrix,
    gated_linear_attention,
    linear_attention,
    linear_recurrence,
    quasi_lstm,
    selective_scan,
    taylor_feature_map,
)
from softlib.recurrent._linear_recurrence import METHODS
from softlib.testing import assert_close
from tests.compiled import f32
from tests.host import jnp

struct = jax.ShapeDtypeStruct


def draw(seed, *shape, dtype: Any = jnp.float32) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def tokens(length=8, heads=2, size=3):
    return draw(0, 3, length, heads, size)


# ------------------------------------------------------------------ decays and numbers
@pytest.mark.parametrize("chunk_size", [1, 3])
def test_a_decay_of_zero_forgets_all_that_came_before(chunk_size):
    x = tokens()
    log_decay = -np.abs(draw(1, 8, 2))
    log_decay[5] = -np.inf
    call = jax.jit(functools.partial(gated_linear_attention, chunk_size=chunk_size))
    fresh = call(*x[:, 5:], log_decay[5:])
    whole = np.asarray(call(*x, log_decay))
    assert_close(whole[5:], fresh, dtype=jnp.float32, length=9)
    gradients = jax.jit(jax.grad(lambda *a: call(*a).sum(), (0, 1, 2, 3)))
    found = jax.device_get(gradients(*x, log_decay))
    assert all(np.isfinite(g).all() for g in found)
    np.testing.assert_array_equal(found[3][5], 0)


@pytest.mark.parametrize("chunk_size", [16, 1024])
def test_long_sequences_that_decay_fast_keep_their_digits(chunk_size):
    """Cumulative sums reach -19000 here; their differences have no digits left."""
    length = 4096
    x = tokens(length, 1, 2)
    log_decay = np.full((length, 1), np.log(0.01), np.float32)
    call = lambda *a: gated_linear_attention(*a, chunk_size=chunk_size)
    value_and_gradient = jax.jit(
        jax.value_and_grad(lambda *a: ((y := call(*a)).sum(), y), (0, 3), has_aux=True)
    )
    (_, output), gradients = jax.device_get(value_and_gradient(*x, log_decay))
    state, decay = np.zeros((2, 2)), np.exp(np.float64(log_decay[0, 0]))
    q, k, v = np.asarray(x, np.float64)[:, :, 0]
    expected = np.zeros((length, 2))
    for i in range(length):
        state = decay * state + np.outer(k[i], v[i])
        expected[i] = q[i] @ state
    np.testing.assert_allclose(output[:, 0], expected, atol=1e-5)
    assert all(np.isfinite(g).all() for g in gradients)


def test_products_of_decays_underflow_to_zero():
    one = np.ones((64, 1, 1), np.float32)
    log_decay = np.full((64, 1), np.log(0.01), np.float32)
    options: Any = {"feature_map": "identity", "normalizer": "none"}
    call = jax.jit(functools.partial(attention_matrix, **options))
    kernel = np.asarray(call(one, one, log_decay=log_decay))[0]
    assert float(kernel[40, 0]) == 0.0
    assert float(kernel[2, 0]) == pytest.approx(1e-4, rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_decay_of_zero_resets_the_recurrence(method):
    decay, ones = f32([0.5, 0.5, 0.0, 2.0]), np.ones(4, np.float32)
    call = jax.jit(functools.partial(linear_recurrence, method=method))
    got = call(decay, ones)
    np.testing.assert_array_equal(got, [1.0, 1.5, 1.0, 3.0])
    gradient = jax.jit(jax.grad(lambda a: call(a, ones).sum()))(decay)
    np.testing.assert_allclose(gradient, [0.0, 1.0, 1.5 * 3, 1.0], rtol=1e-6)


# -------------------------------------------------------------------- masks, empty rows
@pytest.mark.parametrize("is_causal", [True, False])
def test_the_mask_removes_tokens_whatever_they_hold(is_causal):
    q, k, v = tokens()
    mask: Any = np.array([False, True, True, False, False, True, True, False])
    log_decay = -np.abs(draw(1, 8, 2)) if is_causal else None
    kept = np.flatnonzero(mask)
    options = {"is_causal": is_causal, "chunk_size": 3}
    short = jax.jit(functools.partial(linear_attention, is_causal=is_causal))(
        q[kept],
        k[kept],
        v[kept],
        log_decay=None if log_decay is None else log_decay[kept],
    )
    bad = np.where(mask[:, None, None], f32(0), f32(np.nan))
    if log_decay is not None:
        log_decay = log_decay + bad[..., 0]

    def call(q, k, v, log_decay):
        output = linear_attention(q, k, v, log_decay=log_decay, mask=mask, **options)
        return output.sum(), output

    positions = (0, 1, 2, 3) if is_causal else (0, 1, 2)
    differentiated = jax.jit(jax.grad(call, positions, has_aux=True))
    gradients, output = jax.device_get(differentiated(q, k + bad, v + bad, log_decay))
    assert_close(output[kept], short, dtype=jnp.float32, length=24)
    if is_causal:
        np.testing.assert_array_equal(output[0], 0)  # nothing attends yet
    for gradient in gradients[1:]:
        assert np.isfinite(gradient).all()
        np.testing.assert_array_equal(gradient[~mask], 0)


def test_a_sum_of_zero_gives_zero_and_no_gradient():
    q, k, v = tokens()
    k = np.abs(k)
    k[:5] *= -1  # no feature before token 5

    @functools.partial(jax.jit)
    @functools.partial(jax.grad, argnums=(0, 1, 2), has_aux=True)
    def differentiated(q, k, v):
        output = linear_attention(q, k, v, feature_map="relu", chunk_size=3)
        return output.sum(), output

    found = differentiated(np.abs(q), k, np.abs(v))
    gradients, output = jax.device_get(found)
    np.testing.assert_array_equal(output[:5], 0)
    assert bool((output[5:] > 0).all())
    assert all(np.isfinite(g).all() for g in gradients)
    np.testing.assert_array_equal(gradients[0][:5], 0)


def test_small_features_have_gradients_of_ordinary_size():
    """1 / sum is 1e26 here, and its square no float32."""
    q, k, v = tokens()
    loss = lambda k: linear_attention(q, k, v, feature_map="exp").sum()
    gradient = jax.jit(jax.grad(loss))
    np.testing.assert_allclose(gradient(k - 60), gradient(k), atol=1e-5)


def test_no_token_sees_a_later_one():
    x = tokens()
    moved = x + f32(np.arange(8) >= 4)[:, None, None]
    options = {"log_decay": -np.ones((8, 2), np.float32), "chunk_size": 3}
    call = jax.jit(functools.partial(linear_attention, **options))
    one, two = jax.device_get((call(*x), call(*moved)))
    np.testing.assert_array_equal(one[:4], two[:4])
    assert not np.allclose(one[4:], two[4:])


@pytest.mark.parametrize("is_causal", [True, False])
def test_empty_sequences(is_causal):
    x = f32(np.zeros((3, 2, 0, 2, 3)))
    found = linear_attention(*x, is_causal=is_causal, return_state=True)
    assert found.output.shape == (2, 0, 2, 3)
    np.testing.assert_array_equal(found.state.memory, np.zeros((2, 2, 3, 3)))
    state = found.state._replace(memory=found.state.memory + 1)
    again = linear_attention(
        *x, is_causal=is_causal, initial_state=state, return_state=True
    )
    np.testing.assert_array_equal(again.state.memory, state.memory)


def test_queries_without_any_key_give_zero():
    q = f32(np.ones((4, 2, 3)))
    none = q[:0]
    output = linear_attention(q, none, none, is_causal=False)
    np.testing.assert_array_equal(output, np.zeros((4, 2, 3)))


def test_empty_recurrences():
    u = jnp.zeros((2, 0, 3))
    states = linear_recurrence(u, u, axis=1, return_state=True)
    assert states.output.shape == u.shape
    assert states.state.shape == (2, 3)
    maps = jnp.zeros((2, 0, 4))
    found = selective_scan(u, u, jnp.ones((3, 4)), maps, maps, return_state=True)
    assert (found.output.shape, found.state.shape) == ((2, 0, 3), (2, 3, 4))
    assert quasi_lstm(u, u, u, u).shape == u.shape


def test_a_step_of_zero_passes_over_a_token():
    u, delta = draw(0, 2, 6, 3)
    delta = np.abs(delta)
    delta[2] = 0
    B, C = draw(1, 2, 6, 4)
    A = np.abs(draw(2, 3, 4))
    keep = np.array([0, 1, 3, 4, 5])
    call = jax.jit(selective_scan)
    whole = np.asarray(call(u, delta, A, B, C))
    short = call(u[keep], delta[keep], A, B[keep], C[keep])
    assert_close(whole[keep], short, dtype=jnp.float32, length=20)


# ------------------------------------------------------------------------------- memory
def temporary(function, *shapes, argnums):
    loss = lambda *a: function(*a).astype(jnp.float32).sum()
    gradient = jax.jit(jax.grad(loss, argnums))
    program = gradient.lower(*(struct(s, jnp.float32) for s in shapes)).compile()
    found = program.memory_analysis()
    assert found is not None
    return found.temp_size_in_bytes


def linear(length):
    shape = (length, 2, 8)
    call = functools.partial(linear_attention, feature_map="taylor2")
    call = lambda q, k, v, a, call=call: call(q, k, v, log_decay=a)
    scratch = temporary(call, shape, shape, shape, (length, 2), argnums=(0, 1, 2, 3))
    features = jax.eval_shape(
        lambda x: taylor_feature_map(x, order=2), jnp.ones(8)
    ).size
    of_a_sequence = 4 * length * 2 * features  # queries or keys
    return scratch, {"scores": 4 * 2 * length**2, "features": 2 * of_a_sequence}


def scan(length):
    u, maps, rates = (length, 16), (length, 64), (16, 64)
    call = functools.partial(selective_scan, chunk_size=8)
    scratch = temporary(call, u, u, rates, maps, maps, argnums=(0, 1, 2, 3, 4))
    return scratch, {"states": 4 * length * 16 * 64}


@pytest.mark.parametrize("case", [linear, scan])
def test_memory_of_a_gradient_is_below_what_is_recomputed(case):
    scratch, recomputed = case(8192)
    for name, size in recomputed.items():
        assert scratch < size, name


@pytest.mark.slow
@pytest.mark.parametrize("case", [linear, scan])
def test_memory_of_a_gradient_doubles_with_the_length(case):
    assert case(8192)[0] < 2.1 * case(4096)[0]


@pytest.mark.slow
def test_chunks_bound_the_memory_of_a_recurrence():
    def scratch(**options):
        call = functools.partial(linear_recurrence, **options)
        return temporary(call, (128, 32), (128, 32), argnums=(0, 1))

    chunked = scratch(method="chunked", chunk_size=8)
    assert chunked < scratch(method="associative")
