"""Nearest codes and k-means."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from softlib.testing import assert_close
from tests.clouds import clouds
from tests.compiled import quantize
from tests.host import jnp
from tests.oracles import vq_logits as oracle


# ----------------------------------------------------------------------- nearest codes
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "codes"), [(1, 1), (50, 7), (7, 50)])
def test_assign_codes_finds_the_nearest(dtype, rows, codes):
    with jax.enable_x64():
        random = np.random.default_rng(0)
        x = jnp.asarray(random.normal(size=(rows, 5)), dtype)
        codebook = jnp.asarray(random.normal(size=(codes, 5)), dtype)
        found = jax.jit(quantize.assign_codes)(x, codebook)
        assert found.dtype == jnp.int32
        np.testing.assert_array_equal(found, oracle.nearest(x, codebook))


def test_ties_go_to_the_lowest_code_and_a_code_finds_itself():
    codebook = jnp.array([[1.0, 0.0], [0.0, 2.0], [1.0, 0.0], [-1.0, 0.0]])
    np.testing.assert_array_equal(
        quantize.assign_codes(codebook, codebook), [0, 1, 0, 3]
    )
    np.testing.assert_array_equal(
        quantize.assign_codes(jnp.zeros((1, 2)), codebook), [0]
    )


def test_what_is_near_does_not_depend_on_where_it_is():
    """|e|² - 2 e c + |c|² in float32 loses all digits far from the origin."""
    x = clouds(rows=40)[0]
    x = x / 100
    codebook = x[:4]
    wanted = oracle.nearest(x, codebook)
    far = jnp.float32(np.round(np.float64(x) * 2**7) / 2**7)  # exact after the shift
    np.testing.assert_array_equal(
        quantize.assign_codes(far + 1e4, far[:4] + 1e4), wanted
    )
    kmeans = functools.partial(quantize.kmeans, num_codes=4, key=jax.random.key(0))
    near, moved = kmeans(far), kmeans(far + 1e4)
    np.testing.assert_allclose(moved.inertia[-1], near.inertia[-1], rtol=1e-4)
    np.testing.assert_allclose(moved.codebook - 1e4, near.codebook, atol=2e-3)


# ----------------------------------------------------------------------------- k-means
def test_kmeans_finds_clouds():
    x, own = clouds()
    found = jax.jit(functools.partial(quantize.kmeans, num_codes=4))(
        x, key=jax.random.key(0)
    )
    for cloud in range(4):
        codes = np.unique(found.mapping[own == cloud])
        assert len(codes) == 1
        mean = np.float64(x)[own == cloud].mean(0)
        assert_close(found.codebook[codes[0]], mean, dtype="float32", length=15)
    np.testing.assert_array_equal(found.mapping, oracle.nearest(x, found.codebook))
    wanted = np.square(np.float64(x - found.codebook[found.mapping])).sum()
    np.testing.assert_allclose(found.inertia[-1], wanted, rtol=1e-5)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 3, 8]), st.booleans())
def test_inertia_does_not_increase(seed, codes, weighted):
    random = np.random.default_rng(seed)
    x = jnp.float32(random.normal(size=(40, 2)))
    weights = jnp.float32(random.exponential(size=40)) if weighted else None
    found = kmeans_of_any(x, weights, jax.random.key(seed), codes)
    assert found.inertia.shape == (21,)
    assert (np.diff(found.inertia) <= 1e-4 * found.inertia[0]).all()


@functools.partial(jax.jit, static_argnums=3)
def kmeans_of_any(x, weights, key, codes):
    return quantize.kmeans(x, codes, key=key, weights=weights)


def test_weights_are_repetitions():
    x, _ = clouds(rows=20)
    counts = jnp.asarray(np.random.default_rng(0).integers(0, 4, 20))
    repeated = jnp.repeat(x, counts, axis=0)
    heavy = quantize.kmeans(x, 1, key=jax.random.key(0), weights=counts)
    assert_close(
        heavy.codebook[0], repeated.mean(0), dtype="float32", length=len(repeated)
    )


def test_more_codes_than_distinct_rows_leave_some_unused():
    x = jnp.array([[0.0, 0.0], [1.0, 1.0]]).repeat(3, axis=0)
    found = quantize.kmeans(x, 5, key=jax.random.key(0), num_steps=3)
    assert np.isfinite(found.codebook).all()
    assert found.inertia[-1] == 0
    assert len(np.unique(found.mapping)) == 2


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_rows_on_several_devices(kind):
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(kind,))
    x, codebook = clouds(rows=64)[0], clouds(rows=64)[0][:5]
    with jax.set_mesh(mesh):
        divided = jax.device_put(x, NamedSharding(mesh, PartitionSpec("rows")))
        found = jax.jit(quantize.assign_codes)(divided, codebook)
    np.testing.assert_array_equal(found, oracle.nearest(x, codebook))


def test_scores_are_held_for_blocks_of_rows():
    """A product of 2^15 rows and 2^12 codes would be 512 MiB; also with a rest."""
    shape = lambda *axes: jax.ShapeDtypeStruct(axes, jnp.float32)
    program = jax.jit(quantize.assign_codes).lower(shape(2**15 + 7, 4), shape(2**12, 4))
    memory = program.compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 2**27


def test_blocks_with_a_rest_find_the_nearest():
    random = np.random.default_rng(0)
    x = jnp.float32(random.normal(size=(2**13 + 5, 2)))
    codebook = jnp.float32(random.normal(size=(2**10, 2)))
    found = quantize.assign_codes(x, codebook)
    chosen = np.r_[0:20, 4090:4110, 8180:8197]
    np.testing.assert_array_equal(found[chosen], oracle.nearest(x[chosen], codebook))


# ------------------------------------------------------------------------------- errors
X, CODEBOOK, KEY = jnp.zeros((6, 3)), jnp.zeros((2, 3)), jax.random.key(0)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: quantize.assign_codes(X, CODEBOOK[:, 1:]), ValueError, "same D, got"),
        (lambda: quantize.assign_codes(X[0], CODEBOOK), ValueError, r"\(V, D\)"),
        (
            lambda: quantize.assign_codes(X.astype(int), CODEBOOK),
            TypeError,
            "`embeddings`",
        ),
        (lambda: quantize.kmeans(X[0], 2, key=KEY), ValueError, r"`x` must have shape"),
        (
            lambda: quantize.kmeans(X, 0, key=KEY),
            ValueError,
            "`num_codes` must be at least",
        ),
        (
            lambda: quantize.kmeans(X, 2, key=KEY, num_steps=0),
            ValueError,
            "`num_steps` must be at least",
        ),
        (
            lambda: quantize.kmeans(X, 2, key=KEY, weights=jnp.ones(3)),
            ValueError,
            "`weights`.*one per row",
        ),
    ],
)
def test_wrong_arguments_are_errors(call, error, message, eager):
    with pytest.raises(error, match=message):
        call()
