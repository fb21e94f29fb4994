"""InfoNCE and the sigmoid loss of embedded pairs."""

import functools

import jax
import numpy as np
import pytest

from softlib import losses
from softlib.testing import assert_close
from tests.host import jnp

B, D = 7, 3


def embedded(dtype="float32"):
    random = np.random.default_rng(0)
    return tuple(jnp.asarray(random.normal(size=(B, D)), dtype) for _ in range(2))


def wanted_nce(rows, columns, tau, where):
    found = np.zeros((2, B))
    for side, (one, other) in enumerate(((rows, columns), (columns, rows))):
        for i in range(B):
            if where[i]:
                e = [np.exp(one[i] @ other[j] / tau) for j in range(B) if where[j]]
                found[side, i] = np.log(sum(e)) - one[i] @ other[i] / tau
    return found


def wanted_sigmoid(rows, columns, scale, bias, where):
    found = np.zeros(B)
    for i in range(B):
        for j in range(B):
            if where[i] and where[j]:
                z = scale * (rows[i] @ columns[j]) + bias
                found[i] += np.log1p(np.exp(-z if i == j else z))
    return found


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("masked", [True, False])
def test_matches_oracle(masked, dtype):
    """What does not count is NaN."""
    with jax.enable_x64(dtype == "float64"):
        given = embedded(dtype)
        rows, columns = (np.asarray(a, np.float64) for a in given)
        where = np.arange(B) % 3 != 1 if masked else np.ones(B, bool)
        bad = [jnp.where(where[:, None], a, jnp.nan) for a in given]
        mask = jnp.asarray(where) if masked else None
        nce = jax.jit(
            lambda one, two: losses.info_nce_loss(one, two, temperature=0.7, where=mask)
        )(*bad)
        sigmoid = jax.jit(
            lambda one, two: losses.sigmoid_contrastive_loss(
                one, two, scale=2.0, bias=-1.5, where=mask
            )
        )(*bad)
        check = functools.partial(assert_close, dtype=nce.row.dtype, length=B * D)
        check(jnp.stack(nce), wanted_nce(rows, columns, 0.7, where))
        check(sigmoid, wanted_sigmoid(rows, columns, 2.0, -1.5, where))


def test_gradients_are_finite_and_zero_for_pairs_that_do_not_count():
    where = jnp.arange(B) != 2
    bad = [jnp.where(where[:, None], a, jnp.nan) for a in embedded()]

    @functools.partial(jax.jit, static_argnums=())
    def run(bad, numbers):
        nce = losses.info_nce_loss(*bad, temperature=numbers[0], where=where)
        options = {"scale": numbers[1], "bias": numbers[2]}
        sigmoid = losses.sigmoid_contrastive_loss(*bad, **options, where=where)
        return nce.row.sum() + nce.column.sum() + sigmoid.sum()

    numbers = tuple(map(jnp.float32, (0.7, 2.0, -1.5)))
    slopes, of_numbers = jax.grad(run, (0, 1))(bad, numbers)
    for slope in slopes:
        assert np.isfinite(slope).all()
        np.testing.assert_array_equal(np.abs(slope).sum(1) > 0, where)
    for i, step in enumerate((1e-2, 1e-2, 1e-2)):
        moved = [
            run(bad, tuple(n + s * step * (i == j) for j, n in enumerate(numbers)))
            for s in (1, -1)
        ]
        numeric = (moved[0] - moved[1]) / (2 * step)
        np.testing.assert_allclose(of_numbers[i], numeric, rtol=1e-2)


def test_one_pair_has_no_negatives():
    one = jnp.ones((1, 2))
    found = losses.info_nce_loss(one, one, temperature=0.1)
    np.testing.assert_array_equal(jnp.stack(found), 0)
    loss = losses.sigmoid_contrastive_loss(one, one, scale=1.0, bias=-2.0)
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)


def test_similarities_are_not_stored():
    pairs = 16_384
    array = jax.ShapeDtypeStruct((pairs, 16), jnp.float32)

    def loss(one, two):
        found = losses.info_nce_loss(one, two, temperature=0.1)
        more = losses.sigmoid_contrastive_loss(one, two, scale=1.0, bias=-1.0)
        return found.row.sum() + found.column.sum() + more.sum()

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(array, array).compile()
    needed = compiled.memory_analysis()
    assert needed is not None
    assert needed.temp_size_in_bytes < pairs * pairs * 4 / 5


def test_errors(untyped):
    array = jnp.ones((3, 2))
    with pytest.raises(ValueError, match=r"`columns` must have shape \(3, 2\)"):
        losses.info_nce_loss(array, jnp.ones((4, 2)), temperature=1.0)
    with pytest.raises(ValueError, match="`temperature` must be positive"):
        losses.info_nce_loss(array, array, temperature=0.0)
    with pytest.raises(ValueError, match=r"`rows` must have shape \(B, D\)"):
        losses.sigmoid_contrastive_loss(array[0], array[0], scale=1.0, bias=0.0)
