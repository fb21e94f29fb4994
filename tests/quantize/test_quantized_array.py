"""Weights in few bits: groups, vectors, codes in words, the value that holds them."""

from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.test_util import check_grads

from softlib.quantize import QuantizedArray, QuantizedParameters
from softlib.testing import assert_close
from tests.compiled import quantize
from tests.host import jnp
from tests.oracles import quantize as oracle


def drawn(*shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


# ------------------------------------------------------------------------------- words
@pytest.mark.parametrize("bits", [1, 2, 3, 5, 8, 13, 16])
def test_unpacking_undoes_packing(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (2, 3, 45))
    words = quantize.pack_codes(jnp.asarray(codes), bits=bits)
    assert words.dtype == jnp.uint32
    assert words.shape == (2, 3, 2 * bits)
    found = quantize.unpack_codes(words, 45, bits=bits)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, codes)


def test_no_codes_take_no_words():
    words = quantize.pack_codes(jnp.zeros((3, 0), int), bits=3)
    assert words.shape == (3, 0)
    assert quantize.unpack_codes(words, 0, bits=3).shape == (3, 0)


# ------------------------------------------------------------------------------ groups
@pytest.mark.parametrize("is_symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_groups_match_the_oracle(dtype, bits, is_symmetric):
    with jax.enable_x64():
        weight = drawn(3, 2, 24, dtype=dtype)
        exact = np.asarray(weight, np.float64)
        options: dict[str, Any] = {"bits": bits, "is_symmetric": is_symmetric}
        found = quantize.quantize_groups(weight, group_size=8, **options)
        codes, scale, zero, decoded = oracle.grouped(exact, group_size=8, **options)
        wide = jnp.promote_types(dtype, "float32")
        assert found.dtype == found.decode().dtype == found.scale.dtype == wide
        assert_close(found.scale, scale, dtype=wide, length=2)
        # Half a step between two codes, numbers of few bits fall to either side.
        lowest = 0 if zero is None else np.repeat(zero, 8, axis=-1)
        steps = (exact - lowest) / np.repeat(scale, 8, axis=-1)
        clear = np.abs(steps - np.floor(steps) - 0.5) > 1e-5
        assert clear.mean() > 0.9
        np.testing.assert_array_equal(found.codes[clear], codes[clear])
        assert_close(found.decode()[clear], decoded[clear], dtype=wide, length=4)
        if not is_symmetric:
            np.testing.assert_array_equal(found.zero, zero)
        assert (found.zero is None) == is_symmetric


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(2, 8),
    st.sampled_from([1, 2, 12]),
    st.booleans(),
    st.sampled_from([0.0, 0.4]),
)
def test_an_error_is_at_most_half_a_step_and_pruned_weights_are_0(
    seed, bits, group_size, is_symmetric, sparsity
):
    weight = 3 * drawn(4, 12, seed=seed) + 1
    pruned = quantize.prune_by_magnitude(weight, sparsity=sparsity)
    found = quantize.quantize_groups(
        weight,
        bits=bits,
        group_size=group_size,
        is_symmetric=is_symmetric,
        where=pruned.where,
    )
    again = np.asarray(found.decode())
    steps = np.repeat(found.scale, group_size, axis=-1)
    off = np.abs(again - pruned.weight)
    assert (off <= steps * 0.5001).all()
    assert (again[~np.asarray(pruned.where)] == 0).all()
    np.testing.assert_array_equal(found.where, pruned.where)


def test_quantizing_again_changes_nothing():
    weight = drawn(5, 64)
    once = quantize.quantize_groups(weight, bits=3, group_size=16)
    twice = quantize.quantize_groups(once.decode(), bits=3, group_size=16)
    np.testing.assert_array_equal(once.codes, twice.codes)
    assert_close(twice.decode(), once.decode(), dtype="float32", length=2)


def test_constant_groups_ties_and_numbers_that_are_not_finite():
    weight = jnp.array([[5.0, 5.0, 0.0, 0.0], [0.5, 1.5, 0.0, 3.0]])
    found = quantize.quantize_groups(weight[:1], bits=2, group_size=2)
    np.testing.assert_array_equal(found.scale, 1)
    np.testing.assert_array_equal(found.codes, 0)
    np.testing.assert_array_equal(found.decode(), weight[:1])
    ties = quantize.quantize_groups(weight[1:], bits=2, group_size=4)
    np.testing.assert_array_equal(ties.codes, [[0, 2, 0, 3]])
    symmetric = quantize.quantize_groups(
        weight[:1], bits=2, group_size=2, is_symmetric=True
    )
    np.testing.assert_array_equal(symmetric.decode(), weight[:1])
    broken = jnp.array([[1.0, jnp.nan, 1.0, jnp.inf, 1.0, 2.0]])
    for is_symmetric in (False, True):
        decoded = quantize.quantize_groups(
            broken, bits=4, group_size=2, is_symmetric=is_symmetric
        ).decode()
        assert np.isnan(decoded[0, :4]).all()
        assert_close(decoded[0, 4:], broken[0, 4:], dtype="float32", length=8, c=1e6)


# ----------------------------------------------------------------------------- vectors
@pytest.mark.parametrize("group_size", [None, 6, 12])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_vectors_match_the_oracle(dtype, group_size):
    with jax.enable_x64():
        weight, codebook = drawn(3, 4, 12, dtype=dtype), drawn(11, 3, dtype=dtype)
        found = quantize.quantize_vectors(weight, codebook, group_size=group_size)
        codes, scale, decoded = oracle.by_vectors(weight, codebook, group_size)
        np.testing.assert_array_equal(found.codes, codes)
        assert found.bits == 4
        assert_close(found.decode(), decoded, dtype=dtype, length=12)
        assert (found.scale is None) == (group_size is None)
        if scale is not None:
            assert_close(found.scale, scale, dtype=dtype, length=12)


def test_a_fitted_codebook_is_better_than_a_drawn_one():
    weight = drawn(32, 16)
    scales = jnp.exp(drawn(32, 1, seed=1))
    fitted = quantize.fit_codebook(
        jax.random.key(0), weight * scales, 16, vector_size=2, group_size=16
    )

    def error(codebook):
        found = quantize.quantize_vectors(weight * scales, codebook, group_size=16)
        return float(jnp.square((found.decode() - weight * scales) / scales).mean())

    assert error(fitted) < 0.6 * error(drawn(16, 2, seed=3))


def test_one_code_and_weights_without_a_value():
    weight = drawn(2, 8)
    found = quantize.quantize_vectors(weight, jnp.ones((1, 4)))
    np.testing.assert_array_equal(found.decode(), 1)
    where = jnp.arange(16).reshape(2, 8) % 3 > 0
    masked = quantize.quantize_vectors(
        jnp.where(where, weight, jnp.nan), drawn(7, 4), group_size=4, where=where
    ).decode()
    assert (np.asarray(masked)[~np.asarray(where)] == 0).all()
    assert np.isfinite(masked).all()


# ----------------------------------------------------------------------------- pruning
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.25, 0.5, 0.9]))
def test_pruning_matches_the_oracle(seed, sparsity):
    weight = np.round(np.random.default_rng(seed).normal(size=(3, 4)) * 2)  # with ties
    whole = quantize.prune_by_magnitude(jnp.float32(weight), sparsity=sparsity)
    wanted = oracle.pruned(weight.reshape(-1), sparsity).reshape(3, 4)
    np.testing.assert_array_equal(whole.weight, wanted)
    assert whole.where.sum() == 12 - np.floor(12 * sparsity + 0.5)
    for axis in (0, -1):
        found = quantize.prune_by_magnitude(
            jnp.float32(weight), sparsity=sparsity, axis=axis
        ).weight
        wanted = np.apply_along_axis(oracle.pruned, axis, weight, sparsity)
        np.testing.assert_array_equal(found, wanted)


def test_pruning_hides_no_nan():
    weight = jnp.array([jnp.nan, 1.0, 2.0, 3.0])
    found = quantize.prune_by_magnitude(weight, sparsity=0.75)
    np.testing.assert_array_equal(found.where, [True, False, False, False])


# --------------------------------------------------------------------------- the value
def values():
    weight = drawn(5, 24)
    where = drawn(5, 24, seed=2) > -1
    return {
        "grid": quantize.quantize_groups(weight, bits=3, group_size=8, where=where),
        "symmetric": quantize.quantize_groups(
            weight, bits=4, group_size=24, is_symmetric=True
        ),
        "vectors": quantize.quantize_vectors(weight, drawn(9, 4, seed=1)),
        "scaled": quantize.quantize_vectors(
            weight, drawn(9, 4, seed=1), group_size=8, where=where
        ),
    }


@pytest.mark.parametrize("kind", ["grid", "symmetric", "vectors", "scaled"])
def test_is_a_value(kind):
    value = values()[kind]
    assert value.shape == (5, 24)
    assert value.ndim == 2
    decoded = value.decode()
    np.testing.assert_allclose(jax.jit(lambda v: v.decode())(value), decoded, rtol=1e-6)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), value)
    axes = jax.tree.map(lambda _: 0, value)
    every = jax.vmap(lambda v: v.decode(), in_axes=(axes,))(stacked)
    np.testing.assert_allclose(every[1], decoded, rtol=1e-6)
    same = value.with_codes(value.codes).with_parameters(value.parameters)
    np.testing.assert_array_equal(same.decode(), decoded)
    narrow = value.astype(jnp.bfloat16)
    assert narrow.dtype == narrow.decode().dtype == jnp.bfloat16
    assert narrow.nbytes < value.nbytes
    rows = jax.jit(lambda v, i: v.look_up(i))(value, jnp.array([[4, -1], [5, 0]]))
    np.testing.assert_allclose(rows[0, 0], decoded[4], rtol=1e-6)
    np.testing.assert_allclose(rows[1, 1], decoded[0], rtol=1e-6)
    assert np.isnan(rows[0, 1]).all()
    assert np.isnan(rows[1, 0]).all()
    assert f"bits={value.bits}, size=24" in repr(value)


@pytest.mark.parametrize("kind", ["grid", "symmetric", "vectors", "scaled"])
def test_parameters_have_derivatives(kind):
    value = values()[kind]
    with jax.enable_x64():
        value = value.astype(jnp.float64)
        factors = drawn(5, 24, seed=5, dtype="float64")
        total = lambda own: (factors * value.with_parameters(own).decode() ** 2).sum()
        check_grads(jax.jit(total), (value.parameters,), order=1, atol=1e-5)


def test_a_codebooks_gradient_sums_that_of_the_weights():
    """V step: the gradient of a code is the sum over the vectors that have it."""
    value = values()["vectors"]
    of_weight = drawn(5, 24, seed=7)
    parameters = value.parameters
    _, pull = jax.vjp(lambda own: value.with_parameters(own).decode(), parameters)
    (found,) = pull(of_weight)
    wanted = np.zeros((9, 4))
    np.add.at(wanted, np.asarray(value.codes), np.float64(of_weight).reshape(5, 6, 4))
    assert_close(found.codebook, wanted, dtype="float32", length=30)


def test_the_code_of_no_row_is_nan():
    codes = jnp.array([[0, 3]])
    value = QuantizedArray(codes, bits=2, codebook=jnp.ones((2, 2)))
    np.testing.assert_array_equal(value.decode(), [[1, 1, jnp.nan, jnp.nan]])


# ------------------------------------------------------------------------------- errors
W, CODES, BOOK = jnp.ones((2, 12)), jnp.zeros((2, 12), int), jnp.ones((4, 3))
SCALE = jnp.ones((2, 3))


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda q: q.quantize_groups(W, group_size=5), ValueError, r"divide.*\(12\)"),
        (lambda q: q.quantize_groups(W, group_size=0), ValueError, "`group_size` must"),
        (
            lambda q: q.quantize_groups(W, bits=1),
            ValueError,
            "`bits` must be at least 2",
        ),
        (
            lambda q: q.quantize_groups(W, bits=9),
            ValueError,
            "`bits` must be at most 8",
        ),
        (
            lambda q: q.quantize_groups(W, bits=2.0),
            TypeError,
            "`bits` must be a Python",
        ),
        (
            lambda q: q.quantize_groups(CODES),
            TypeError,
            "`weight` must have a floating",
        ),
        (
            lambda q: q.quantize_groups(W, group_size=4, where=jnp.ones(12, bool)),
            ValueError,
            "`where` must have shape",
        ),
        (
            lambda q: q.quantize_vectors(W, jnp.ones((2, 5))),
            ValueError,
            r"\(12\), got 5",
        ),
        (lambda q: q.quantize_vectors(W, jnp.ones(5)), ValueError, r"shape \(K, d\)"),
        (
            lambda q: q.quantize_vectors(W, BOOK, group_size=4),
            ValueError,
            "multiple of 3 and divide",
        ),
        (
            lambda q: q.fit_codebook(jax.random.key(0), W, 70_000, vector_size=2),
            ValueError,
            "`num_codes` must be at most 65536",
        ),
        (lambda q: q.prune_by_magnitude(W, sparsity=1.0), ValueError, r"in \[0, 1\)"),
        (lambda q: q.prune_by_magnitude(W, sparsity=jnp.ones(())), TypeError, "static"),
        (lambda q: q.prune_by_magnitude(W, sparsity=0.5, axis=2), ValueError, "`axis`"),
        (
            lambda q: q.pack_codes(jnp.array([4]), bits=2),
            ValueError,
            r"\[0, 4\), got 4",
        ),
        (lambda q: q.pack_codes(jnp.array([-1]), bits=2), ValueError, "got -1"),
        (lambda q: q.pack_codes(CODES, bits=17), ValueError, "at most 16"),
        (lambda q: q.pack_codes(W, bits=2), TypeError, "integer dtype"),
        (
            lambda q: q.unpack_codes(jnp.ones(2, jnp.uint32), 33, bits=2),
            ValueError,
            "must be 4 along",
        ),
        (lambda q: q.unpack_codes(jnp.ones(2, int), 9, bits=2), TypeError, "uint32"),
    ],
)
def test_wrong_arguments_are_errors(call, error, message, eager):
    with pytest.raises(error, match=message):
        call(quantize)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 2}, "`scale` must be given"),
        ({"bits": 2, "scale": jnp.ones((2, 5))}, "`scale` must have shape"),
        ({"bits": 2, "scale": jnp.ones(3)}, "`scale` must have shape"),
        ({"bits": 2, "scale": SCALE, "zero": jnp.ones((2, 1))}, "`zero` must have"),
        ({"bits": 1, "codebook": BOOK}, "`codebook` must have shape.* 1 to 2 rows"),
        ({"bits": 2, "codebook": BOOK, "zero": SCALE}, "`zero` must be None"),
        ({"bits": 0, "scale": SCALE}, "`bits` must be at least 1"),
        ({"bits": 2, "scale": SCALE, "where": CODES[0] > 0}, "`where` must have shape"),
    ],
)
def test_wrong_parts_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        QuantizedArray(CODES, **options)


@pytest.mark.usefixtures("untyped")
def test_wrong_replacements_are_errors():
    value = QuantizedArray(CODES, bits=2, scale=SCALE)
    with pytest.raises(ValueError, match=r"`scale` must have shape \(2, 3\), got None"):
        value.with_parameters(QuantizedParameters(None, None, None))
    with pytest.raises(ValueError, match="`codes` must have shape"):
        value.with_codes(CODES[:1])
    with pytest.raises(ValueError, match=r"\[0, 4\), got 9"):
        value.with_codes(CODES + 9)
    with pytest.raises(TypeError, match="`dtype` must be floating"):
        value.astype(jnp.int32)
    with pytest.raises(TypeError, match="`index` must have an integer"):
        value.look_up(jnp.ones(2))
