"""Router losses: vectors, counts by hand, padding, shards, gradients, errors."""

import pathlib

import jax
import numpy as np
import pytest

from softlib.losses._router import (
    cv_squared,
    importance_loss,
    load_balancing_loss,
    router_z_loss,
)
from softlib.softmax import softmax
from softlib.testing import assert_close
from tests.host import jnp

DATA = pathlib.Path(__file__).parent.parent / "data"
NAN, INF = jnp.nan, jnp.inf


def problem(tokens=12, experts=5, k=2, seed=0):
    rng = np.random.default_rng(seed)
    logits = jnp.asarray(rng.normal(size=(tokens, experts)), "float32")
    probs = softmax(logits)
    return logits, probs, jax.lax.top_k(probs, k)[1]


def balance_by_hand(probs, indices):
    probs, indices = np.asarray(probs, np.float64), np.asarray(indices)
    tokens, experts = probs.shape
    used = np.zeros(experts)
    for row in indices:
        for e in set(row.tolist()) - {-1}:
            used[e] += 1
    return experts * sum(used / tokens * probs.mean(0))


def test_vectors():
    with np.load(DATA / "topk_moe_gating_case0.npz") as data, jax.enable_x64():
        logits = jnp.asarray(data["out_logits"])
        indices = jnp.asarray(data["out_expert_index"])
        balance, z, importance = jax.jit(
            lambda logits, gates: (
                load_balancing_loss(softmax(logits), indices),
                router_z_loss(logits),
                importance_loss(gates),
            )
        )(logits, jnp.asarray(data["out_gate_nobias"]))
        np.testing.assert_allclose(balance, data["out_load_balancing"], rtol=1e-14)
        np.testing.assert_allclose(z, data["out_router_z"], rtol=1e-13)
        # The vector has 1e-10 added to the square of the mean, 4.8 ** 2.
        expected = data["out_importance_cv2"] * (1 + 1e-10 / 4.8**2)
        np.testing.assert_allclose(importance, expected, rtol=1e-13)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_balance_is_the_count_by_hand(dtype):
    _, probs, indices = problem()
    indices = indices.at[3, 1].set(-1).at[5].set(jnp.array([2, 2]))
    with jax.enable_x64(dtype == "float64"):
        probs = jnp.asarray(np.asarray(probs), dtype)
        found = load_balancing_loss(probs, indices)
        assert found.dtype == ("float64" if dtype == "float64" else "float32")
        expected = balance_by_hand(probs, indices)
        assert_close(found, expected, dtype=found.dtype, length=12)


@pytest.mark.parametrize("k", [1, 2])
def test_balance_is_k_for_experts_used_alike_and_e_for_one_that_has_all(k):
    tokens = jnp.arange(8)[:, None]
    indices = (k * tokens + jnp.arange(k)[None]) % 4
    even = load_balancing_loss(jnp.full((8, 4), 0.25), indices)
    np.testing.assert_array_equal(even, k)
    certain = jnp.zeros((8, 4)).at[:, 2].set(1)
    collapsed = load_balancing_loss(certain, jnp.full((8, 1), 2))
    np.testing.assert_array_equal(collapsed, 4)


def test_only_the_probabilities_have_a_gradient():
    _, probs, indices = problem()
    slope = jax.jit(jax.grad(load_balancing_loss))(probs, indices)
    used = np.array([(np.asarray(indices) == e).sum() for e in range(5)]) / 12
    expected = np.broadcast_to(5 * used / 12, probs.shape)
    assert_close(slope, expected, dtype=slope.dtype, length=12)


def losses_of(logits, indices, where=None, axis_name=None):
    probs = softmax(logits, where=None if where is None else where[:, None])
    over = {"where": where, "axis_name": axis_name}
    balance = load_balancing_loss(probs, indices, **over)
    return balance, importance_loss(probs, **over)


def test_padding_is_as_if_it_were_not_there():
    logits, _, indices = problem()
    where = jnp.arange(12) % 3 != 1
    padded = jnp.where(where[:, None], logits, NAN)
    wild = jnp.where(where[:, None], indices, 99)

    @jax.jit
    def found(logits, indices, where):
        total = lambda z: (sum(losses_of(z, indices, where)), router_z_loss(z))
        z = router_z_loss(logits, where=where)
        slope = jax.grad(lambda y: router_z_loss(y, where=where).sum())(logits)
        first, _ = total(logits)
        return first, z, slope, jax.grad(lambda y: total(y)[0])(logits)

    loss, z, slope, gradient = found(padded, wild, where)
    expected = found(logits[where], indices[where], jnp.ones(8, bool))
    assert_close(loss, expected[0], dtype=loss.dtype, length=12)
    for whole, part in zip((z, slope, gradient), expected[1:], strict=True):
        assert not whole[~where].any()
        assert_close(whole[where], part, dtype=whole.dtype, length=12)


def test_without_tokens_losses_and_gradients_are_0():
    logits, _, indices = problem()
    nobody = jnp.zeros(12, bool)

    def total(logits):
        z = router_z_loss(logits, where=nobody).sum()
        return sum(losses_of(logits, indices, nobody)) + z

    value, slope = jax.jit(jax.value_and_grad(total))(logits)
    assert value == 0
    assert not slope.any()
    for empty in jax.jit(losses_of)(jnp.zeros((0, 3)), jnp.zeros((0, 1), int)):
        assert empty == 0


def test_shards_have_the_losses_of_all_tokens():
    logits, _, indices = problem()
    where = jnp.arange(12) < 7  # shards with different numbers of tokens
    call = lambda *shard: losses_of(*shard, axis_name="shards")
    parts = [a.reshape(3, 4, *a.shape[1:]) for a in (logits, indices, where)]
    found = jax.jit(jax.vmap(call, axis_name="shards"))(*parts)
    for shards, whole in zip(found, losses_of(logits, indices, where), strict=True):
        assert_close(shards, jnp.full(3, whole), dtype=shards.dtype, length=12)


def test_groups_have_losses_of_their_own():
    logits, probs, indices = problem()
    balance = jax.jit(load_balancing_loss, static_argnames="axis")
    grouped = lambda a: a.reshape(3, 4, a.shape[-1])
    found = balance(grouped(probs), grouped(indices), axis=1)
    each = [balance(probs[i : i + 4], indices[i : i + 4]) for i in (0, 4, 8)]
    assert_close(found, jnp.stack(each), dtype=found.dtype, length=12)
    bad = balance(grouped(probs), grouped(indices).at[1, 0, 0].set(5), axis=1)
    assert jnp.isnan(bad).tolist() == [False, True, False]
    shapes = jax.eval_shape(
        lambda: (
            importance_loss(grouped(probs), axis=-2),
            router_z_loss(grouped(logits)),
        )
    )
    assert [each.shape for each in shapes] == [(4,), (3, 4)]


def test_z_loss_does_not_count_experts_of_minus_infinity():
    logits = jnp.array([[2.0, -INF], [-INF, -INF], [1e4, 1e4]])
    total = lambda z: (router_z_loss(z).sum(), router_z_loss(z))
    slope, value = jax.jit(jax.grad(total, has_aux=True))(logits)
    np.testing.assert_array_equal(value[:2], [4, 0])
    assert jnp.isfinite(value[2])
    np.testing.assert_array_equal(slope[:2], [[4, 0], [0, 0]])


def test_squared_coefficient_of_variation():
    x = jnp.array([[1.0, 3, NAN], [0, 0, 0], [1, 1, 4], [0, 0, 9], [-1, 1, 0]])
    where = jnp.array([[True, True, False]] + [[True] * 3] * 4)
    found = jax.jit(cv_squared)(x, where=where)
    np.testing.assert_allclose(found, [0.25, 0, 0.5, 2, INF], rtol=1e-6)
    slope = jax.jit(jax.grad(lambda x: cv_squared(x[:3], where=where[:3]).sum()))(x)
    # d/dx of mean(x^2) / mean(x)^2: 2 (x / m - q) / (n m) with q its value
    expected = np.zeros((5, 3))
    expected[0, :2] = 2 * (np.array([1, 3]) / 2 - 1.25) / 4
    expected[2] = 2 * (np.array([1, 1, 4]) / 2 - 1.5) / 6
    np.testing.assert_allclose(slope, expected, atol=1e-6)
    rng = np.random.default_rng(0)
    x = rng.random((4, 3))
    for axis in (0, (0, 1), None):
        y = jax.jit(cv_squared, static_argnums=1)(jnp.asarray(x, "float32"), axis)
        assert_close(y, x.var(axis) / x.mean(axis) ** 2, dtype=y.dtype, length=12)
    large = cv_squared(jnp.array([1e30, 3e30]))
    np.testing.assert_allclose(large, 0.25, rtol=1e-6)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: load_balancing_loss(jnp.ones((2, 3)), jnp.ones((2, 1))),
            TypeError,
            "load_balancing_loss: `expert_indices` must have an integer dtype",
        ),
        (
            lambda: load_balancing_loss(jnp.ones((2, 3)), jnp.ones((3, 1), int)),
            ValueError,
            r"`expert_indices` must have shape \(2, 'K'\), got \(3, 1\)",
        ),
        (
            lambda: load_balancing_loss(
                jnp.ones((2, 3)), jnp.ones((2, 1), int), axis=1
            ),
            ValueError,
            "`axis` must hold axes of an array with 1 axes, got 1",
        ),
        (
            lambda: router_z_loss(jnp.ones((2, 3)), where=jnp.ones(2)),
            TypeError,
            "router_z_loss: `where` must have dtype bool",
        ),
        (
            lambda: importance_loss(jnp.ones((2, 3)), where=jnp.ones(3, bool)),
            ValueError,
            r"importance_loss: `where` must broadcast to shape \(2,\)",
        ),
        (
            lambda: cv_squared(jnp.ones(3, int)),
            TypeError,
            "cv_squared: `x` must have a floating dtype",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
