"""Feature maps: scores, the Taylor polynomial, and its error against softmax."""

import functools
import math
import pathlib

import jax
import numpy as np
import pytest

from softlib.recurrent import attention_matrix, linear_attention, taylor_feature_map
from softlib.testing import assert_close
from tests.host import jnp
from tests.oracles import recurrent

DATA = pathlib.Path(__file__).parent.parent / "data"


@pytest.mark.parametrize("size", [0, 1, 2, 5])
@pytest.mark.parametrize("order", [0, 1, 2, 3, 6])
def test_taylor_features_are_the_monomials_of_the_polynomial(size, order):
    random = np.random.default_rng(order)
    q, k = random.normal(size=(2, 4, size)).astype(np.float32)
    phi = jax.jit(lambda x: taylor_feature_map(x, order=order))
    of_q, of_k = np.asarray(phi(q)), np.asarray(phi(k))
    assert of_q.shape == (4, math.comb(size + order, order))
    score = recurrent.taylor(order)
    pairs = zip(q.astype(float), k.astype(float), strict=True)
    expected = [score(*pair) for pair in pairs]
    scores = (of_q * of_k).sum(-1)
    assert_close(scores, expected, dtype=jnp.float32, length=4 * of_q.shape[-1])


def test_taylor_features_are_ordered_by_degree():
    x = jnp.array([2.0, 3.0])
    degree = {1: 2.0, 2: 3.0, 3: 4.0 / 2**0.5, 4: 6.0, 5: 9.0 / 2**0.5}
    np.testing.assert_allclose(
        taylor_feature_map(x, order=2), [1.0, *degree.values()], rtol=1e-6
    )
    np.testing.assert_array_equal(
        taylor_feature_map(x, order=1), taylor_feature_map(x, order=2)[:3]
    )


@pytest.mark.parametrize("name", ["elu1", "relu", "exp", "taylor0", "taylor3"])
def test_named_maps_have_the_scores_of_the_formula(name):
    random = np.random.default_rng(0)
    q, k = random.normal(size=(2, 6, 1, 3)).astype(np.float32)
    call = functools.partial(attention_matrix, feature_map=name, normalizer="none")
    got = jax.jit(call)(q, k)
    scores = recurrent.SCORES | {"taylor0": recurrent.taylor(0)}
    expected = recurrent.attention_matrix(q, k, score=scores[name], eta="none")
    assert_close(got, expected, dtype=jnp.float32, length=20)


def test_taylor_attention_approaches_softmax_attention():
    """The table of truncation errors, and that every order improves on the last."""
    data = np.load(DATA / "dynamical_systems_case0.npz")
    x = [data[f"in_{name}"] for name in ("query", "key", "value")]
    softmax = recurrent.softmax_attention(*x)
    np.testing.assert_allclose(softmax, data["out_softmax_attention"], atol=1e-14)
    with jax.enable_x64():
        batched = [jnp.asarray(a)[None, :, None] for a in x]
        counts = [math.comb(3 + order, order) for order in range(13)]
        kept = jnp.asarray(np.arange(counts[-1]) < np.array(counts)[:, None])

        def attention(kept):
            phi = lambda x: (
                taylor_feature_map(x, order=12)
                * kept.reshape((1,) * (x.ndim - 1) + (-1,))
            )
            return linear_attention(*batched, feature_map=phi)[0, :, 0]

        outputs = jax.jit(jax.vmap(attention))(kept)
    errors = np.abs(np.asarray(outputs) - softmax).max((1, 2))
    np.testing.assert_allclose(errors, data["out_taylor_errors"], rtol=1e-9)
    assert (np.diff(errors) < 0).all()


def test_elu1_keeps_its_digits_and_has_slope_one_at_zero():
    phi = lambda x: linear_attention(
        x, jnp.zeros_like(x), jnp.ones_like(x), normalizer="none"
    )
    x = jnp.array([-40.0, -1.0, 0.0, 2.0])[:, None, None]
    # The score with the key 0 is phi(q), and the sum over the past counts it i times.
    times = np.arange(1, 5)
    expected = np.where(x > 0, x + 1, np.exp(np.minimum(np.float64(x), 0)))
    np.testing.assert_allclose(phi(x)[:, 0, 0] / times, expected[:, 0, 0], rtol=1e-5)
    slope = jax.grad(lambda x: phi(x).sum())(jnp.zeros((1, 1, 1)))
    assert float(slope[0, 0, 0]) == 1.0


def test_a_function_as_feature_map_sees_parts_of_the_sequence():
    seen = []

    def phi(x):
        seen.append(x.shape)
        return jnp.concatenate([jnp.exp(x), jnp.exp(-x)], axis=-1)

    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 2, 3)), jnp.float32)
    output = linear_attention(*x, feature_map=phi, chunk_size=3)
    expected = recurrent.linear_attention(
        *np.asarray(x, np.float64),
        score=lambda q, k: np.exp(q) @ np.exp(k) + np.exp(-q) @ np.exp(-k),
    )
    assert_close(output, expected, dtype=jnp.float32, length=30)
    assert {shape[0] for shape in seen} <= {2, 3}  # 8 = 2 + 3 + 3
