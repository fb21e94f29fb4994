"""Pooling by learned queries with a weight per token."""

from typing import Any

import jax
import numpy as np
import pytest

from softlib.attention import weighted_pool
from softlib.testing import assert_close, check_transformations
from tests.host import jnp

BATCH, TOKENS, POOLED, HEADS, KEY_HEADS, FEATURES, VALUES = 2, 11, 3, 4, 2, 5, 7


def problem(dtype="float64", seed=0) -> Any:
    random = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), dtype)
    weights = random.uniform(0.1, 3.0, (BATCH, TOKENS))
    weights[0, 2:5], weights[1, 0] = 0, 0
    return (
        draw(POOLED, HEADS, FEATURES),
        draw(BATCH, TOKENS, KEY_HEADS, FEATURES),
        draw(BATCH, TOKENS, KEY_HEADS, VALUES),
        jnp.asarray(weights, dtype),
    )


def oracle(queries, keys, values, weights, scale=None) -> np.ndarray:
    """The definition, by loops in float64; a token of weight 0 is passed over."""
    queries, keys, values, weights = (
        np.asarray(a, np.float64) for a in (queries, keys, values, weights)
    )
    weights = np.broadcast_to(weights, keys.shape[:2])
    scale = 1 / np.sqrt(keys.shape[-1]) if scale is None else scale
    group = queries.shape[1] // keys.shape[2]
    out = np.zeros((len(keys), *queries.shape[:2], values.shape[-1]))
    for b, p, n in np.ndindex(*out.shape[:3]):
        own = [t for t in range(keys.shape[1]) if weights[b, t] > 0]
        if own:
            z = np.array([scale * queries[p, n] @ keys[b, t, n // group] for t in own])
            m = weights[b, own] * np.exp(z - z.max())
            out[b, p, n] = m @ values[b, own, n // group] / m.sum()
    return out


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_matches_oracle(dtype):
    """With weights per sequence and for all of them; what is dropped is NaN."""
    with jax.enable_x64(dtype == "float64"):
        queries, keys, values, weights = problem(dtype)
        where = np.ones((BATCH, TOKENS), bool)
        where[0, 7], where[1, 5:] = False, False
        hole = jnp.asarray(where)[..., None, None]

        @jax.jit
        def run(queries, keys, values, weights):
            keys, values = (
                jnp.where(hole, keys, jnp.nan),
                jnp.where(hole, values, jnp.nan),
            )
            dropped = jnp.where(where, weights, jnp.nan)
            pool = lambda w, **options: weighted_pool(
                queries, keys, values, weights=w, where=jnp.asarray(where), **options
            )
            return pool(dropped), pool(weights[0], scale=0.3), pool(None)

        exact = np.asarray(weights, np.float64)
        own, shared, plain = run(queries, keys, values, weights)
        for found, wanted in (
            (own, oracle(queries, keys, values, exact * where)),
            (
                shared,
                oracle(queries, keys, values, exact[0] * where, 0.3),
            ),
            (plain, oracle(queries, keys, values, where)),
        ):
            assert found.dtype == dtype
            assert found.shape == (BATCH, POOLED, HEADS, VALUES)
            assert_close(found, wanted, dtype=dtype, length=TOKENS, c=16)


def test_a_whole_weight_is_a_token_repeated_and_a_factor_changes_nothing():
    with jax.enable_x64():
        queries, keys, values, _ = problem()
        times = np.array([3, 0, 1, 2, 1, 1, 0, 4, 1, 1, 2])
        weights = jnp.asarray(times, "float64")

        @jax.jit
        def run(queries, keys, values, weights):
            repeated = (jnp.repeat(a, times, axis=1) for a in (keys, values))
            return (
                weighted_pool(queries, keys, values, weights=weights),
                weighted_pool(queries, keys, values, weights=1e-30 * weights),
                weighted_pool(queries, *repeated),
            )

        found, scaled, wanted = run(queries, keys, values, weights)
        assert_close(found, wanted, dtype="float64", length=TOKENS, c=16)
        assert_close(scaled, wanted, dtype="float64", length=TOKENS, c=16)


def test_queries_of_zero_are_the_weighted_mean():
    _, keys, values, weights = problem("float32")
    weights = weights[0]
    nothing = jnp.zeros((1, KEY_HEADS, FEATURES))
    found = jax.jit(weighted_pool)(nothing, keys, values, weights=weights)
    wanted = np.einsum("t,btke->bke", weights / weights.sum(), values)[:, None]
    assert_close(found, wanted, dtype="float32", length=TOKENS, c=16)


def test_edges_of_weights_have_values_and_gradients():
    """No token: 0. Weight 0: gone, however large its score. Negative or NaN: NaN."""
    queries, keys, values, _ = problem("float32")
    rows = np.ones((4, TOKENS))
    rows[0], rows[1, 3], rows[2, 4], rows[3, 5] = 0, 0, -1, np.nan
    batch = lambda a: jnp.asarray(np.concatenate([a, a]))
    keys, values = batch(keys), batch(values)
    keys = keys.at[1, 3].set(1e4)

    @jax.jit
    def run(queries, weights):
        loss = lambda q, w: weighted_pool(q, keys, values, weights=w)[:2].sum()
        found = weighted_pool(queries, keys, values, weights=weights)
        return found, jax.grad(loss, (0, 1))(queries, weights)

    found, gradients = run(queries, jnp.asarray(rows, "float32"))
    assert (found[0] == 0).all()
    others = np.arange(TOKENS) != 3
    without = weighted_pool(queries, keys[1:2, others], values[1:2, others])
    assert_close(found[1], without[0], dtype="float32", length=TOKENS, c=16)
    assert np.isnan(found[2:]).all()
    assert np.isfinite(gradients[0]).all()
    of_weights = np.asarray(gradients[1])
    assert (of_weights[0] == 0).all()
    assert of_weights[1, 3] == 0
    assert np.abs(of_weights[1]).max() > 0


def test_transformations():
    """Derivatives of weights too, by differences; batches, `jit`, `vmap`."""
    queries, keys, values, weights = problem("float32")
    positive = weights + 0.5

    def pool(queries, keys, values, weights):
        return weighted_pool(queries, keys, values, weights=weights)

    check_transformations(
        pool,
        queries,
        keys,
        values,
        positive,
        rows=(1, 2, 3),
        skip={"forward_mode": "as dot_product_attention"},
    )


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"weights": np.ones(3, "float32")}, r"`weights` must have shape"),
        ({"where": np.ones((BATCH, 3), bool)}, r"`where` must have shape"),
        ({"queries": np.ones((2, 3), "float32")}, r"`queries` must have"),
        ({"keys": np.ones((2, 3), "float32")}, r"`keys` must have shape"),
        ({"keys": np.ones((2, 11, 2, 9), "float32")}, r"`keys` must have shape"),
        ({"values": np.ones((2, 11, 1, 7), "float32")}, r"`values` must have shape"),
        ({"queries": np.ones((3, 3, 5), "float32")}, r"`queries` must have a multiple"),
    ],
)
def test_errors_name_the_argument(changed, text):
    names = ("queries", "keys", "values", "weights")
    arguments = dict(zip(names, problem("float32"), strict=True)) | changed
    with pytest.raises(ValueError, match=f"^weighted_pool: {text}"):
        weighted_pool(**arguments)
